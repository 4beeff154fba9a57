"""GPTQ: round a layer's columns one by one, those that are left make up for each error (arXiv 2210.17323).

    minimise over Q:  tr (W - Q) H (W - Q)',     H = mean x x' of the layer's input x
    for each column j in order:   q_j = grid(w_j),   e = (w_j - q_j) / U_jj,   w_k <- w_k - e U_jk  for all k > j

with U the upper Cholesky factor of the inverse of H + d I, d = damp * mean(diag H). The update is the exact
least-squares answer of the columns that are left to the error of the one that was rounded (Optimal Brain Surgeon).

Act-order: columns in the order of falling diag H, so that those that weigh most are rounded while all others can still
help. Its grids are static: found on the weight as it was, so that groups stay runs of a row and inference needs no
reordering. Without it a group's grid is found when its first column is reached, on the weight as it is then.

An input that is 0 on all of the text has no say in the objective: its column is rounded to nearest. Where H + d I is
not positive definite, d is raised tenfold up to the greatest damping; beyond it the layer is rounded to nearest, and
that is said aloud.

Shapes: W [N, K], H [K, K], U [K, K].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.quantize.activations import Activations
from fettle.quantize.calibrate import Calibration, Unit, needs_text
from fettle.quantize.grid import Grid, decode, encode, fit, group_length
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.moments import Moments
from fettle.quantize.packed import Quantized, assemble, blank, quantize

BLOCK = 128  # columns whose updates of the rest are applied at once


class GPTQ(Edit):
    """Hold linear layers on a grid, rounded so that their outputs on a text change little; nothing trains."""

    role = "quantizes"
    calibrated: ClassVar[bool] = True
    loftq: ClassVar[None] = None
    kind: Literal["gptq"] = "gptq"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Grid(bits=4, symmetric=False, group=128, scale="float16")
    activations: Activations | None = Field(default=None, description="round what the layers are given, too")
    act_order: bool = Field(default=True, description="columns by falling diag H, on static grids")
    damp: float = Field(default=0.01, gt=0, description="added to diag H, as a share of its mean")
    most: float = Field(
        default=1.0, gt=0, description="the greatest damping that is tried; beyond it: round to nearest"
    )
    least: int = Field(
        default=32, ge=1, description="tokens that a layer must see; with fewer it is rounded to nearest"
    )
    sequential: bool = Field(default=True, description="each reading of a block after the layers before it were packed")

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K] rounded to nearest: what a layer falls back to."""
        return quantize(weight, self.grid)

    def apply(self, model: nn.Module) -> None:
        """FettleError: GPTQ needs text."""
        needs_text(self)

    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """Replace the targets, block by block. FettleError where one cannot be quantized."""
        observe = self.activations is not None and self.activations.static

        def work(unit: Unit) -> None:
            for step in unit.steps(self.sequential):
                seen = unit.moments(step, observe=observe)
                for name in step:
                    packed, fallback = self._packed(unit.weight(name), seen[name])
                    unit.put(name, self, packed, fallback=fallback)

        calibration.walk(self, work)

    def _packed(self, weight: Tensor, seen: Moments) -> tuple[Quantized, str]:
        """The weight on its grid, and why it was only rounded to nearest, if it was."""
        if seen.count < self.least or seen.second is None:
            why = f"saw {seen.count} tokens of the text, under gptq.least ({self.least}): rounded to nearest"
            return self.quantize(weight), why
        try:
            return gptq(weight, seen.second, self.grid, self.act_order, self.damp, self.most), ""
        except FettleError as error:
            return self.quantize(weight), f"{error}: rounded to nearest"

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Blank layers to fill in; without names, layers rounded to nearest."""
        if names is None:
            quantize_linears(model, self)
        else:
            outline_linears(model, self, names, lambda w: blank(tuple(w.shape), self.grid, device=w.device))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The packed weights."""
        return kept(model, self, always=True)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return kept(model, self, always=True)

    def merge(self, model: nn.Module) -> None:
        """Put dense weights back, in the model's type, so that later edits of the list can be folded into them."""
        dequantize_linears(model, self)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, grid: Grid, act_order: bool = True, damp: float = 0.01, most: float = 1.0
) -> Quantized:
    """A weight [N, K] on a grid, by the second moment [K, K] of its input (its scale does not matter).

    In float32, or in float64 for a float64 weight. FettleError where the moment is not finite, or not positive definite with
    damping `most`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    hessian = hessian.double().clone()
    dead = hessian.diagonal() <= 0
    if not dead.all():  # the mean of the others: damping, a share of it, stays what it is without them
        hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean()
    else:
        hessian.diagonal().fill_(1.0)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(dead))
    order = order.to(weight.device)
    factor = inverse_factor(hessian[order][:, order], damp, most).to(wide)
    left = weight.to(wide)[:, order]
    columns = _Columns(weight.to(wide), grid, static=act_order)
    width = columns.span * max(1, BLOCK // columns.span) if columns.span < weight.shape[1] else BLOCK
    for start in range(0, len(order), width):
        stop = min(start + width, len(order))
        inside, errors = left[:, start:stop].clone(), torch.empty_like(left[:, start:stop])
        for i in range(stop - start):
            row = factor[start + i, start + i : stop]
            rounded = columns.round(int(order[start + i]), inside[:, i:])
            errors[:, i] = (inside[:, i] - rounded) / row[0]
            inside[:, i:] -= torch.outer(errors[:, i], row)
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return columns.packed()


def inverse_factor(hessian: Tensor, damp: float, most: float) -> Tensor:
    """U upper triangular, float64 [K, K], with U' U = (H + d I)^-1.

    The least damping of damp, 10 damp, .. most that gives one is taken; FettleError where none does.
    """
    if not torch.isfinite(hessian).all():
        raise FettleError("the second moment of its input is not finite")
    level, mean = damp, hessian.diagonal().mean()
    while True:
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (level * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper
        if level >= most:
            raise FettleError(
                f"the second moment of its input is not positive definite, with damping up to {most:g} of its mean diagonal"
            )
        level = min(level * 10, most)


class _Columns:
    """Rounds columns of a weight on the grids of their groups, and holds the codes."""

    def __init__(self, weight: Tensor, grid: Grid, static: bool) -> None:
        n, k = weight.shape
        length = group_length((n, k), grid)
        self.grid, self.shape = grid, (n, k)
        self.span = min(length, k)  # columns that share a group
        self.static = static or self.span == k  # one group a row has nothing to wait for
        self.codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        scale, zero = fit(weight.reshape(-1, length), grid)
        self.whole = length > k
        self.scale, self.zero = (None if t is None else self._spread(t) for t in (scale, zero))

    def _spread(self, values: Tensor) -> Tensor:
        """[N, groups a row]."""
        return values.expand(self.shape[0], 1).clone() if self.whole else values.view(self.shape[0], -1).clone()

    def round(self, column: int, left: Tensor) -> Tensor:
        """[N], the values of a column on its grid; `left` [N, ..] begins with it, and goes on with those that follow it."""
        group = column // self.span
        assert self.scale is not None
        if not self.static and column % self.span == 0:
            scale, zero = fit(left[:, : self.span], self.grid)
            self.scale[:, group] = scale[:, 0]
            if self.zero is not None and zero is not None:
                self.zero[:, group] = zero[:, 0]
        scale, zero = self.scale[:, group, None], None if self.zero is None else self.zero[:, group, None]
        codes = encode(left[:, :1], scale, zero, self.grid)
        self.codes[:, column] = codes[:, 0]
        return decode(codes, scale, zero, self.grid)[:, 0]

    def packed(self) -> Quantized:
        """All of them."""
        assert self.scale is not None
        scale, zero = (t if t is None else t[:1] if self.whole else t for t in (self.scale, self.zero))
        assert scale is not None
        return assemble(self.codes, scale, zero, self.grid)
