"""Several artifacts opened on one base: their LoRAs by name, to switch, blend and route (peft/adapters.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.peft import AdaLoRA, LoRA
from fettle.peft.adapters import Adapters
from fettle.peft.combine import unwrap, updates_of
from fettle.stages.artifact import TENSORS, Adaptation, apply_edits, fill, find_artifact, read_artifact


def open_adapters(refs: Mapping[str, str], **changes: Any) -> tuple[Forest, Adapters]:
    """The base with the LoRAs of the artifacts (or run folders) `refs`, by name, all off; `changes` as in `open_artifact`.

    The base is loaded once, and once quantized where all artifacts quantize it alike. FettleError where they have not one
    base, or where an edit is neither a LoRA nor a function of the base alone.
    """
    made: dict[str, Adaptation] = {}
    folders = {}
    for name, ref in refs.items():
        if (folder := find_artifact(ref)) is None:
            raise FettleError(f"adapters: '{name}': {ref} holds no artifact; give the folder of one, or of its run")
        folders[name], made[name] = folder, read_artifact(folder, **changes)
    if not made:
        raise FettleError("adapters: none was given")
    first = next(iter(made))
    for name, other in made.items():
        if (other.model, _shared(other)) != (made[first].model, _shared(made[first])):
            raise FettleError(
                f"adapters: '{name}' and '{first}' have not one base: {other.model.path} {_said(other)} and "
                f"{made[first].model.path} {_said(made[first])}; open them apart"
            )
    forest = load(made[first].model)
    apply_edits(forest, _shared(made[first]))
    for edit in _shared(made[first]):
        if edit.tensors(forest.model):
            raise FettleError(
                f"adapters: the artifacts hold a '{edit.kind}' with tensors of its own, which cannot be switched; merge it"
            )
    found = {}
    for name, other in made.items():
        loras = [edit for edit in other.edits if isinstance(edit, LoRA | AdaLoRA)]
        for edit in loras:
            edit.apply(forest.model)
        fill(forest, other.edits, folders[name] / TENSORS)
        found[name] = updates_of(forest.model)
        unwrap(forest.model, loras)
    forest.model.requires_grad_(False)
    return forest, Adapters(forest, found)


def _shared(made: Adaptation) -> list[Any]:
    return [edit for edit in made.edits if not isinstance(edit, LoRA | AdaLoRA)]


def _said(made: Adaptation) -> str:
    return f"under {[edit.kind for edit in _shared(made)]}"
