"""Full fine-tuning: every weight trains."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models.surgery import added, train, weights_of


class Full(Edit):
    """Train every weight of the model's own, or those whose module matches `targets` (a pattern, a name, or several).

    What other edits put into the model is theirs, whether they come before or after.
    """

    kind: Literal["full"] = "full"
    targets: str | tuple[str, ...] | None = None

    def apply(self, model: nn.Module) -> None:
        """Mark the weights as trainable. FettleError where a target matches nothing."""
        for parameter in self._own(model).values():
            train(parameter)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained weights, by name."""
        return {name: p.detach() for name, p in self._own(model).items()}

    def _own(self, model: nn.Module) -> dict[str, nn.Parameter]:
        others = added(model)
        return {name: p for name, p in weights_of(model, self.targets).items() if name not in others}
