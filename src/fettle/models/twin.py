"""Twins: a second tree of modules over the same weights, for a role that has edits of its own (a critic, a reward model).

    policy   base weights ── edits of the stages before ── edits that train
    twin     the same tensors ── the same edits ─────────── others

A twin costs its modules, not their weights. Roles that differ by edits which are merely off are one tree (roles.py); a role with
edits of its own is a twin, so that generation, which is slowed by every module it passes, passes through the policy's alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.forest import Forest
from fettle.models.spec import ModelSpec
from fettle.models.tasks import NEW, auto_class, headed


def twin(forest: Forest, apart: Iterable[Tensor] = ()) -> Forest:
    """A forest over a twin of the model: its tensors are the same ones, but for those of `apart`, which it gets copies of.

    Nothing of it trains: what trains in the original and is shared is held fixed by whoever uses the twin. Its edits are equal
    to the original's and not the same, so that an edit finds its own modules in the tree it was applied to.
    """
    own = {id(t) for t in apart}
    shared = [t for t in [*forest.model.parameters(), *forest.model.buffers()] if id(t) not in own]
    gradients = [(p, p.grad) for p in forest.model.parameters() if p.grad is not None]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        made = copy.copy(forest)
        made.model = copy.deepcopy(forest.model, {id(t): t for t in shared})
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    made.config = made.model.config
    renew(made.model)
    return made


def renew(model: nn.Module) -> None:
    """Let the modules of a copied tree hold copies of their edits, one for each."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        edit = getattr(module, "edit", None)
        if isinstance(edit, Edit):
            module.edit = copies.setdefault(id(edit), edit.model_copy())


def with_task(forest: Forest, spec: ModelSpec) -> Forest:
    """A causal model's forest, made one with the head that a resolved spec asks for, around the same body.

    The head's weights are zero, in the model's type, to be filled from an artifact.
    """
    config = headed(copy.deepcopy(forest.model.config), spec)
    with torch.device("meta"):
        model = auto_class(spec, config).from_config(config)
    setattr(model, model.base_model_prefix, forest.model.base_model)
    new = {name: weight for name, weight in model.named_parameters() if weight.is_meta}
    for name, weight in new.items():
        parent, _, last = name.rpartition(".")
        made = torch.zeros(weight.shape, dtype=forest.dtype, device=forest.device)
        setattr(model.get_submodule(parent), last, nn.Parameter(made, requires_grad=False))
    setattr(model, NEW, frozenset(new))
    model.eval()
    return Forest(model, forest.tokenizer, spec, forest.backend)


@contextmanager
def unchanged(forest: Forest | None, what: str, who: str) -> Iterator[None]:
    """FettleError where what is done within it writes to the weights of `forest`, if there is one, which another role has too."""
    tensors = [] if forest is None else [*forest.model.named_parameters(), *forest.model.named_buffers()]
    before = [tensor._version for _, tensor in tensors]
    yield
    for (name, tensor), version in zip(tensors, before, strict=True):
        if tensor._version != version:
            raise FettleError(
                f"{what} changes the base's own weights ('{name}'), which {who}; to let each have weights of its own, say share: false"
            )
