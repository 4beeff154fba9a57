"""Changing a model's parts by name: which weights a target means, and putting another module in a place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.models.select import matches


def weights_of(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name; of the modules that `targets` name (with all inside them), or all of the model's own for None.

    A soft prompt is no part of the model's own. A tied parameter counts once. FettleError where a target matches no module.
    """
    every = {name: p for name, p in model.named_parameters() if not name.startswith("fettle_prompt.")}
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


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give `module` a weight of its own where it shares one (as a head does with the embedding), and say so in the config.

    Needed before one of the two is changed: the other would change with it, and a saved model would be tied again.
    """
    weight = module._parameters.get("weight")
    if weight is None or sum(m._parameters.get("weight") is weight for m in model.modules()) < 2:
        return
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():  # type: ignore[union-attr, operator]
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def attach(module: nn.Module, addition: nn.Module) -> None:
    """Let `addition.around(x, y)` change what `module` returns for its first argument x; y is its (first) output.

    For modules that are no linear layers, whose names and attributes others rely on: the addition becomes a child
    ('added_0', ...) that runs after the module, inside of what gradient checkpointing computes again.
    """
    name = f"added_{sum(key.startswith('added_') for key in module._modules)}"
    addition.train(module.training)
    module.add_module(name, addition)
    module.register_forward_hook(partial(_through, name), with_kwargs=True)


def _through(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    around = module.get_submodule(name).around
    return (around(x, out[0]), *out[1:]) if isinstance(out, tuple) else around(x, out)  # type: ignore[operator]
