"""Several artifacts opened on one base: their LoRAs by name, to switch, blend and route (peft/adapters.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.peft import AdaLoRA, LoRA
from fettle.peft.adapters import Adapters
from fettle.peft.combine import unwrap, updates_of
from fettle.stages.artifact import TENSORS, Adaptation, fill, find_artifact, outline_edits, read_artifact


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
    outline_edits(forest, made[first].edits, folders[first] / TENSORS, only=_is_shared)
    found = {}
    for name, other in made.items():
        loras = [edit for edit in other.edits if not _is_shared(edit)]
        outline_edits(forest, other.edits, folders[name] / TENSORS, only=lambda edit: not _is_shared(edit))
        if name != first and (odd := _differing(forest, other.edits, folders[name] / TENSORS)):
            raise FettleError(
                f"adapters: '{name}' and '{first}' have not one base: '{odd}' of their quantized base differs; open them apart"
            )
        fill(forest, other.edits, folders[name] / TENSORS)
        found[name] = updates_of(forest.model)
        unwrap(forest.model, loras)
    forest.model.requires_grad_(False)
    return forest, Adapters(forest, found)


def _is_shared(edit: Any) -> bool:
    return not isinstance(edit, LoRA | AdaLoRA)


def _shared(made: Adaptation) -> list[Any]:
    return [edit for edit in made.edits if _is_shared(edit)]


def _differing(forest: Forest, edits: Sequence[Any], file: Path) -> str | None:
    """A tensor of the shared edits that an artifact has otherwise than the model."""
    with safe_open(file, "pt") as stored:
        for i, edit in enumerate(edits):
            for name, tensor in edit.tensors(forest.model).items() if _is_shared(edit) else ():
                if not torch.equal(stored.get_tensor(f"{i}/{name}"), tensor.cpu()):
                    return name
    return None


def _said(made: Adaptation) -> str:
    return f"under {[edit.kind for edit in _shared(made)]}"
