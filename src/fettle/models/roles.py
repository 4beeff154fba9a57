"""Roles: policy, reference, reward and value as one model in memory, by which of its edits are on.

    policy = base + edits       reference = base + the edits before this stage       value = base + edits of its own

A module that an edit puts into a model has a switch, `enabled`; off, it passes through what it wraps. So a role is a choice of
edits, and takes no second copy of the base. What has no switch, a quantizer or weights that were merged or tuned in full, belongs
to all roles. Where what trains has no switch, the reference is another model, or its figures are kept from before the first step.

A role ends with its `with`. Gradient checkpointing computes a forward pass again in `backward`, so call that within the role
that the forward pass had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit


def switches(model: nn.Module, edits: Sequence[Edit] | None = None) -> list[Any]:
    """The modules with a switch that some edits, or all, put into a model.

    Those that hold the very edit; where none does, as for an edit that was read again from a file, those of its equals.
    """
    every: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "enabled", None), bool) and isinstance(m.edit, Edit)
    ]
    if edits is None:
        return every
    found: dict[int, Any] = {}
    for edit in edits:
        own = [m for m in every if m.edit is edit] or [m for m in every if m.edit == edit]
        found |= {id(m): m for m in own}
    return list(found.values())


@contextmanager
def without(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """The model as if it did not have these edits; the others stay as they are. FettleError where one cannot be switched off."""
    for edit in edits:
        if not edit.detachable or not switches(model, [edit]):
            raise FettleError(f"{_kind(edit)}: cannot be switched off, since {_why(edit)}")
    with _set(dict.fromkeys(switches(model, edits), False)):
        yield


@contextmanager
def only(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """The model with these edits on and all others off, but for what has no switch."""
    chosen = {id(m) for m in switches(model, edits)}
    with _set({m: id(m) in chosen for m in switches(model)}):
        yield


def trained(model: nn.Module) -> tuple[Edit, ...]:
    """The edits with a switch whose weights train now, or that simulate for those that do: this stage's own.

    A later stage freezes those before it, and finds what they simulated packed.
    """
    found = {
        id(m.edit): m.edit
        for m in switches(model)
        if getattr(m, "simulates", False) or any(p.requires_grad for p in _own(m))
    }
    return tuple(found.values())


def obstacle(model: nn.Module) -> str | None:
    """Why the model from before this stage cannot be had by switching off what trains; None where it can."""
    covered = {id(p) for m in switches(model, trained(model)) for p in _own(m)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            return f"'{name}' trains in place"
    return next((f"{_kind(e)}: {_why(e)}" for e in trained(model) if not e.detachable), None)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """The model without the rounding that this stage trains through."""
    with _set({m: False for m in switches(model) if getattr(m, "simulates", False)}):
        yield


@contextmanager
def reference(model: nn.Module) -> Iterator[None]:
    """The model from before this stage: what trains is off, no gradients, no dropout.

    FettleError where what trains cannot be switched off.
    """
    if why := obstacle(model):
        raise FettleError(
            f"reference: the model from before this stage cannot be had by switching edits off, since {why}; "
            "keep its log-probabilities (reference: cached), or take a copy (reference: copy)"
        )
    training = [m for m in model.modules() if m.training]
    with torch.no_grad(), _set(dict.fromkeys(switches(model, trained(model)), False)):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """A switched module's parameters without those of what it wraps."""
    for name, parameter in module.named_parameters():
        if not name.startswith("base."):
            yield parameter


def _kind(edit: Edit) -> str:
    return str(getattr(edit, "kind", type(edit).__name__))


def _why(edit: Edit) -> str:
    return "it changes the model's own weights" if edit.detachable else "the model does not work without it"


@contextmanager
def _set(states: dict[Any, bool]) -> Iterator[None]:
    before = {module: module.enabled for module in states}
    try:
        for module, state in states.items():
            module.enabled = state
        yield
    finally:
        for module, state in before.items():
            module.enabled = state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
