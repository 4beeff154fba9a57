"""SmoothQuant: move the scale of outlying channels from activations into weights (arXiv 2211.10438).

    y = (x / s) (W s)',    s_j = max |x_j|^alpha / max_n |W_nj|^(1 - alpha)

x / s comes for free: the norm before the layers divides its own weight by s. The model computes what it did before;
only what a quantizer after this edit finds is easier. W8A8 is `[smoothquant, rtn]` with `activations` of `rtn`.

Which layers read which norm is found by models/feeds.py and proved by trial. The paper smooths what norms feed; with
`layers` also what linear layers feed (values to the attention's output, ups to downs), where that is exact.

Shapes: x [.., K], W [N, K] of every layer that reads x, s [K].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models.feeds import feeds
from fettle.quantize.calibrate import Calibration, Unit, needs_text
from fettle.quantize.scaling import changed, move_scale, outline_changed

LEAST = 1e-5  # of a factor


class SmoothQuant(Edit):
    """Scale channels so that activations and weights are equally hard to round; the model computes the same."""

    role = "rescales"
    calibrated: ClassVar[bool] = True
    kind: Literal["smoothquant"] = "smoothquant"
    targets: str | tuple[str, ...] = "all-linear"
    alpha: float = Field(default=0.5, ge=0, le=1, description="how much of the difficulty the weights take")
    layers: bool = Field(default=False, description="also through linear layers, where that is exact")

    def apply(self, model: nn.Module) -> None:
        """FettleError: SmoothQuant needs text."""
        needs_text(self)

    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """Scale what the targets read, block by block; what is left alone is listed."""
        seen = feeds(model)
        for reading, why in seen.left.items():
            calibration.leave(", ".join(reading.readers), why)

        def work(unit: Unit) -> None:
            mine = [f for f in seen.found if f.reading.block == unit.name and set(f.readers) & set(unit.names)]
            mine = [f for f in mine if self.layers or f.kind != "linear"]
            moments = unit.moments([f.readers[0] for f in mine], second=False) if mine else {}
            for feed in mine:
                peak = feed.reduce(moments[feed.readers[0]].peak)
                widest = torch.stack([unit.weight(name).abs().amax(0) for name in feed.readers]).amax(0)
                move_scale(model, feed, smooth(peak, [feed.reduce(widest)[None]], self.alpha), self)

        calibration.walk(self, work, second=False)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Mark what an artifact keeps."""
        outline_changed(model, self, names)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The norms and layers that were scaled, as far as no later edit packed them."""
        return changed(model, self)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return changed(model, self)


def smooth(peak: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s [K] by the greatest |x| [K] of an input, for the weights [N, K] of all that read it; 1 for a channel of zeros."""
    widest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    scale = (peak.pow(alpha) / widest.pow(1 - alpha)).clamp_min(LEAST)
    return torch.where((peak > 0) & (widest > 0), scale, torch.ones_like(scale))
