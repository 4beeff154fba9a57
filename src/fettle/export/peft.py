"""PEFT's folder, written and read: adapter_config.json and adapter_model.safetensors.

What a method is called there, and what its tensors are called, stands in one place a method: a `Conversion` in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder, read_json, write_json
from fettle.export import peft_ia3, peft_lora
from fettle.export.common import save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure, plain_logits
from fettle.models.load import load
from fettle.models.weight import is_quantized
from fettle.peft import IA3, AdaLoRA, LoRA

if TYPE_CHECKING:
    from fettle.models.forest import Forest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Settings = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """How one method is said in PEFT's words.

    `write(model, edit)` -> what its config has beside the common keys, and its tensors under PEFT's names;
    `read(config, tensors, folder)` -> the edit, and its tensors under ours; `fit(model, edit, tensors, folder)` -> the edit
    as it is to be applied to this model. FettleError, naming the folder, where one side cannot say what the other means.
    """

    edits: tuple[type[Edit], ...]
    types: tuple[str, ...]  # of `peft_type`
    write: Callable[[nn.Module, Any], tuple[Settings, Tensors]]
    read: Callable[[Settings, Tensors, Path], tuple[Edit, Tensors]]
    fit: Callable[[nn.Module, Any, Tensors, Path], Edit]


METHODS = (
    Conversion((LoRA, AdaLoRA), ("LORA", "ADALORA"), peft_lora.write, peft_lora.read, peft_lora.fit),
    Conversion((IA3,), ("IA3",), peft_ia3.write, peft_ia3.read, peft_ia3.fit),
)


def export_peft(forest: Forest, edits: Sequence[Edit], folder: Path) -> Parity:
    """Write the adapter; read it back with `peft` where that is installed, else with `read_peft`, on a fresh base; compare."""
    edit, rest = _only_one(forest, edits)
    reference = measure(forest)
    settings, tensors = _conversion(edit).write(forest.model, edit)
    with new_folder(folder) as aside:
        save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, aside / WEIGHTS, {"format": "pt"}
        )
        write_json(aside / CONFIG, _common(forest) | settings)
        save_tokenizer(forest, aside)
        model, by = _reloaded(forest, rest, aside)
        parity = check(reference, lambda rows: plain_logits(model, rows), str(folder), by)
        write_manifest(aside, "peft", forest, edits, parity)
    return parity


def _only_one(forest: Forest, edits: Sequence[Edit]) -> tuple[Edit, list[Edit]]:
    """The edit that the folder will hold, and those that change the base without tensors of their own."""
    known = tuple(kind for method in METHODS for kind in method.edits)
    found = [e for e in edits if isinstance(e, known)]
    rest = [e for e in edits if not isinstance(e, known)]
    if any(e.tensors(forest.model) for e in rest) or len(found) != 1:
        listed = ", ".join(type(e).__name__ for e in edits) or "none"
        raise FettleError(
            f"export: a peft folder holds one {' or '.join(k.__name__ for k in known)} and nothing else, the edits here are: "
            f"{listed}; use --to hf, which merges them"
        )
    if forest.spec.config is not None:
        raise FettleError(
            "export: a peft adapter needs a base that others can load, and this one began with random weights; use --to hf"
        )
    return found[0], rest


def _conversion(edit: Edit) -> Conversion:
    return next(method for method in METHODS if isinstance(edit, method.edits))


def _common(forest: Forest) -> Settings:
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(forest.config, "name_or_path", "") or forest.spec.path,
        "revision": forest.spec.revision,
        "inference_mode": True,
    }


def _reloaded(forest: Forest, rest: Sequence[Edit], folder: Path) -> tuple[nn.Module, str]:
    dtype = str(forest.model.dtype).removeprefix("torch.")
    fresh = load(forest.spec.model_copy(update={"dtype": dtype, "device": str(forest.device)}))
    for edit in rest:
        edit.apply(fresh.model)
    try:
        from peft import PeftModel
    except ImportError:
        load_peft(fresh, folder)
        return fresh.model, "fettle"
    if any(is_quantized(m) for m in fresh.model.modules()):  # in a form that peft does not know
        load_peft(fresh, folder)
        return fresh.model, "fettle"
    return PeftModel.from_pretrained(fresh.model, folder), "peft"


def read_peft(folder: Path) -> tuple[Any, Tensors]:
    """A PEFT folder as (edit, its tensors under our names). FettleError where it holds what no edit here can say."""
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    for method in METHODS:
        if kind in method.types:
            return method.read(config, _weights(folder), folder)
    known = ", ".join(t for method in METHODS for t in method.types)
    raise FettleError(f"{folder / CONFIG}: holds a {kind} adapter; only {known} can be read here")


def _weights(folder: Path) -> Tensors:
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise FettleError(
                f"{folder}: the adapter is pickled (adapter_model.bin), and unpickling runs code; save it as safetensors first"
            )
        raise FettleError(f"{file}: no such file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise FettleError(f"{file}: not a whole safetensors file ({error})") from None


@torch.no_grad()
def load_peft(forest: Forest, folder: Path) -> Any:
    """Put a PEFT adapter on a base; returns the edit as applied. FettleError where it is not this model's."""
    edit, tensors = read_peft(folder)
    edit = _conversion(edit).fit(forest.model, edit, tensors, folder)
    edit.apply(forest.model)
    forest.model.train(forest.model.training)  # new modules begin in training mode, and dropout would be on
    for key, there in edit.tensors(forest.model).items():
        if there.shape != tensors[key].shape:
            raise FettleError(
                f"{folder}: '{key}' has shape {tuple(tensors[key].shape)}, the model needs {tuple(there.shape)}; it belongs to another base"
            )
        there.copy_(tensors[key])
    return edit
