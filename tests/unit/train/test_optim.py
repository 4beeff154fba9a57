"""Schedules, float32 masters, 8-bit state."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fettle.peft import AdaLoRA
from fettle.train import adam8bit
from fettle.train.adam8bit import AdamW8bit, dequantize, dynamic_code, quantize
from fettle.train.optim import Masters, OptimSpec, build, norm


def test_schedule_warms_up_and_ends_at_the_floor() -> None:
    spec = OptimSpec(lr=1.0, steps=100, warmup=10, floor=0.1)
    rates = [spec.lr_at(i, 100) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert 0.1 < rates[-1] < 0.102
    assert OptimSpec(lr=2.0, schedule="constant", warmup=0).lr_at(99, 100) == 2.0
    assert OptimSpec(lr=2.0, schedule="linear", warmup=0).lr_at(50, 100) == 1.0


def test_length() -> None:
    assert OptimSpec(steps=7).length(100) == 7
    assert OptimSpec(epochs=2, accumulate=3).length(10) == 7
    assert OptimSpec().length(10) == 10
    with pytest.raises(ValidationError, match="both"):
        OptimSpec(steps=1, epochs=1)


def test_masters_sum_bf16_gradients_in_float32() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters([("w", weight)])
    for scale in (1.0, 2**-10):  # the second vanishes in a bfloat16 sum
        (weight * scale).sum().backward()
    (gradient,) = masters.gradients()
    assert gradient.dtype == torch.float32 and torch.equal(gradient, torch.full((4,), 1 + 2**-10))
    assert weight.grad is None


def test_small_updates_are_not_lost_to_bf16() -> None:
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    masters = Masters([("w", weight)])
    optimizer = build(OptimSpec(lr=1e-4), masters)
    for _ in range(100):
        masters.zero()
        weight.sum().backward()
        optimizer.step()
        masters.publish()
    assert masters.masters["w"].item() == pytest.approx(0.99, abs=1e-4)
    assert weight.item() == pytest.approx(0.99, abs=2**-8)


def test_decay_spares_vectors() -> None:
    masters = Masters([("m", nn.Parameter(torch.ones(2, 2))), ("v", nn.Parameter(torch.ones(2)))])
    groups = build(OptimSpec(weight_decay=0.1), masters).param_groups
    assert {g["params"][0].ndim: g["weight_decay"] for g in groups} == {2: 0.1, 1: 0.0}


def test_norm_is_that_of_all_together() -> None:
    assert norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5.0)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code_has_256_values_and_bounded_error(signed: bool) -> None:
    code = dynamic_code(signed)
    assert len(code.unique()) == 256 and code.max() == 1 and code.min() == pytest.approx(-0.99296875 if signed else 0)
    values = torch.randn(1000) if signed else torch.rand(1000) ** 4
    again = dequantize(*quantize(values, signed), signed, values)
    nearest = (values[:, None] / _scales(values)[:, None] - code[None]).abs().argmin(1)
    assert torch.allclose(again, code[nearest] * _scales(values), atol=1e-7), (
        "every value goes to the nearest of the code"
    )


def _scales(values: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
    return padded.abs().amax(1).repeat_interleave(256)[: len(values)]


def test_adamw8bit_follows_adamw() -> None:
    torch.manual_seed(0)
    target = torch.randn(128, 64)
    ends = []
    for kind in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.zeros(128, 64))
        masters = Masters([("w", weight)])
        optimizer = build(OptimSpec(kind=kind, lr=0.02, weight_decay=0.01), masters)
        for _ in range(150):
            weight.grad = weight.detach() - target
            optimizer.step()
        ends.append(weight.detach().clone())
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 0.02
    state = optimizer.state[weight]
    assert state["exp_avg_codes"].dtype == torch.uint8 and state["exp_avg_sq_codes"].dtype == torch.uint8


def test_adamw8bit_is_exact_for_small_tensors() -> None:
    torch.manual_seed(0)
    one, two = (nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours = AdamW8bit([one], lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    theirs = torch.optim.AdamW([two], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(20):
        for weight, optimizer in ((one, ours), (two, theirs)):
            weight.grad = weight.detach() ** 3
            optimizer.step()
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_what_a_search_finds(signed: bool) -> None:
    code = adam8bit.dynamic_code(signed)
    middles = (code[1:] + code[:-1]) / 2
    patterns = torch.arange(-(1 << 31), 1 << 31, 9973).to(torch.int32).view(torch.float32)
    beside = [torch.nextafter(middles, torch.tensor(to)) for to in (2.0, -2.0)]
    values = torch.cat([patterns, middles, *beside, code])
    values = values[values.isfinite() & (values.abs() <= 1) & ((values >= 0) | signed)]
    assert len(values) > 100_000
    assert torch.equal(adam8bit.nearest(values, signed).long(), torch.bucketize(values, middles))


@pytest.mark.parametrize("make", [OptimSpec, AdaLoRA], ids=lambda c: c.__name__)
@pytest.mark.parametrize("betas", [(0.9, 1.5), (1.0, 0.9), (-0.1, 0.9)])
def test_a_moving_average_keeps_a_share_of_what_was(make: Any, betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="betas"):
        make(betas=betas)
