"""QAT: quantization-aware training (Jacob et al. 2017, arXiv 1712.05877), with LLM-QAT's cache (Liu et al. 2023, arXiv 2305.17888).

    y = x^ W^' + b,    W^ = s (round(W / s + z) - z),  s and z of the range that W has at this step; x^ the same, a token a range
    d W^ / d W = 1 inside of the range, 0 outside

Keys and values are rounded as a cache in few bits would hold them: after rotation, a range for each token and head.

What trains is left to the other edits of the list, and the rounded weight is what they make of it:

    [full, qat]      every weight trains
    [lora, qat]      W + s B A is rounded, so that merging afterwards costs nothing (either order: the quantizer stands outside)

With `range: minmax` nothing lies outside of the range, so the gradient is passed on whole; else it stops where a value was
clipped, and at no constant besides. As training ends the layers are packed, and compute what `rtn` with the same grid computes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.quantize.activations import Activations, rounded
from fettle.quantize.cache import attach_cache, cannot_merge, settle_cache
from fettle.quantize.grid import Grid
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized, quantize
from fettle.quantize.simulated import SimulatedLinear, merge_linears, settle_linears, simulate, tensors_of


class OnGrid(nn.Module):
    """Weights rounded on the range that they have."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """W^ of W [N, K]."""
        return rounded(weight, self.grid)

    def pack(self, weight: Tensor) -> Quantized:
        """W^ as it is held."""
        return quantize(weight, self.grid)


class QAT(Edit):
    """Round as a packed model would while it trains; packed when training ends."""

    role = "simulates"
    kind: Literal["qat"] = "qat"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Field(default=Grid(bits=4), description="of the weights")
    activations: Activations | None = Field(default=None, description="round what the layers are given, too")
    cache: Grid | None = Field(default=None, description="round keys and values, as a cache in so many bits holds them")

    @model_validator(mode="after")
    def _found_as_it_goes(self) -> QAT:
        if self.activations is not None and self.activations.static:
            raise ValueError("activations.static: a held range is learned by {kind: lsq}; here each token has its own")
        if self.cache is not None and self.cache.group == "tensor":
            raise ValueError("cache.group: 'tensor' would give tokens a range that depends on later ones; take 'row'")
        return self

    @property
    def loftq(self) -> LoftQ | None:
        """None: nothing is left to a LoRA."""
        return None

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return quantize(weight, self.grid)

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where groups do not divide a row, or where a layer is no plain one."""

        def make(base: nn.Module, name: str) -> SimulatedLinear:
            layer = SimulatedLinear(base, self, OnGrid(self.grid), self.activations)
            layer.settled()  # what cannot be packed is refused now
            return layer

        simulate(model, self, make)
        if self.cache is not None:
            attach_cache(model, self, self.cache)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The packed weights."""
        return tensors_of(model, self)

    def settle(self, model: nn.Module) -> None:
        """Pack the layers; the cache goes on being rounded."""
        settle_linears(model, self)
        settle_cache(model, self)

    def merge(self, model: nn.Module) -> None:
        """Plain weights on the grid. FettleError where activations or the cache are rounded too."""
        if self.cache is not None:
            raise cannot_merge(self)
        merge_linears(model, self)
