"""Rounded activations: against the formula, by token and by tensor, static ranges, gradients, and what an observer finds."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from fettle.core.errors import FettleError
from fettle.quantize import RTN, Activations, Grid
from fettle.quantize.activations import ranges, reached, rounded
from fettle.quantize.grid import fit
from fettle.quantize.observe import BINS, Observer
from fettle.quantize.packed import fake


def tokens(seed: int = 0) -> torch.Tensor:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0, 0, 3] = 40.0  # an outlier in one token
    return x


def test_by_default_each_token_has_its_own_8_bits() -> None:
    x, grid = tokens(), Activations()
    most = x.abs().amax(-1, keepdim=True)
    scale = (most / 127.5).float().double()
    assert torch.equal(rounded(x, grid), (x / scale).round().clamp(-128, 127) * scale)
    assert torch.equal(rounded(x, grid)[1], rounded(x[1], grid)), "what shares a batch does not matter"
    assert not torch.equal(rounded(x, Activations(group="tensor"))[1], rounded(x[1], Activations(group="tensor")))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", ["row", "tensor", 8])
def test_it_is_the_grid_of_weights_for_inputs(bits: int, symmetric: bool, group: str | int) -> None:
    grid = Activations(bits=bits, symmetric=symmetric, group=group)
    x = tokens().float()
    assert torch.equal(rounded(x, grid), fake(x, grid))


def test_a_static_range_is_one_and_clips() -> None:
    grid = Activations(group="tensor", static=True, symmetric=False)
    held = torch.tensor(0.1), torch.tensor(100.0)
    x = torch.tensor([[-11.0, -10.0, 0.04, 0.06, 15.5, 16.0]])
    assert torch.allclose(rounded(x, grid, held), torch.tensor([[-10.0, -10.0, 0.0, 0.1, 15.5, 15.5]]))
    assert reached(x, grid, held).tolist() == [[False, True, True, True, True, False]]
    with pytest.raises(ValidationError, match="group: tensor"):
        Activations(static=True)


def test_the_gradient_passes_where_nothing_was_clipped() -> None:
    x = tokens().requires_grad_(True)
    up = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(rounded(x, Activations()), x, up)[0], up)
    for grid, held in (
        (Activations(group="tensor", static=True), (torch.tensor(1 / 127.5), None)),
        (Activations(range="percentile", percentile=80.0), None),
    ):
        (grad,) = torch.autograd.grad(rounded(x, grid, held), x, up)
        mask = reached(x.detach(), grid, held)
        assert torch.equal(grad, up * mask) and 0 < float(mask.double().mean()) < 1


def test_outliers_stay_as_they_are_and_out_of_the_range() -> None:
    x = tokens()
    found = rounded(x, Activations(outliers=6.0))
    assert found[0, 0, 3] == 40.0
    rest = x.masked_fill(x.abs() >= 6.0, 0)
    assert torch.equal(found.masked_fill(x.abs() >= 6.0, 0), rounded(rest, Activations()))


def test_outliers_and_a_held_range_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="leave out static, or outliers"):
        Activations(group="tensor", static=True, outliers=6.0)


def test_a_percentile_or_the_least_error_spares_the_small_from_the_large() -> None:
    x = tokens()[:1, :1].float()
    inner = x.abs() < 10
    errors = {
        r: (rounded(x, Activations(bits=4, range=r, percentile=93.0)) - x)[inner].norm()
        for r in ("minmax", "percentile")
    }
    assert errors["percentile"] < 0.5 * errors["minmax"]


# Observers.


def test_min_max_is_exact_over_batches_of_any_size() -> None:
    observer, batches = Observer(), [tokens(i).float() * 10.0 ** (i - 2) for i in range(5)]
    for batch in batches:
        observer.see(batch)
    whole = torch.cat([b.reshape(-1) for b in batches]).view(1, -1)
    for symmetric in (True, False):
        grid = Activations(symmetric=symmetric, group="tensor", static=True)
        for one, two in zip(observer.range(grid), fit(whole, grid), strict=True):
            assert one is two is None or torch.equal(one, two)
    assert int(observer.counts.sum()) == whole.numel()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range", ["percentile", "mse"])
def test_other_ranges_are_those_of_the_values_up_to_a_bin(range: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40_000, generator=generator) + (0.0 if symmetric else 0.7)
    x[0, :20] *= 8
    grid = Activations(bits=4, group="tensor", static=True, range=range, percentile=99.0, symmetric=symmetric)
    observer = Observer()
    for part in x.split(7_000, 1):
        observer.see(part)
    scale, zero = observer.range(grid)
    wanted, wanted_zero = fit(x, grid)
    width = 2 * observer.reach / BINS
    steps = 2**grid.bits - 1
    assert abs(float(scale - wanted)) * steps <= (2.1 * width if range == "percentile" else float(wanted) * steps / 40)
    assert zero is None or abs(float(zero - wanted_zero)) <= 1  # type: ignore[operator]


def test_an_observer_that_saw_nothing_or_nonsense_says_so() -> None:
    with pytest.raises(FettleError, match="no value was seen"):
        Observer().range(Activations())
    with pytest.raises(FettleError, match="not finite"):
        Observer().see(torch.tensor([1.0, torch.inf]))
    observer = Observer()
    observer.see(torch.zeros(4))
    observer.see(torch.zeros(0))
    assert float(observer.range(Activations())[0]) == 0.0


def test_a_recipe_names_it_in_an_edit() -> None:
    edit = RTN.model_validate({"grid": {"bits": 8}, "activations": {"symmetric": False}})
    assert edit.activations == Activations(symmetric=False) and RTN().activations is None
    assert Grid(bits=8) == RTN().grid
    assert ranges(tokens(), Activations())[0].shape == (10, 1)
