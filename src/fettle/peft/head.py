"""The head of a task: the layers above the body that give labels to texts or words (Devlin et al. 2018, arXiv 1810.04805).

    z = head(state),    all of the head's weights train; the body is left to the other edits

A head that the checkpoint lacks begins at random, so that it must train whatever else does: a recipe that does not name this
edit gets it at the end of its list where the head is new.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.tasks import head_weights


class TaskHead(Edit):
    """Train the head of a model with task: classify or task: tag, with the pooler where that is new."""

    kind: Literal["head"] = "head"

    def apply(self, model: nn.Module) -> None:
        """Mark the head as trainable. FettleError where the model is a language model."""
        found = head_weights(model)
        if not found:
            raise FettleError(
                f"head: {type(model).__name__} has no head for a task; set model.task: classify or model.task: tag"
            )
        for parameter in found.values():
            parameter.requires_grad_(True)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The head's weights, by name."""
        return {name: weight.detach() for name, weight in head_weights(model).items()}
