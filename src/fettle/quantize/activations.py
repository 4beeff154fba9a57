"""Activations in few bits: what a quantized layer multiplies its weight with is rounded first.

    y = x^ W^' + b,    x^ = s_x (l[q] - z_x)

    group: row       dynamic, a token: each has its own range, found when it comes
    group: tensor    dynamic, one range for all tokens of a call: what an answer is depends on what shares its batch
    static: true     one range of the layer, found on calibration text and held; what lies beyond it is clipped

ZeroQuant (Yao et al. 2022, arXiv 2206.01861) rounds by token; SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) has all three,
as O1, O2 and O3. The gradient passes through rounding as if it were not there, and stops where a value was clipped.

Shapes: T tokens, K inputs, N outputs; x [.., K].
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid, fit, group_length, levels, snapped

Range = tuple[Tensor, Tensor | None]  # scale and zero


class Activations(Grid):
    """The grid of a layer's input; by default 8 bits, symmetric, a range for each token."""

    bits: int = Field(default=8, ge=2, le=8)
    static: bool = Field(default=False, description="one range, found on calibration text; with group: tensor")
    outliers: float | None = Field(
        default=None,
        gt=0,
        description="values of at least this size are not rounded, and are no part of a range (LLM.int8)",
    )

    @model_validator(mode="after")
    def _one_range(self) -> Activations:
        if self.static and self.group != "tensor":
            raise ValueError("static: a held range is one for the whole tensor; give group: tensor beside it")
        if self.static and self.outliers is not None:
            raise ValueError("outliers: a held range is found on all values, these too; leave out static, or outliers")
        return self

    @property
    def clips(self) -> bool:
        """Whether values may lie beyond the range."""
        return self.static or self.range != "minmax"


class Ranged(nn.Module):
    """A layer whose input may be rounded on a range that is held for ever: NaN until `hold_range`, then scalars."""

    activations: Activations | None

    def await_range(self, activations: Activations | None, device: torch.device) -> None:
        """What the input is rounded on; a static range gets its place."""
        self.activations, self._ranged = activations, False
        if activations is not None and activations.static:
            self.register_buffer("x_scale", torch.full((), torch.nan, device=device))
            self.register_buffer("x_zero", None if activations.symmetric else torch.zeros((), device=device))

    @property
    def held_range(self) -> Range | None:
        """Scale and zero of the input, scalars, where they are static."""
        return (self.x_scale, self.x_zero) if self.activations is not None and self.activations.static else None  # type: ignore[return-value]

    @torch.no_grad()
    def hold_range(self, scale: Tensor, zero: Tensor | None = None) -> None:
        """Set the range of a static input: of one element each, as `ranges` or an observer finds them."""
        self.x_scale.copy_(scale.view(()))  # type: ignore[operator]
        if zero is not None:
            self.x_zero.copy_(zero.view(()))  # type: ignore[operator]

    def ready_range(self) -> Range | None:
        """`held_range`, for a forward pass. FettleError where it was never set."""
        held = self.held_range
        if held is not None and not self._ranged:
            if type(held[0]) is Tensor and bool(held[0].isnan()):
                shape = " x ".join(map(str, self.weight.shape))  # type: ignore[union-attr, arg-type]
                raise FettleError(
                    f"activations: static: the input of a layer of {shape} has no range yet; find one on calibration text, or leave "
                    "static out"
                )
            self._ranged = True
        return held


def range_tensors(held: Range | None) -> dict[str, Tensor]:
    """What an artifact keeps of a layer's held range, by name."""
    return {key: t for key, t in zip(("x_scale", "x_zero"), held or (), strict=False) if t is not None}


def ranges(x: Tensor, grid: Grid) -> Range:
    """Scale and zero of each group of x, both [G, 1], found on x itself."""
    return fit(x.reshape(-1, group_length(tuple(x.shape), grid)), grid)


def rounded(x: Tensor, grid: Grid, held: Range | None = None) -> Tensor:
    """x^ in the shape and dtype of x: on its own ranges, or on one that is held (scalars, or of a shape that x has room for).

    The gradient is straight-through."""
    if (bound := getattr(grid, "outliers", None)) is not None:
        large = x.abs() >= bound
        return torch.where(large, x, _Rounded.apply(x.masked_fill(large, 0), grid, held))
    return _Rounded.apply(x, grid, held)  # type: ignore[no-any-return]


def reached(x: Tensor, grid: Grid, held: Range | None = None) -> Tensor:
    """bool, in the shape of x: which values the grid reaches, half a step beyond its outermost levels included."""
    groups = x if held is not None else x.reshape(-1, group_length(tuple(x.shape), grid))
    scale, zero = held or fit(groups, grid)
    table = levels(grid)[1 if grid.narrow else 0 :]
    ends = torch.stack([table[0] - (table[1] - table[0]) / 2, table[-1] + (table[-1] - table[-2]) / 2]).tolist()
    low, high = (scale * (end if zero is None else end - zero) for end in ends)
    return ((groups >= low) & (groups <= high)).view(x.shape)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, held: Range | None) -> Tensor:
        """x^."""
        clips = ctx.needs_input_grad[0] and (held is not None or grid.range != "minmax")
        ctx.save_for_backward(reached(x, grid, held) if clips else None)
        groups = x if held is not None else x.reshape(-1, group_length(tuple(x.shape), grid))
        scale, zero = held or fit(groups, grid)
        return snapped(groups, scale, zero, grid).to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x^, where x was not clipped."""
        (mask,) = ctx.saved_tensors
        return grad if mask is None else grad * mask, None, None
