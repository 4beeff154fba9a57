"""GPTQ against its closed form, against every answer there is, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.gptq import gptq, inverse_factor
from fettle.quantize.grid import Grid, decode, encode, fit
from fettle.quantize.moments import output_error
from fettle.quantize.packed import quantize

GRIDS = [
    Grid(bits=4, symmetric=False, group=32),
    Grid(bits=3),
    Grid(bits=2, group=16, symmetric=False, range="mse"),
    Grid(bits=4, levels="normal", group=32),
    Grid(bits=4, group="tensor"),
]


def problem(n: int, k: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs that are correlated and have channels of uneven size; float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (draw(tokens, k) @ draw(k, k) / k**0.5 + draw(tokens, 1) @ draw(1, k)) * (2 * draw(k)).exp()
    return draw(n, k), x.T @ x / tokens


def total(weight: Tensor, other: Tensor, second: Tensor) -> float:
    return float(output_error(weight, other, second).sum())


def closed_form(weight: Tensor, hessian: Tensor, grid: Grid, order: list[int], damp: float) -> Tensor:
    """Column by column: what is left becomes the least-squares answer to all that was rounded, solved anew each time."""
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    scale, zero = fit(weight, grid)
    found, left = weight.clone(), weight.clone()
    for done, column in enumerate(order):
        column_scale = scale
        codes = encode(left[:, [column]], column_scale, zero, grid)
        found[:, column] = decode(codes, column_scale, zero, grid)[:, 0]
        rest, fixed = order[done + 1 :], order[: done + 1]
        if rest:
            # d/dv of (v - w) H (v - w)' = 0 for v on `rest`, with v on `fixed` as found
            apart = found[:, fixed] - weight[:, fixed]
            left[:, rest] = (
                weight[:, rest] - torch.linalg.solve(damped[rest][:, rest], damped[rest][:, fixed] @ apart.T).T
            )
    return found


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("k", [6, 24, 150])  # 150: more than a block of columns
def test_it_is_the_least_squares_answer_of_each_step(act_order: bool, k: int) -> None:
    weight, hessian = problem(5, k, 400)
    grid = Grid(bits=3)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(k))
    found = gptq(weight, hessian, grid, act_order, damp=0.01).values(torch.float64)
    assert torch.allclose(found, closed_form(weight, hessian, grid, order, 0.01), atol=1e-6)


def test_it_lies_between_every_answer_and_rounding_to_nearest() -> None:
    grid = Grid(bits=2)
    over: dict[str, list[float]] = {"gptq": [], "nearest": []}
    for seed in range(40):
        weight, hessian = problem(1, 5, 200, seed)
        scale, zero = fit(weight, grid)
        levels = decode(torch.arange(4, dtype=torch.uint8)[None], scale, zero, grid)[0].double()
        answers = torch.cartesian_prod(*[levels] * 5)
        best = float(output_error(weight, answers, hessian).min())
        made = {"gptq": gptq(weight, hessian, grid, damp=1e-9), "nearest": quantize(weight, grid)}
        for name, packed in made.items():
            over[name].append(total(weight, packed.values(torch.float64), hessian) / best)
    assert min(over["gptq"]) > 1 - 1e-9 and over["gptq"].count(min(over["gptq"])) >= 1
    median = {name: sorted(values)[20] for name, values in over.items()}
    exact = sum(value < 1 + 1e-9 for value in over["gptq"])
    print(f"over the best of all 1024 answers, median: {median}; gptq is the best itself in {exact} of 40")
    assert median["gptq"] < 1.2 and median["nearest"] > 1.35 and exact >= 5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_its_output_error_is_under_that_of_rounding_to_nearest(grid: Grid, act_order: bool) -> None:
    weight, hessian = problem(48, 96, 1000)
    packed = gptq(weight.float(), hessian, grid, act_order)
    nearest = quantize(weight.float(), grid)
    share = total(weight, packed.values(torch.float64), hessian) / total(weight, nearest.values(torch.float64), hessian)
    print(f"{grid.levels} {grid.bits} bits, group {grid.group}: {share:.2f} of round to nearest's error")
    assert share < 0.5
    assert packed.grid == grid and packed.length == nearest.length
    assert {k: (t.shape, t.dtype) for k, t in packed.tensors().items()} == {k: (t.shape, t.dtype) for k, t in nearest.tensors().items()}  # fmt: skip


def test_static_groups_are_those_of_the_weight_as_it_was() -> None:
    weight, hessian = problem(8, 64, 300)
    grid = Grid(bits=4, group=16, symmetric=False)
    ordered, plain = gptq(weight, hessian, grid), gptq(weight, hessian, grid, act_order=False)
    nearest = quantize(weight, grid)
    assert torch.equal(ordered.scale, nearest.scale) and torch.equal(ordered.zero, nearest.zero)  # type: ignore[arg-type]
    assert not torch.equal(plain.scale, nearest.scale)  # type: ignore[arg-type]


def test_without_correlation_there_is_nothing_to_make_up_for() -> None:
    weight, _ = problem(8, 32, 10)
    assert torch.equal(gptq(weight, torch.eye(32), Grid(bits=4)).codes, quantize(weight, Grid(bits=4)).codes)


def test_the_scale_of_the_moment_does_not_matter_and_dead_inputs_have_no_say() -> None:
    weight, hessian = problem(8, 32, 300)
    grid = Grid(bits=3)
    assert torch.equal(gptq(weight, hessian, grid).codes, gptq(weight, 1024 * hessian, grid).codes)
    hessian[[3, 9]], hessian[:, [3, 9]] = 0, 0
    assert torch.equal(gptq(weight, hessian, grid).codes, gptq(weight, 2.0**-30 * hessian, grid).codes)
    assert torch.equal(gptq(weight, 0 * hessian, grid).values(), quantize(weight, grid).values())
    found, nearest = gptq(weight, hessian, grid).values(), quantize(weight, grid).values()
    assert torch.equal(found[:, [3, 9]], nearest[:, [3, 9]]) and not torch.equal(found, nearest)


def test_damping_is_raised_and_then_there_is_an_end() -> None:
    _, hessian = problem(1, 8, 50)
    factor = inverse_factor(hessian, 0.01, 1.0)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(8, dtype=torch.float64), atol=1e-6)
    assert torch.equal(factor, factor.triu())
    flipped = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    assert torch.linalg.eigvalsh(flipped).min() < 0
    inverse_factor(flipped, 0.01, 1.0)  # 0.1 is enough
    with pytest.raises(FettleError, match="not positive definite, with damping up to 0.01"):
        inverse_factor(flipped, 0.01, 0.01)
    with pytest.raises(FettleError, match="not finite"):
        inverse_factor(hessian * torch.nan, 0.01, 1.0)
