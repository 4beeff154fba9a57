"""Grids: the numbers that a group of values is rounded to. Every quantizer, of weights, activations or caches, is built on these.

    x ~ s (l[q] - z)      q code in 0..2^b - 1,  l the levels,  s scale and z zero of the value's group

    levels     l                                                                s                z
    int        q - 2^(b-1), symmetric; q, not symmetric                         half or whole    none; integer in 0..2^b - 1
    normal     quantiles of a normal distribution in [-1, 1], 0 among them      of the range     none; real
    dynamic    8 bits, dense near 0: seven orders of magnitude in a byte        max |x|          none

normal: NormalFloat, Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), for any number of bits. dynamic: Dettmers et al. 2021
(arXiv 2110.02861). Ranges: min-max; the one of the least squared error (as in GPTQ, arXiv 2210.17323); a percentile.

A group is a run of L values of the tensor, flattened in row-major order: of one row ('row': an output channel of a weight
[N, K], or a token of activations [.., K]), a part of one, or the whole ('tensor'). For a range a column, transpose first.

Shapes: n values, L values a group, G groups, b bits. Codes are uint8; arithmetic is in float32, or float64 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fettle.core.errors import FettleError
from fettle.core.spec import Spec

RATIOS = 76  # ranges that the search for the least error tries: 1, 79/80, .. 5/80 of min-max
# NF4 as its authors published it, in float32; the formula of `_normal` agrees to 1e-7 but not to the last bit.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Grid(Spec):
    """The levels, how many values share a range, and how the range is found."""

    levels: Literal["int", "normal", "dynamic"] = "int"
    bits: int = Field(default=4, ge=2, le=8)
    symmetric: bool = True
    narrow: bool = Field(default=False, description="int, symmetric: leave out the lowest code, so that -x mirrors x")
    group: int | Literal["tensor", "row"] = Field(default="row", description="values that share a range")
    range: Literal["minmax", "mse", "percentile"] = "minmax"
    percentile: float = Field(default=99.9, gt=50, le=100, description="of the values, with range: percentile")
    scale: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="how scales are stored")

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        if isinstance(self.group, int) and self.group < 1:
            raise ValueError(f"group: {self.group} values cannot share a range; give 1 or more, 'row' or 'tensor'")
        if self.levels == "dynamic" and (self.bits != 8 or not self.symmetric):
            raise ValueError("levels: 'dynamic' has 8 bits and is symmetric")
        if self.narrow and (self.levels != "int" or not self.symmetric):
            raise ValueError("narrow: is for levels: int with symmetric: true; leave it out")
        return self

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in."""
        return getattr(torch, self.scale)  # type: ignore[no-any-return]


# Levels.


@contextmanager
def lasting() -> Iterator[None]:
    """Within it, tensors that a cache will hold are real ones on the CPU, whatever mode or device the caller is in."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield


def levels(grid: Grid) -> Tensor:
    """l: float32 [2^b], in ascending order."""
    return _levels(grid.levels, grid.bits, grid.symmetric)


@cache
def _levels(kind: str, bits: int, symmetric: bool) -> Tensor:
    with lasting():
        if kind == "normal":
            return _normal(bits)
        if kind == "dynamic":
            return dynamic(signed=True)
        return torch.arange(2**bits, dtype=torch.float32) - (2 ** (bits - 1) if symmetric else 0)


def _normal(bits: int) -> Tensor:
    """2^(b-1) quantiles above 0, 2^(b-1) - 1 below, and 0; the outermost at the mean of the two halves' own ends."""
    if bits == 4:
        return torch.tensor(NF4)
    half = 2 ** (bits - 1)
    end = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, half, dtype=torch.float64)[:-1])
    return (torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()).float()


def dynamic(signed: bool) -> Tensor:
    """256 values in [-1, 1] (or [0, 1]): an exponent of base ten in unary, the other bits split its interval evenly."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middle = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middle + ([-x for x in middle] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


# Groups.


def group_length(shape: tuple[int, ...], grid: Grid, across_rows: bool = False) -> int:
    """L of a tensor; FettleError where groups do not divide a row. `across_rows`: then they run on into the next."""
    if grid.group == "tensor":
        return max(1, math.prod(shape))
    if grid.group == "row":
        return max(1, shape[-1])
    if shape[-1] % grid.group and not across_rows:
        near = [d for d in range(1, shape[-1] + 1) if shape[-1] % d == 0]
        best = min(near, key=lambda d: abs(d - grid.group))  # type: ignore[operator]
        raise FettleError(f"group: {grid.group} does not divide rows of {shape[-1]} values; choose {best}, or 'row'")
    return grid.group


def split(x: Tensor, length: int) -> list[Tensor]:
    """Views [G, L] and, where the values do not fill the last group, [1, rest]."""
    flat = x.reshape(-1)
    full = flat.numel() // length * length
    return [part for part in (flat[:full].view(-1, length), flat[full:].view(1, -1)) if part.numel()]


# Ranges, codes and values of groups [G, L], with scale and zero [G, 1].


def fit(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of each group, the scale rounded to what it is stored in."""
    if grid.symmetric and grid.range == "minmax":
        wide = torch.promote_types(x.dtype, torch.float32)
        return _spread(x.abs().amax(1, keepdim=True).to(wide), grid), None
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if grid.range == "percentile":
        low, high = _percentile(x, grid)
    if grid.range != "mse":
        return affine(low, high, grid)
    return search(low, high, grid, lambda scale, zero: errors(x, scale, zero, grid).sum(1, keepdim=True))


def search(low: Tensor, high: Tensor, grid: Grid, error: Callable[..., Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of the part of [low, high] with the least error; all [G, 1], as `error(scale, zero)` is."""
    best = affine(low, high, grid)
    least = error(*best)
    for i in range(1, RATIOS):
        tried = affine(low * (1 - i / 80), high * (1 - i / 80), grid)
        found = error(*tried)
        better = found < least
        least = torch.where(better, found, least)
        zero = None if best[1] is None or tried[1] is None else torch.where(better, tried[1], best[1])
        best = torch.where(better, tried[0], best[0]), zero
    return best


def _percentile(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """By nearest rank: of |x| where the grid is symmetric, else of both ends."""
    length = x.shape[1]
    rank = min(length, max(1, math.ceil(length * grid.percentile / 100)))
    if grid.symmetric:
        high = x.abs().kthvalue(rank, 1, keepdim=True).values
        return -high, high
    return x.kthvalue(length + 1 - rank, 1, keepdim=True).values, x.kthvalue(rank, 1, keepdim=True).values


def errors(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The squared error of each value."""
    return (snapped(x, scale, zero, grid) - x).square_()


def affine(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero) that lay a grid over [low, high]; a range that is not symmetric is widened to hold 0.

    With int levels a symmetric range covers half a step beyond its ends, as all 2^b codes are used and 0 is one of them.
    """
    wide = torch.promote_types(low.dtype, torch.float32)
    low, high = low.to(wide), high.to(wide)
    if grid.symmetric:
        return _spread(torch.maximum(low.abs(), high.abs()), grid), None
    low, high = low.clamp_max(0), high.clamp_min(0)
    most = 2.0**grid.bits - 1
    scale = ((high - low) / (most if grid.levels == "int" else 2.0)).to(grid.scale_dtype).to(wide)
    if grid.levels == "int":
        return scale, (-low / _divisor(scale)).round_().clamp_(0, most)
    return scale, (-(high + low) / 2 / _divisor(scale)).to(grid.scale_dtype).to(wide)


def _spread(most: Tensor, grid: Grid) -> Tensor:
    """The scale of a symmetric grid that reaches +-most."""
    half = {"int": 2 ** (grid.bits - 1) - (1.0 if grid.narrow else 0.5)}.get(grid.levels, 1.0)
    return (most / half).to(grid.scale_dtype).to(most.dtype)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest code of each value, uint8."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, scale = x.to(wide), _divisor(scale.to(wide))
    if grid.levels == "int":
        middle = 2.0 ** (grid.bits - 1) if zero is None else zero.to(wide)
        return (x / scale).round_().add_(middle).clamp_(float(grid.narrow), 2.0**grid.bits - 1).to(torch.uint8)
    unit = x * scale.reciprocal()  # as the reference does, so that codes agree at the last bit
    unit = unit if zero is None else unit.add_(zero.to(wide))
    table = levels(grid).to(x.device)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(unit, middles.to(wide), out_int32=True).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The values of codes, in the dtype of the scale, float32 at least."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    units = levels(grid).to(codes.device, wide)[codes.int()]
    units = units if zero is None else units.sub_(zero.to(wide))
    return units.mul_(scale.to(wide))


def snapped(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The nearest value of the grid: `decode` of `encode`, bit for bit, of integers without the codes in between."""
    if grid.levels != "int":
        return decode(encode(x, scale, zero, grid), scale, zero, grid)
    wide = torch.promote_types(x.dtype, torch.float32)
    middle = 2.0 ** (grid.bits - 1) if zero is None else zero.to(wide)
    units = (x.to(wide) / _divisor(scale.to(wide))).round_().add_(middle)
    units = units.clamp_(float(grid.narrow), 2.0**grid.bits - 1).sub_(middle)
    return units.to(torch.promote_types(scale.dtype, torch.float32)).mul_(scale)


def _divisor(scale: Tensor) -> Tensor:
    return scale.clamp_min(1e-38)  # a group of zeros has scale 0
