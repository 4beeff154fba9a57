"""Chunked log-probabilities against the plain formula, in float64 and in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fettle.models import head as heads
from fettle.models.head import Head

N, C, V = 23, 8, 31


@pytest.fixture(autouse=True, params=[0, heads.KEEP_BYTES], ids=["again", "kept"])
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "KEEP_BYTES", request.param)
    monkeypatch.setattr(
        heads, "chunks", lambda rows, v, device: [slice(i, min(i + 5, rows)) for i in range(0, rows, 5)]
    )


def linear(bias: bool, trains: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(C, V, bias=bias, dtype=dtype).requires_grad_(trains)


def reference(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head.module(hidden) * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 2.0)])
def test_logps_and_every_gradient(bias: bool, trains: bool, scale: float, softcap: float | None) -> None:
    head = Head(linear(bias, trains), scale, softcap)
    targets = torch.randint(0, V, (N,))
    hidden = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    weights = [hidden, *(p for p in head.module.parameters() if trains)]
    found, expected = head.logps(hidden, targets), reference(head, hidden, targets)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(N, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, weights, cotangent), torch.autograd.grad(expected, weights, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda h: head.logps(h, targets), hidden)


def test_a_head_that_is_more_than_a_linear_layer_is_called() -> None:
    inner = nn.Sequential(linear(False, True), nn.Tanh())
    hidden, targets = torch.randn(N, C, dtype=torch.float64, requires_grad=True), torch.randint(0, V, (N,))
    head = Head(inner)
    found, expected = head.logps(hidden, targets), reference(head, hidden, targets)
    weights = [hidden, inner[0].weight]
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_hook_on_the_head_is_not_passed_by() -> None:
    module = linear(False, False)
    module.register_forward_hook(lambda m, i, out: out * 2)
    hidden, targets = torch.randn(N, C, dtype=torch.float64), torch.randint(0, V, (N,))
    torch.testing.assert_close(Head(module).logps(hidden, targets), reference(Head(module), hidden, targets))


@pytest.mark.parametrize("trains", [False, True])
def test_bfloat16_is_summed_in_float32(trains: bool) -> None:
    narrow, targets = linear(False, trains, torch.bfloat16), torch.randint(0, V, (N,))
    hidden = torch.randn(N, C).bfloat16().requires_grad_()
    found = Head(narrow).logps(hidden, targets)
    assert found.dtype == torch.float32
    logits = nn.functional.linear(hidden, narrow.weight)  # rounded to bfloat16, as the model itself does
    expected = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("trains", [False, True])
def test_a_sure_target_keeps_its_gradient(trains: bool) -> None:
    """In bfloat16 a probability of 0.999 rounds to 1; the gradient 1 - p must not vanish with it."""
    module = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16).requires_grad_(trains)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[7.0], [0.0]]))
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    Head(module).logps(hidden, torch.tensor([0])).backward()
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(7 * 9.11e-4, rel=0.01)


@pytest.mark.parametrize("module", [linear(False, False), linear(False, True), nn.Sequential(linear(False, True))])
def test_no_targets(module: nn.Module) -> None:
    hidden = torch.zeros(0, C, dtype=torch.float64, requires_grad=True)
    found = Head(module).logps(hidden, torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0,)
    found.sum().backward()


def test_chunks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for rows in (0, 1, 255, 256, 257, 5000):
        parts = heads.chunks(rows, 16000, torch.device("cpu"))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
