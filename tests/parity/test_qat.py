"""Rounding with a gradient against torch's own fake quantization, values and gradients."""

from __future__ import annotations

import pytest
import torch

from fettle.quantize.activations import rounded
from fettle.quantize.grid import Grid, fit


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("range_", ["minmax", "percentile"])
def test_a_row_at_a_time_it_is_torchs(bits: int, symmetric: bool, range_: str) -> None:
    grid = Grid(bits=bits, symmetric=symmetric, range=range_, percentile=85)
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 40, generator=generator)
    scale, zero = fit(weight, grid)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    origin = torch.zeros(24, dtype=torch.int32) if zero is None else zero[:, 0].int()
    up = torch.randn(24, 40, generator=generator)
    mine, theirs = (weight.clone().requires_grad_() for _ in range(2))
    rounded(mine, grid).backward(up)
    torch.fake_quantize_per_channel_affine(theirs, scale[:, 0], origin, 0, low, high).backward(up)
    with torch.no_grad():
        one, two = (
            rounded(weight, grid),
            torch.fake_quantize_per_channel_affine(weight, scale[:, 0], origin, 0, low, high),
        )
    assert mine.grad is not None and theirs.grad is not None
    # torch multiplies with 1 / s, which may send a value that lies between two levels to the other one, and rounds the end of a
    # min-max range, half a step beyond the last level, to a level that is not there
    units = weight / scale + (0 if zero is None else zero)
    tie = ((units - units.floor() - 0.5).abs() < 1e-4) | ((units - high - 0.5).abs() < 1e-3)
    assert tie.float().mean() < 0.05
    assert torch.allclose(one[~tie], two[~tie], rtol=1e-6) and torch.equal(mine.grad[~tie], theirs.grad[~tie])
    assert (mine.grad == 0).any() == (range_ == "percentile")
