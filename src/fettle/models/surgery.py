"""Changing a model's parts by name: which weights a target means, and putting another module in a place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.models.select import matches


def weights_of(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name; of the modules that `targets` name (with all inside them), or all for None.

    A tied parameter counts once. FettleError where a target matches no module.
    """
    every = dict(model.named_parameters())
    if targets is None:
        return every
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [name for name in modules if matches(pattern, name)]
        if not hits:
            ends = {name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()}
            raise FettleError(f"targets: '{pattern}' matches no module; {nearest(pattern.rsplit('.', 1)[-1], ends)}")
        chosen |= {name for name in every if any(name.startswith(f"{hit}.") for hit in hits)}
    return {name: parameter for name, parameter in every.items() if name in chosen}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, in training or evaluation mode as that was."""
    module.train(model.get_submodule(name).training)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
