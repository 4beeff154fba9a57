"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models.surgery import weights_of


class Full(Edit):
    """Train every weight, or those whose module matches `targets` (a pattern, a name, or several)."""

    kind: Literal["full"] = "full"
    targets: str | tuple[str, ...] | None = None

    def apply(self, model: nn.Module) -> None:
        """Mark the weights as trainable. FettleError where a target matches nothing."""
        for parameter in weights_of(model, self.targets).values():
            parameter.requires_grad_(True)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained weights, by name."""
        return {name: p.detach() for name, p in weights_of(model, self.targets).items()}
