"""Edits that move scale from one weight to the next: what they changed, and what an artifact must keep of it."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models.feeds import Feed, move
from fettle.models.surgery import change, changed_by


def move_scale(model: nn.Module, feed: Feed, scale: Tensor, edit: Edit) -> None:
    """`move`, remembered: the source and the readers are no longer the base's."""
    move(model, feed, scale)
    for name in (feed.source, *feed.readers):
        change(model.get_submodule(name), edit)


def changed(model: nn.Module, edit: Edit) -> dict[str, Tensor]:
    """The parameters of the modules that an edit changed, by name; of those that were packed since, the biases."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if any(e is edit for e in changed_by(module)) or edit in changed_by(module)
        for key, parameter in module.named_parameters(recurse=False)
    }


def outline_changed(model: nn.Module, edit: Edit, names: Collection[str] | None) -> None:
    """Mark the modules whose parameters an artifact keeps, so that they are filled in."""
    for name in names or ():
        module, _, key = name.rpartition(".")
        if key in ("weight", "bias"):
            change(model.get_submodule(module), edit)
