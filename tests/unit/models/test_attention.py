"""Attention backends against the dense reference, on random forests; and the same names outside of a forest batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.batch import Batch, Example, Node, Segment, pack
from fettle.core.errors import FettleError
from fettle.models import plan as plans
from fettle.models.attention import BACKENDS
from fettle.models.forest import Forest
from fettle.models.load import checkpoint_layers
from fettle.models.plan import Plan

TAIL = 37
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def random_plan(seed: int, longest: int, trees: bool = True) -> Plan:
    """Segments with random parents, some seeing ahead, one of no tokens, and a tail of padding."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    at = 0
    while at < 700:
        size = int(rng.integers(0 if trees else 1, longest))
        parent = (
            int(rng.integers(max(0, len(segments) - 3), len(segments)))
            if trees and segments and rng.random() < 0.5
            else -1
        )
        segments.append(Segment(at, at + size, parent, not trees or bool(rng.random() < 0.8)))
        at += size
    positions = torch.zeros(at + TAIL, dtype=torch.int64)
    depth: list[int] = []
    for s in segments:
        first = depth[s.parent] if s.parent >= 0 else 0
        depth.append(first + s.stop - s.start)
        positions[s.start : s.stop] = torch.arange(first, depth[-1])
    return Plan((*segments, Segment(at, at + TAIL)), positions, frozenset([len(segments)]))


def tensors(plan: Plan, heads: int, groups: int, dtype: torch.dtype, value_size: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(5)
    shapes = [(plan.length, heads, 8), (plan.length, groups, 8), (plan.length, groups, value_size)]
    return [torch.randn(1, *s, generator=make).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def results(name: str, qkv: list[Tensor], plan: Plan, window: int | None, softcap: float | None) -> list[Tensor]:
    out = BACKENDS[name](*qkv, plan, 0.4, window, softcap)
    assert torch.isfinite(out).all()
    real = torch.ones(plan.length, 1, dtype=out.dtype)
    real[-TAIL:] = 0
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype) * real
    return [(out * real).detach(), *torch.autograd.grad(out, qkv, cotangent)]


@pytest.mark.parametrize("window", [None, 20, 150])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_segments_are_the_dense_mask(
    window: int | None, softcap: float | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "TILE", 32)
    for seed, longest in ((0, 40), (1, 300)):
        plan = random_plan(seed, longest)
        qkv = tensors(plan, *heads, torch.float64, value_size=6)
        pairs = zip(
            results("segments", qkv, plan, window, softcap), results("dense", qkv, plan, window, softcap), strict=True
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_plain_documents_and_small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets may be cut in groups; of documents of one tile each, the keys of a token stand in one bag once."""
    monkeypatch.setattr(plans, "SCORES", 64 * 64 * 2)
    plan = random_plan(3, 100, trees=False)
    tiling = plan.tiling(None, (4, 2), torch.float64, torch.device("cpu"))
    for bags, heads in ((tiling.of_queries, 4), (tiling.of_keys, 2)):
        sizes = torch.diff(bags.starts, append=torch.tensor([len(bags.rows)]))
        assert torch.equal(sizes, torch.ones_like(sizes).index_fill_(0, torch.arange(len(sizes))[-TAIL * heads :], 0))
    qkv = tensors(plan, 4, 2, torch.float64)
    for found, expected in zip(
        results("segments", qkv, plan, None, None), results("dense", qkv, plan, None, None), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bfloat16_is_as_near_to_the_truth_as_the_eager_formula() -> None:
    """Both round scores and weights to bfloat16 and take the softmax in float32."""
    plan = random_plan(4, 120)
    narrow = tensors(plan, 4, 4, torch.bfloat16)
    truth, *_ = results("dense", [x.detach().double().requires_grad_() for x in narrow], plan, None, None)
    ours, *_ = results("segments", narrow, plan, None, None)
    q, k, v = narrow
    scores = (q @ k.transpose(2, 3) * 0.4).masked_fill(~plan.mask(None, q.device), -torch.inf)
    theirs = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    theirs[:, :, -TAIL:] = 0
    assert (ours - truth).square().mean() <= 1.2 * (theirs - truth).square().mean()


def test_gradients_in_bfloat16() -> None:
    plan = random_plan(4, 120)
    narrow = tensors(plan, 4, 2, torch.bfloat16)
    truth = results("dense", [x.detach().double().requires_grad_() for x in narrow], plan, None, None)
    for true, found in zip(truth, results("segments", narrow, plan, None, None), strict=True):
        assert (found - true).norm() <= 0.01 * true.norm()


def test_a_document_that_is_not_finite_stays_alone() -> None:
    plan = Plan((Segment(0, 10), Segment(10, 50), Segment(50, 60)), torch.cat([torch.arange(n) for n in (10, 40, 10)]))
    qkv = [x.detach().clone() for x in tensors(plan, 2, 2, torch.float64)]
    for x in qkv:
        x[:, :, 10:50] = torch.nan
    leaves = [x.requires_grad_() for x in qkv]
    out = BACKENDS["segments"](*leaves, plan, 1.0, None, None)
    clean = torch.tensor([*range(10), *range(50, 60)])
    assert torch.isfinite(out[:, :, clean]).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(grad[:, :, clean]).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_forward(window: int | None, softcap: float | None) -> None:
    plan = random_plan(2, 60)
    qkv = [x.detach().float() for x in tensors(plan, 4, 2, torch.float32)]
    with torch.no_grad():
        found, expected = (BACKENDS[name](*qkv, plan, 0.4, window, softcap) for name in ("flex", "dense"))
    torch.testing.assert_close(found[:, :, :-TAIL], expected[:, :, :-TAIL], rtol=0, atol=1e-5)


def test_backends_of_a_gpu_say_what_to_do() -> None:
    plan = random_plan(2, 60)
    qkv = tensors(plan, 2, 2, torch.float32)
    for name in ("flex", "varlen"):
        with pytest.raises(FettleError, match="use 'segments'"):
            BACKENDS[name](*qkv, plan, 1.0, None, None)


def tiny(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 2.0}),
    ],
)
def test_outside_a_batch_a_model_generates_as_ever(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, **settings)
    prompts = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]])
    ask = {"attention_mask": (prompts > 0).long(), "do_sample": False, "max_new_tokens": 6}
    expected = model.generate(prompts, **ask)
    assert torch.equal(Forest(model, backend="segments").model.generate(prompts, **ask), expected)


def row(length: int = 64) -> Batch:
    rng = np.random.default_rng(0)
    node = lambda n, parent=-1: Node(rng.integers(3, 61, n).astype(np.int32), np.ones(n, np.float32), parent)  # noqa: E731
    return pack([Example((node(20), node(9, 0)), "a"), Example((node(17),), "b")], length, 0)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny("qwen3").double().train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(model)
        model.zero_grad()
        Forest(model, backend="segments").logps(row()).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_backward_below_the_lowest_trained_layer(checkpointing: bool) -> None:
    model = tiny("llama").train().requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    if checkpointing:
        checkpoint_layers(model)
    reached: list[int] = []

    def note(layer: nn.Module, _: Any, out: Tensor) -> None:
        if out.requires_grad:
            reached.append(list(model.model.layers).index(layer))

    for layer in model.model.layers:
        layer.register_forward_hook(note)
    Forest(model, backend="segments").logps(row()).sum().backward()
    assert sorted(set(reached)) == [1, 2]


def test_padding_does_not_change_what_experts_give_others() -> None:
    model = tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    forest = Forest(model, backend="segments")
    short, long = forest.logps(row(46)), forest.logps(row(200))
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)


def test_dropout_of_attention_is_not_left_out() -> None:
    model = tiny("llama", attention_dropout=0.5).train()
    forest = Forest(model, backend="segments")
    assert not torch.equal(forest.logps(row()), forest.logps(row()))
    model.eval()
    assert torch.equal(forest.logps(row()), forest.logps(row()))


def test_numbers_of_tiles_are_few() -> None:
    """The matrix library keeps memory for each that it meets."""
    numbers = [plans._counted(n) for n in range(1, 257)]
    lower = [plans._counted(n, up=False) for n in range(1, 257)]
    assert all(n >= down > 2 / 3 * n - 1 and plans._counted(down) == down for n, down in enumerate(lower, 1))
    assert all(n <= up <= 1.5 * n for n, up in enumerate(numbers, 1)) and len(set(numbers)) == 16
