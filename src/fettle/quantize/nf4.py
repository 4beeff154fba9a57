"""NF4: a frozen base in 4 bits, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    W ~ s_g l[q]        q = the nearest of 16 levels to W / s_g,  s_g = max |W| over a block g of 64 weights
    s ~ t_h m[p] + mean(s)      p in 8 bits, t_h over 256 scales ("double quantization")

The levels l are quantiles of a normal distribution, so that each is met equally often by weights that are normally
distributed. 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight. Blocks run over the flattened weight; where they do not divide
a row they run on into the next. Codes, scales and values are those of bitsandbytes.

Quantizing is a function of the base alone, so an artifact keeps nothing of it; with LoftQ, see loftq.py, it does.
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

SCALES = Grid(levels="dynamic", bits=8, group=256)


class NF4(Edit):
    """Hold linear layers in 4-bit NormalFloat; nothing trains. Put `lora` after it for QLoRA."""

    role = "quantizes"
    kind: Literal["nf4"] = "nf4"
    targets: str | tuple[str, ...] = "all-linear"
    block: int = Field(default=64, ge=2, description="weights that share a scale")
    double: bool = Field(default=True, description="quantize the scales too, to 8 bits")
    activations: Activations | None = Field(default=None, description="round what the layers are given, too")
    loftq: LoftQ | None = Field(
        default=None, description="quantize beside a low-rank residual, for `lora` with init: loftq"
    )

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return nf4(weight, self.block, self.double)

    def apply(self, model: nn.Module) -> None:
        """Replace the targets, layer by layer. FettleError where one cannot be quantized."""
        quantize_linears(model, self)

    def calibrate(self, model: nn.Module, calibration: Any) -> None:
        """The same in a walk over text: static ranges of activations, and what rounding does to every layer's output."""
        round_blocks(model, self, calibration)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Quantize again what an artifact keeps no codes of; with LoftQ all of it, since the LoRA needs the residual."""
        stored = names if names and self.loftq is None else ()
        scales = SCALES if self.double else None
        outline_linears(
            model, self, stored, lambda w: blank(tuple(w.shape), _grid(self.block), scales, across_rows=True, device=w.device)
        )  # fmt: skip
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


def nf4(weight: Tensor, block: int = 64, double: bool = True) -> Quantized:
    """A weight of any shape in NF4."""
    return quantize(weight, _grid(block), SCALES if double else None, across_rows=True)


def _grid(block: int) -> Grid:
    return Grid(levels="normal", bits=4, group=block)
