"""RTN: round to nearest, weights only, on any grid of `grid.py`.

    W ~ s_g (q - z_g),   q = round(W / s_g) + z_g    for each group g of a row, a row, or the whole weight

The baseline that every other quantizer must beat. With 8 bits a row it is nearly lossless; with 4 bits take groups of 32 to
128 and `symmetric: false`. ZeroQuant (Yao et al. 2022, arXiv 2206.01861) is the paper of group-wise rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.quantize.activations import Activations
from fettle.quantize.calibrate import round_blocks
from fettle.quantize.grid import Grid
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized, blank, quantize


class RTN(Edit):
    """Hold linear layers on a grid; nothing trains."""

    role = "quantizes"
    kind: Literal["rtn"] = "rtn"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Grid(bits=8)
    activations: Activations | None = Field(default=None, description="round what the layers are given, too")
    loftq: LoftQ | None = Field(
        default=None, description="quantize beside a low-rank residual, for `lora` with init: loftq"
    )

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return quantize(weight, self.grid)

    def apply(self, model: nn.Module) -> None:
        """Replace the targets, layer by layer. FettleError where groups do not divide a row."""
        quantize_linears(model, self)

    def calibrate(self, model: nn.Module, calibration: Any) -> None:
        """The same in a walk over text: static ranges of activations, and what rounding does to every layer's output."""
        round_blocks(model, self, calibration)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Quantize again what an artifact keeps no codes of; with LoftQ all of it, since the LoRA needs the residual."""
        stored = names if names and self.loftq is None else ()
        outline_linears(model, self, stored, lambda w: blank(tuple(w.shape), self.grid, device=w.device))
        quantize_linears(model, self, skip=stored)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing, or with LoftQ the packed weights."""
        return kept(model, self)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return kept(model, self)

    def merge(self, model: nn.Module) -> None:
        """Put dense weights back, in the model's type, so that later edits of the list can be folded into them."""
        dequantize_linears(model, self)
