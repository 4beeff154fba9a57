"""Changing a model's parts by name: which weights a target means, and putting another module in a place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import nearest
from fettle.models.select import matches

M = TypeVar("M", bound=nn.Module)
_TRAINED = "fettle_trained"  # on a parameter: an edit of the list trains it, or trained it in a stage before


def weights_of(model: nn.Module, targets: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name; of the modules that `targets` name (with all inside them), or all for None.

    A tied parameter counts once, under its first name, and any of the modules that share it means it. FettleError where a
    target matches no module.
    """
    every = dict(model.named_parameters())
    if targets is None:
        return every
    shared = list(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[int] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [name for name in modules if matches(pattern, name)]
        if not hits:
            ends = {name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit()}
            raise FettleError(f"targets: '{pattern}' matches no module; {nearest(pattern.rsplit('.', 1)[-1], ends)}")
        chosen |= {id(p) for name, p in shared if any(name.startswith(f"{hit}.") for hit in hits)}
    return {name: parameter for name, parameter in every.items() if id(parameter) in chosen}


def added(model: nn.Module) -> set[str]:
    """The names of the parameters that edits put into a model, which are no part of its own."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "edit", None), Edit):
            found |= {f"{name}.{key}" for key, _ in module.named_parameters() if not key.startswith("base.")}
    return found


def dropout_of(module: Any) -> float:
    """The rate at which an edit's module drops: none in evaluation, or where a later stage trains other edits."""
    trains = module.training and any(p.requires_grad for p in module.parameters(recurse=False))
    return float(module.edit.dropout) if trains else 0.0


def made_by(model: nn.Module, edit: Edit, kind: type[M] | tuple[type[M], ...]) -> list[tuple[str, M]]:
    """The modules of a kind that an edit put into a model, by name.

    Those that hold this very edit, so that two equal ones keep apart; where none does, as for an edit that was read again
    from a file, those of its equals.
    """
    equal: list[tuple[str, Any]] = [
        (name, m) for name, m in model.named_modules() if isinstance(m, kind) and m.edit == edit
    ]
    return [(name, m) for name, m in equal if m.edit is edit] or equal


def train(parameter: nn.Parameter) -> None:
    """Let one of the model's own weights train, and remember it, so that nothing packs it away later."""
    parameter.requires_grad_(True)
    setattr(parameter, _TRAINED, True)


def is_trained(parameter: Any) -> bool:
    """Whether an edit trains a weight, or has trained it in a stage before."""
    return getattr(parameter, _TRAINED, False)


def change(module: nn.Module, edit: Edit) -> None:
    """Remember that an edit changed a module's own weights, so that what is made of them is no function of the base alone."""
    if not any(e is edit for e in changed_by(module)):
        module.changed_by = (*changed_by(module), edit)  # type: ignore[assignment]


def changed_by(module: nn.Module) -> tuple[Edit, ...]:
    """The edits that changed a module's own weights."""
    return getattr(module, "changed_by", ())


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is, in training or evaluation mode as that was."""
    module.train(model.get_submodule(name).training)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def beneath(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Where an update of a layer's weight goes: around the layer, but under what must see the weight as it then is."""
    while getattr(module, "outermost", False):
        name, module = f"{name}.base", module.base  # type: ignore[assignment]
    return name, module


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give `module` a weight of its own where it shares one (as a head does with the embedding), and say so in the config.

    Needed before one of the two is changed: the other would change with it, and a saved model would be tied again. Of more
    than two, as in BART, all get their own, since a config says of none or of all that they are tied.
    """
    weight = module._parameters.get("weight")
    sharing = [] if weight is None else [m for m in model.modules() if m._parameters.get("weight") is weight]
    if weight is None or len(sharing) < 2:
        return
    for one in sharing[1:]:
        one.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
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
