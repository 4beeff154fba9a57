"""Outliers on purpose: a few channels of what norms return grow, the layers that read them shrink by as much. A control.

    y = W x = (W / s) (x s),    s_j = factor for a few channels j, else 1

Large models have such channels by themselves (Dettmers et al. 2022, arXiv 2208.07339, section 4) and small ones may not, so that
methods for them have nothing to show. This gives a small model the same trouble: it computes what it did before, and bit for bit
so where the factor is a power of two, but one range over all channels of x no longer serves most of them. Which channels grow is drawn
by the seed, for each norm anew.

Shapes: x [.., K], W [N, K] of every layer that reads x, s [K].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.feeds import feeds
from fettle.quantize.scaling import changed, move_scale, outline_changed


class Outliers(Edit):
    """Make a few activation channels large without changing what the model computes; for seeing what a quantizer does then."""

    role = "rescales"
    kind: Literal["outliers"] = "outliers"
    share: float = Field(default=0.01, gt=0, lt=1, description="of the channels, at least one")
    factor: float = Field(default=32.0, gt=1)
    seed: int = Field(default=0, ge=0)

    def apply(self, model: nn.Module) -> None:
        """Scale every norm that feeds linear layers. FettleError where there is none."""
        found = [feed for feed in feeds(model).found if feed.kind != "linear"]
        if not found:
            raise FettleError("outliers: no norm of this model takes a scale, so its activations cannot be made larger")
        generator = torch.Generator().manual_seed(self.seed)
        for feed in found:
            count = len(feed.rows)
            chosen = torch.randperm(count, generator=generator)[: max(1, round(self.share * count))]
            scale = torch.ones(count)
            scale[chosen] = 1 / self.factor
            move_scale(model, feed, scale.to(next(model.parameters()).device), self)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Mark what an artifact keeps."""
        outline_changed(model, self, names)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The norms and layers that were scaled, as far as no later edit packed them."""
        return changed(model, self)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return changed(model, self)
