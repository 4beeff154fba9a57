"""HQQ: half-quadratic quantization, which fits zero points to the weight alone (Badri and Shaji 2023, mobiusml/hqq).

    minimise over z, E:  |E|_p^p + beta/2 |E - (W - s (q - z))|^2,    q = round(W / s + z),  p < 1

    E <- shrink((W - s (q - z)) / s),     shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z <- mean over the group of  q - W / s + E

Errors are counted in steps s, so that beta means the same for weights of every size, and the best z of each group is
kept, the integer of rounding to nearest among them. A heavy-tailed norm lets few weights be far off so that most are
near, as weights of use are few; a range by min-max serves the extremes. The scale stays that of min-max, zeros are
real. No text is looked at, so it takes seconds, and its artifact keeps the codes, whose last bits a mean decides.

Shapes: W [N, K] as groups [G, L]; s, z [G, 1].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.quantize.activations import Activations
from fettle.quantize.calibrate import round_blocks
from fettle.quantize.grid import Grid, group_length
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.packed import Quantized, assemble, blank


class HQQ(Edit):
    """Hold linear layers on an integer grid whose zero points are fitted; nothing trains."""

    role = "quantizes"
    loftq: ClassVar[None] = None
    kind: Literal["hqq"] = "hqq"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Grid(bits=4, symmetric=False, group=64, scale="float16")
    activations: Activations | None = Field(default=None, description="round what the layers are given, too")
    p: float = Field(default=0.7, gt=0, lt=1, description="of the norm of the error")
    beta: float = Field(default=10.0, gt=0)
    growth: float = Field(default=1.01, ge=1, description="of beta, an iteration")
    iterations: int = Field(default=20, ge=1, description="at most")

    @model_validator(mode="after")
    def _real_zeros(self) -> HQQ:
        if self.grid.levels != "int" or self.grid.symmetric or self.grid.range != "minmax":
            raise ValueError(
                "grid: hqq fits zero points to a min-max range of integers; give levels: int, symmetric: false, range: minmax"
            )
        return self

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return hqq(weight, self.grid, self.p, self.beta, self.growth, self.iterations)

    def apply(self, model: nn.Module) -> None:
        """Replace the targets, layer by layer. FettleError where groups do not divide a row."""
        quantize_linears(model, self)

    def calibrate(self, model: nn.Module, calibration: Any) -> None:
        """The same in a walk over text: static ranges of activations, and what rounding does to every layer's output."""
        round_blocks(model, self, calibration)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Blank layers to fill in."""
        if names is None:
            self.apply(model)
        else:
            outline_linears(model, self, names, lambda w: blank(tuple(w.shape), self.grid, real=True, device=w.device))

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
def hqq(
    weight: Tensor, grid: Grid, p: float = 0.7, beta: float = 10.0, growth: float = 1.01, iterations: int = 20
) -> Quantized:
    """A weight [N, K] on an integer grid with real zeros. FettleError where a value is not finite."""
    if not torch.isfinite(weight).all():
        raise FettleError("quantize: values that are not finite (NaN or infinity); the weights are damaged")
    groups = weight.reshape(-1, group_length(tuple(weight.shape), grid)).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    most = 2.0**grid.bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    stored = ((high - low) / most).to(grid.scale_dtype).to(groups)
    scale = torch.where(stored > 0, stored, torch.ones_like(stored))
    units, zero = groups / scale, -low / scale  # a group of one value v: scale 1, zero -v, code 0
    best, least = zero, torch.full_like(zero, torch.inf)
    for tried in range(iterations + 1):
        zero = _stored(zero.round() if not tried else zero, grid)  # first as rounding to nearest has it
        codes = (units + zero).round_().clamp_(0, most)
        error = units - (codes - zero)
        size = error.abs().pow(p).mean(1, keepdim=True)
        best, least = torch.where(size < least, zero, best), torch.minimum(size, least)
        zero = (codes - units + shrink(error, p, beta)).mean(1, keepdim=True) if tried else -low / scale
        beta *= growth
    codes = (units + best).round_().clamp_(0, most).to(torch.uint8)
    return assemble(codes.view(weight.shape), scale, best, grid, real=True)


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """The minimiser of |e|^p + beta/2 (e - x)^2 by the generalised soft threshold, for p <= 1."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-30).pow(p - 1) / beta).clamp_min_(0)


def _stored(zero: Tensor, grid: Grid) -> Tensor:
    return zero.to(grid.scale_dtype).to(zero)
