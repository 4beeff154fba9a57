"""Freezing: named weights stop training; after `full`, what is left trains (as in tuning only the last layers)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from fettle.core.families import Edit
from fettle.models.surgery import weights_of


class Freeze(Edit):
    """Stop the weights whose module matches `targets` from training."""

    role = "freezes"
    kind: Literal["freeze"] = "freeze"
    targets: str | tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        """Mark the weights as frozen. FettleError where a target matches nothing."""
        for parameter in weights_of(model, self.targets).values():
            parameter.requires_grad_(False)
