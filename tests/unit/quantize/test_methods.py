"""The mathematics of AWQ, HQQ, SmoothQuant, LLM.int8 and ZeroQuant, without a model."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.quantize import AWQ, HQQ, Activations, Grid, LLMInt8
from fettle.quantize.awq import awq_scale, bar, clipped
from fettle.quantize.hqq import hqq, shrink
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.llm_int8 import llm_int8
from fettle.quantize.moments import Moments, Watch, output_error
from fettle.quantize.packed import assemble, blank, quantize, unpack
from fettle.quantize.smoothquant import smooth

GRID = Grid(bits=3, symmetric=False, group=32)


def inputs(tokens: int = 600, k: int = 64, outliers: tuple[int, ...] = (3, 17, 40)) -> Tensor:
    """[T, K], correlated, a few channels far larger than the rest."""
    torch.manual_seed(0)
    x = torch.randn(tokens, k) @ torch.randn(k, k) / k**0.5
    x[:, list(outliers)] *= 20
    return x


def weight(n: int = 48, k: int = 64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, k) * 0.05


# Moments.


def test_moments_are_those_of_all_tokens_whatever_the_calls() -> None:
    x = inputs()
    watch = Watch(second=True, observe=True, rows=100)
    watch.see(x[:200].view(2, 100, 64))
    watch.see(x[200:])
    seen = watch.moments(64, x.device)
    assert seen.count == 600 and seen.second is not None and seen.observer is not None
    assert torch.allclose(seen.second, x.T @ x / 600, rtol=1e-4, atol=1e-4)
    assert torch.allclose(seen.mean, x.abs().mean(0), rtol=1e-5) and torch.equal(seen.peak, x.abs().amax(0))
    assert all((x == row).all(1).any() for row in seen.rows) and len(seen.rows) == 200
    assert seen.observer.high == float(x.max())


def test_the_output_error_is_known_from_the_moments_alone() -> None:
    x, w = inputs().double(), weight().double()
    other = quantize(w, GRID).values(torch.float64)
    direct = (x @ (w - other).T).square().mean(0)
    assert torch.allclose(output_error(w, other, x.T @ x / len(x)), direct)
    scale = torch.rand(64, dtype=torch.float64) + 0.5
    seen = Moments(len(x), x.abs().mean(0), x.abs().amax(0), x[:5], x.T @ x / len(x)).scaled(scale)
    assert torch.allclose(output_error(w * scale, other * scale, seen.second), direct)  # type: ignore[arg-type]
    assert torch.allclose(seen.peak, (x / scale).abs().amax(0))


def test_a_layer_that_saw_nothing_has_moments_of_nothing() -> None:
    seen = Watch(True, False, 8).moments(6, torch.device("cpu"))
    assert seen.count == 0 and seen.rows.shape == (0, 6) and seen.second is not None and not seen.second.any()


# Packing codes that were found elsewhere.


@pytest.mark.parametrize("grid", [Grid(bits=3, group=16), GRID, Grid(levels="normal", group=16), Grid(bits=5, group="tensor")], ids=str)  # fmt: skip
def test_assembled_and_blank_have_the_layout_of_quantize(grid: Grid) -> None:
    w = weight()
    packed = quantize(w, grid)
    scale = packed.scale
    assert isinstance(scale, Tensor)
    zero = packed.zero
    if zero is not None and zero.dtype == torch.uint8:
        zero = unpack(zero, grid.bits, scale.numel()).float()
    again = assemble(unpack(packed.codes, grid.bits, packed.count).view(w.shape), scale, zero, grid)
    assert torch.equal(again.values(), packed.values()) and again.length == packed.length
    empty = blank(tuple(w.shape), grid)
    assert {k: (t.shape, t.dtype) for k, t in empty.tensors().items()} == {k: (t.shape, t.dtype) for k, t in packed.tensors().items()}  # fmt: skip
    assert empty.values().isnan().all()
    assert torch.equal(empty.holding(packed.tensors()).values(), packed.values())


# AWQ.


def test_awq_scales_lower_the_error_where_few_channels_are_large() -> None:
    x, w = inputs(), weight()
    second = x.T @ x / len(x)

    def error(scale: Tensor) -> float:
        return float(output_error(w, quantize(w * scale, GRID).values() / scale, second).sum())

    scale, least = awq_scale(x.abs().mean(0), error)
    plain = error(torch.ones(64))
    print(f"awq: {least / plain:.2f} of round to nearest's output error")
    assert least == pytest.approx(error(scale)) and least < 0.6 * plain
    assert float((scale.max() * scale.min()).sqrt()) == pytest.approx(1, rel=1e-4)
    weighted = awq_scale(x.abs().mean(0), error, bars=bar([w], GRID))[1]
    assert weighted < 0.9 * plain
    flat, same = awq_scale(torch.ones(64), error)
    assert torch.allclose(flat, torch.ones(64)) and same == pytest.approx(plain)


def test_awq_keeps_no_scale_that_is_worse_than_none() -> None:
    scale, least = awq_scale(torch.rand(8) + 0.1, lambda s: float((s - 1).abs().sum()))
    assert torch.equal(scale, torch.ones(8)) and least == 0


@pytest.mark.parametrize("grid", [GRID, Grid(bits=2, group=16), Grid(bits=3), Grid(bits=3, levels="normal", group=32)], ids=str)  # fmt: skip
def test_clipping_takes_for_each_group_the_best_of_its_ranges(grid: Grid) -> None:
    x, w = inputs(), weight() * torch.distributions.StudentT(3.0).sample((48, 64))
    second = x.T @ x / len(x)
    length = 64 if grid.group == "row" else int(grid.group)

    def by_group(values: Tensor) -> Tensor:
        parts = [x[:, i : i + length] @ (values - w)[:, i : i + length].T for i in range(0, 64, length)]
        return torch.stack([part.square().mean(0) for part in parts], 1)  # [N, G]

    found, nearest = clipped(w, second, grid), quantize(w, grid)
    assert (by_group(found.values()) <= by_group(nearest.values()) * 1.0001 + 1e-9).all()
    assert by_group(found.values()).sum() < 0.95 * by_group(nearest.values()).sum()
    assert torch.equal(clipped(w, second, grid, steps=1).values(), nearest.values())


# HQQ.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_lowers_the_heavy_tailed_error_of_every_group(bits: int) -> None:
    w = weight() * torch.distributions.StudentT(4.0).sample((48, 64))
    grid = Grid(bits=bits, symmetric=False, group=32)

    def error(values: Tensor) -> Tensor:
        return (values - w).abs().pow(0.7).view(-1, 32).mean(1)

    found, nearest = hqq(w, grid), quantize(w, grid)
    assert found.zero is not None and found.zero.is_floating_point()
    ends = torch.stack([w.view(-1, 32).amin(1), w.view(-1, 32).amax(1)])
    across = (ends[0] <= 0) & (ends[1] >= 0)  # elsewhere the two ranges differ
    assert across.float().mean() > 0.9
    assert (error(found.values())[across] <= error(nearest.values())[across] * 1.001).all()
    share = float(error(found.values()).sum() / error(nearest.values()).sum())
    print(f"hqq, {bits} bits: {share:.3f} of round to nearest's |error|^0.7")
    assert share < 1
    assert torch.equal(hqq(1024 * w, grid).values(), 1024 * found.values()), "no matter the weights' size"


def test_hqq_gives_back_groups_of_one_value_and_refuses_damage() -> None:
    grid = Grid(bits=4, symmetric=False, group=32)
    assert torch.allclose(hqq(torch.full((2, 64), 3.7), grid).values(), torch.full((2, 64), 3.7))
    with pytest.raises(FettleError, match="not finite"):
        hqq(torch.full((2, 64), torch.nan), grid)
    with pytest.raises(FettleError, match="does not divide rows of 60"):
        hqq(torch.zeros(2, 60), grid)
    with pytest.raises(ValidationError, match="symmetric: false"):
        HQQ(grid=Grid(bits=4))
    with pytest.raises(ValidationError, match="range: minmax"):
        AWQ(grid=Grid(bits=4, range="mse"))


def test_shrink_solves_its_problem_where_it_does_not_give_zero() -> None:
    p, beta = 0.7, 10.0
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    found = shrink(x, p, beta)
    assert torch.equal(found, -shrink(-x, p, beta)) and (found.abs() <= x.abs()).all()
    exact = shrink(x, 1.0, beta)  # at p = 1 it is the soft threshold 1 / beta
    assert torch.allclose(exact, x.sign() * (x.abs() - 0.1).clamp_min(0))


# SmoothQuant.


def test_smoothing_changes_no_product_and_halves_the_difficulty() -> None:
    x, w = inputs().double(), weight().double()
    scale = smooth(x.abs().amax(0), [w, 2 * w])
    assert torch.allclose((x / scale) @ (w * scale).T, x @ w.T)
    smoothed, widest = (x / scale).abs().amax(0), (2 * w * scale).abs().amax(0)
    assert torch.allclose(smoothed, widest), "alpha 0.5 makes both equally wide"
    grid = Activations(bits=8)

    def error(a: Tensor, b: Tensor) -> float:
        rounded = quantize(a, grid).values(torch.float64) @ quantize(b, Grid(bits=8)).values(torch.float64).T
        return float((rounded - x @ w.T).square().mean())

    share = error(x / scale, w * scale) / error(x, w)
    print(f"smoothquant, W8A8: {share:.2f} of the output error without it")
    assert share < 0.5
    assert torch.equal(smooth(torch.zeros(4), [torch.ones(2, 4)]), torch.ones(4))
    assert torch.allclose(smooth(x.abs().amax(0), [w], 0.0), 1 / w.abs().amax(0))


# LLM.int8.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_computes_the_papers_product(dtype: torch.dtype) -> None:
    x, edit = inputs(9).to(dtype), LLMInt8()
    base = nn.Linear(64, 48).to(dtype).requires_grad_(False)
    layer = QuantizedLinear(base, edit.quantize(base.weight), edit, None, edit.activations)
    wanted = llm_int8(x, base.weight) + base.bias.float()
    assert ((x.abs() >= 6).any(0)).sum() >= 2
    assert torch.allclose(
        layer(x).float(), wanted, atol=2e-5 if dtype == torch.float32 else 2e-2 * float(wanted.abs().max())
    )


def test_outliers_in_full_precision_save_the_rest_of_the_row() -> None:
    x, w = inputs(), weight()
    exact = x @ w.T

    def error(y: Tensor) -> float:
        return float((y - exact).square().mean())

    with_them, without = error(llm_int8(x, w)), error(llm_int8(x, w, threshold=1e9))
    print(f"llm_int8: {with_them / without:.3f} of the output error of plain W8A8")
    assert with_them < 0.3 * without


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    x, w = inputs(20), weight()
    assert torch.allclose(llm_int8(x, w)[:1], llm_int8(x[:1], w), atol=1e-5)
