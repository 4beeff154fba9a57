"""Artifacts: a base by reference, the edits, and the tensors the edits trained; opening replays the edits.

manifest.json       base {path, revision, hash}, edits, recipe, metrics, and a SHA-256 of every file
edits.safetensors   `<index of the edit>/<name of the tensor>`
tokenizer.json ...  the tokenizer, with its chat template
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file

from fettle.core.config import validate
from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.files import MANIFEST, new_folder, read_json, verify, write_json
from fettle.core.spec import Spec
from fettle.models.forest import Forest
from fettle.models.load import base_hash, folder_of, load
from fettle.models.spec import ModelSpec
from fettle.quantize.linear import require_no_residual
from fettle.stages.edits import AnyEdit, naming

TENSORS = "edits.safetensors"
S = TypeVar("S", bound=Stage)


class Adaptation(Spec):
    """What an artifact's manifest says of its making: enough to rebuild the model."""

    model: ModelSpec = Field(default_factory=ModelSpec)
    edits: tuple[AnyEdit, ...] = ()


def apply_edits(forest: Forest, edits: Sequence[Edit], seed: int = 0) -> Forest:
    """Freeze the base, then apply the edits in order; what they mark, and nothing else, trains.

    What an edit draws at random is a function of `seed` and of its place in the list.
    """
    forest.model.requires_grad_(False)
    return add_edits(forest, edits, seed)


def add_edits(forest: Forest, edits: Sequence[Edit], seed: int, place: int = 0) -> Forest:
    """Apply more edits in order, the first as the `place`-th of the model. FettleError where the list does not end whole."""
    for i, edit in enumerate(edits):
        with naming(i, edit):
            add_edit(forest, edit, seed, place + i)
    require_no_residual(forest.model)
    return forest


def outline_edits(
    forest: Forest, edits: Sequence[Edit], file: Path | None = None, only: Callable[[Edit], bool] = lambda _: True
) -> Forest:
    """`apply_edits` without what only data can tell; `file` holds the tensors that are to fill it in, where there are any."""
    forest.model.requires_grad_(False)
    names = stored_names(file) if file else {}
    for i, edit in enumerate(edits):
        if only(edit):
            with naming(i, edit), drawing(forest, 0, i):
                edit.outline(forest.model, names.get(i, frozenset()) if file else None)
    return forest


def stored_names(file: Path) -> dict[int, frozenset[str]]:
    """The names of an artifact's tensors by edit, as they were before later edits wrapped what they belong to."""
    found: dict[int, set[str]] = {}
    with safe_open(file, "pt") as stored:
        for key in stored.keys():
            place, _, name = key.partition("/")
            found.setdefault(int(place), set()).add(re.sub(r"\.base(?=\.)", "", name))
    return {place: frozenset(names) for place, names in found.items()}


def add_edit(forest: Forest, edit: Edit, seed: int, place: int) -> None:
    """Apply one more edit, the `place`-th of the model."""
    with drawing(forest, seed, place):
        edit.apply(forest.model)


@contextmanager
def drawing(forest: Forest, seed: int, place: int) -> Iterator[None]:
    """Within it, random numbers are those of `seed` and the `place`-th edit; outside, as if none had been drawn."""
    devices = [forest.device] if forest.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, place]).generate_state(1)[0]))
        yield


def is_artifact(folder: Path) -> bool:
    """Whether a folder holds an artifact."""
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("kind") == "artifact"


def save_artifact(folder: Path, forest: Forest, edits: Sequence[Edit], facts: dict[str, Any]) -> None:
    """Write the artifact's folder, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    for i, edit in enumerate(edits):
        for name, tensor in edit.tensors(forest.model).items():
            tensors[f"{i}/{name}"] = tensor.detach().cpu().contiguous().clone()
    spec = forest.spec
    hashed = base_hash(folder_of(spec.path, spec.revision)) if spec.config is None else None
    made = Adaptation(model=spec, edits=tuple(edits)).model_dump(mode="json", exclude_defaults=False)
    with new_folder(folder) as aside:
        save_file(tensors, aside / TENSORS)
        if forest.tokenizer is not None:
            forest.tokenizer.save_pretrained(aside)
        write_json(aside / MANIFEST, {"kind": "artifact", "base_hash": hashed, **made, **facts})


def read_artifact(folder: Path, **changes: Any) -> Adaptation:
    """What an artifact is made of; `changes` replace fields of its ModelSpec (device, dtype, attention).

    FettleError where a file is damaged or the base is another one.
    """
    manifest = verify(folder)
    source = {key: manifest[key] for key in ("model", "edits") if key in manifest}
    made: Adaptation = validate(Adaptation, source, str(folder / MANIFEST))
    spec = made.model.model_copy(update=changes)
    if spec.config is not None:
        return made.model_copy(update={"model": spec})
    try:
        found = base_hash(folder_of(spec.path, spec.revision))
    except FettleError as error:
        raise FettleError(
            f"{folder}: its base, '{spec.path}' in {MANIFEST}, cannot be opened from here: {error}"
        ) from None
    if manifest.get("base_hash") != found:
        raise FettleError(
            f"{folder}: was trained on another base than '{spec.path}' is now "
            f"(hash {str(manifest.get('base_hash'))[:12]}, found {found[:12]}); give the right base in {MANIFEST} or train again"
        )
    return made.model_copy(update={"model": spec})


def open_artifact(folder: Path, base: Forest | None = None, **changes: Any) -> tuple[Forest, tuple[Edit, ...]]:
    """The model of an artifact and its edits; `changes` as in `read_artifact`. FettleError also where tensors do not fit.

    `base` is its base where that is loaded already, and becomes the artifact's model.
    """
    made = read_artifact(folder, **changes)
    forest = base or load(made.model)
    outline_edits(forest, made.edits, folder / TENSORS)
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        forest.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for edit in made.edits:
        edit.settle(forest.model)
    fill(forest, made.edits, folder / TENSORS)
    forest.model.requires_grad_(False)
    return forest, made.edits


def fill(forest: Forest, edits: Sequence[Edit], file: Path) -> None:
    """Put an artifact's tensors into a model that has its edits. FettleError where they are not the ones it needs."""
    with safe_open(file, "pt") as stored, torch.no_grad():
        keys = set(stored.keys())
        for i, edit in enumerate(edits):
            for name, tensor in edit.tensors(forest.model).items():
                key = f"{i}/{name}"
                if key not in keys:
                    raise FettleError(f"{file}: has no tensor '{key}' that edit {i} ({type(edit).__name__}) needs")
                value = stored.get_tensor(key)
                if value.shape != tensor.shape:
                    raise FettleError(
                        f"{file}: '{key}' has shape {tuple(value.shape)}, the model needs {tuple(tensor.shape)}"
                    )
                tensor.copy_(value)
                keys.discard(key)
    if keys:
        raise FettleError(f"{file}: holds '{sorted(keys)[0]}', which no edit asked for")


def find_artifact(ref: str) -> Path | None:
    """The artifact that a folder is, or that a run's folder holds."""
    return next((folder for folder in (Path(ref), Path(ref) / "artifact") if is_artifact(folder)), None)


def open_model(ref: str, **changes: Any) -> tuple[Forest, tuple[Edit, ...]]:
    """An artifact's folder (or the run's folder around it), a model folder, a hub id or 'fettle/tiny'; ready to be used."""
    if (folder := find_artifact(ref)) is not None:
        forest, edits = open_artifact(folder, **changes)
        try:
            require_no_residual(forest.model)
        except FettleError as error:
            raise FettleError(f"{folder}: {error}") from None
        return forest, edits
    _require_ended(ref)
    return load(ModelSpec(path=ref).model_copy(update=changes)), ()


def require_model(key: str, ref: str, before: Sequence[Stage], besides: str = "") -> None:
    """FettleError, by its key, where there is nothing for `open_model` to open, nor will be after the stages `before`.

    `besides` ends the sentence: what else may stand there.
    """
    if planned(ref, before) is not None or find_artifact(ref) is not None:
        return
    try:
        _require_ended(ref)
        folder_of(ref)
    except FettleError as error:
        raise FettleError(f"{key}: {str(error).removeprefix('model: ')}{besides}") from None


def require_artifact(key: str, ref: str, before: Sequence[Stage]) -> None:
    """FettleError, by its key, where there is no artifact, nor will be after the stages `before`."""
    if planned(ref, before) is None and find_artifact(ref) is None:
        raise FettleError(f"{key}: {ref} holds no artifact, and no stage before this one has that output")


def planned(ref: str, before: Sequence[S]) -> S | None:
    """The stage of those `before` that leaves the artifact called so, by its output or by the artifact in it, however it is spelt."""
    wanted = Path(ref).expanduser().resolve()
    outputs = {stage.output.expanduser().resolve(): stage for stage in before}
    return outputs.get(wanted) or (outputs.get(wanted.parent) if wanted.name == "artifact" else None)


def awaited(refs: Iterable[str], before: Sequence[Stage]) -> list[str]:
    """Of some names of models those that a stage of those `before` will leave, and has not left yet."""
    return [ref for ref in dict.fromkeys(refs) if planned(ref, before) is not None and find_artifact(ref) is None]


def _require_ended(ref: str) -> None:
    if (Path(ref) / "checkpoints").is_dir():
        raise FettleError(f"{ref}: holds a run that did not end, so no artifact; go on with fettle run --resume")
