"""PEFT's folder, written and read: adapter_config.json and adapter_model.safetensors.

What a method is called there, and what its tensors are called, stands in one place a method: a `Conversion` in METHODS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from fettle.export import peft_ia3, peft_lora, peft_prompts
from fettle.export.common import refuse_linear_experts, save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure, silently, wide_logits
from fettle.export.readback import reading
from fettle.models.load import load
from fettle.models.surgery import added
from fettle.models.weight import is_adapter, is_quantized
from fettle.peft import IA3, AdaLoRA, Full, HybridPrompt, LoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2

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
    in_front: bool = False  # of the texts, in rows of its own that peft leaves in the logits


METHODS = (
    Conversion((LoRA, AdaLoRA), ("LORA", "ADALORA"), peft_lora.write, peft_lora.read, peft_lora.fit),
    Conversion((IA3,), ("IA3",), peft_ia3.write, peft_ia3.read, peft_ia3.fit),
    Conversion(
        (PromptTuning, PTuning, HybridPrompt),
        ("PROMPT_TUNING", "P_TUNING"),
        peft_prompts.write,
        peft_prompts.read,
        peft_prompts.fit,
        in_front=True,
    ),
    Conversion((PTuningV2, PrefixTuning), ("PREFIX_TUNING",), peft_prompts.write, peft_prompts.read, peft_prompts.fit),
)
TASKS = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS"}
STEM = "base_model.model."


def export_peft(forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None) -> Parity:
    """Write the adapter; read it back with `peft` where that is installed, else with `read_peft`, on a fresh base; compare."""
    if dtype is not None:
        raise FettleError("export: --dtype is for merged weights; a peft adapter keeps the type it was trained in")
    refuse_linear_experts(forest, "peft")
    edit, rest = _only_one(forest, edits)
    method = _conversion(edit)
    saved = _saved_modules(forest.model, rest, [edit, *rest])
    reference = measure(forest)
    settings, tensors = method.write(forest.model, edit)
    if saved:
        settings["modules_to_save"] = list(saved)
        tensors |= {f"{STEM}{name}.{k}": p.detach() for name in saved for k, p in _weights_of(forest.model, name)}
    with new_folder(folder) as aside:
        save_file(
            {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, aside / WEIGHTS, {"format": "pt"}
        )
        write_json(aside / CONFIG, _common(forest) | settings)
        save_tokenizer(forest, aside)
        fresh = _fresh(forest, rest)
        by = _reader(fresh.model)
        front = settings["num_virtual_tokens"] if method.in_front and by == "peft" else 0
        with reading(folder, by):
            model = _reloaded(fresh, aside, by)
            parity = check(reference, lambda rows: _text_logits(model, rows, front), str(folder), by)
        write_manifest(aside, "peft", forest, edits, parity)
    return parity


def _only_one(forest: Forest, edits: Sequence[Edit]) -> tuple[Edit, list[Edit]]:
    """The edit that the folder is for, and the others."""
    known = tuple(kind for method in METHODS for kind in method.edits)
    found = [e for e in edits if isinstance(e, known)]
    if len(found) != 1:
        raise _too_much([*edits])
    if forest.spec.config is not None:
        raise FettleError(
            "export: a peft adapter needs a base that others can load, and this one began with random weights; use --to hf"
        )
    return found[0], [e for e in edits if e is not found[0]]


def _saved_modules(model: nn.Module, rest: Sequence[Edit], edits: Sequence[Edit]) -> tuple[str, ...]:
    """The whole modules that other edits trained, as a task's head, which PEFT keeps beside the adapter.

    FettleError where they trained anything else.
    """
    trained = _everywhere(model, {name for edit in rest for name in edit.tensors(model)})
    others = added(model)
    wrapped = {f"{name}.base" for name, module in model.named_modules() if is_adapter(module)}
    saved: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{key}" for key, _ in module.named_parameters()}
        inside = name.startswith(tuple(f"{outer}." for outer in saved))
        if name and own and own <= trained - others and name not in wrapped and not inside:
            saved.append(name)
    if trained - {f"{name}.{key}" for name in saved for key, _ in _weights_of(model, name)}:
        raise _too_much(edits)
    return tuple(saved)


def _everywhere(model: nn.Module, names: set[str]) -> set[str]:
    """The names of some weights, and the other names of those that are tied: PEFT copies each module that it saves."""
    every = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(every[name]) for name in names & every.keys()}
    return names | {name for name, parameter in every.items() if id(parameter) in tied}


def _weights_of(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    return list(model.get_submodule(name).named_parameters())


def _too_much(edits: Sequence[Edit]) -> FettleError:
    listed = ", ".join(type(e).__name__ for e in edits) or "none"
    return FettleError(
        "export: a peft folder holds one LoRA, AdaLoRA, IA3 or soft prompt, and besides only whole modules that train, as a "
        f"task's head, and nothing else, the edits here are: {listed}; use --to hf, which merges what can be merged"
    )


def _conversion(edit: Edit) -> Conversion:
    return next(method for method in METHODS if isinstance(edit, method.edits))


def _common(forest: Forest) -> Settings:
    writes = "SEQ_2_SEQ_LM" if forest.config.is_encoder_decoder else "CAUSAL_LM"
    return {
        "task_type": TASKS.get(forest.task, writes),
        "base_model_name_or_path": getattr(forest.config, "name_or_path", "") or forest.spec.path,
        "revision": forest.spec.revision,
        "inference_mode": True,
    }


def _fresh(forest: Forest, rest: Sequence[Edit]) -> Forest:
    """A fresh base, changed by what has no tensors (a quantizer)."""
    dtype = str(forest.dtype).removeprefix("torch.")
    fresh = load(forest.spec.model_copy(update={"dtype": dtype, "device": str(forest.device)}))
    for edit in rest:
        if not edit.tensors(forest.model):
            edit.apply(fresh.model)
    return fresh


def _reader(model: nn.Module) -> str:
    """Who reads an adapter of it back: peft where that is installed and knows the form of the layers, else fettle."""
    with silently(), suppress(ImportError):
        import peft  # noqa: F401

        return "fettle" if any(is_quantized(m) for m in model.modules()) else "peft"
    return "fettle"


def _reloaded(fresh: Forest, folder: Path, by: str) -> nn.Module:
    """A fresh base with the adapter, as the reader `by` opens it."""
    if by == "peft":
        with silently():
            from peft import PeftModel

            return PeftModel.from_pretrained(fresh.model, folder)
    load_peft(fresh, folder)
    return fresh.model


def _text_logits(model: nn.Module, rows: tuple[tuple[int, ...], ...], front: int) -> Tensor:
    """Logits of the texts alone, without the `front` rows before each."""
    logits = wide_logits(model, rows)
    return logits.view(len(rows), -1, logits.shape[-1])[:, front:].flatten(0, 1)


def read_peft(folder: Path) -> tuple[tuple[Any, ...], Tensors]:
    """A PEFT folder as (edits, their tensors under our names): the adapter, and where it saves whole modules, a `full` of them.

    FettleError where it holds what no edit here can say.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    for method in METHODS:
        if kind in method.types:
            weights = _weights(folder)
            names, saved = _split(config, weights)
            edit, tensors = method.read(config | {"modules_to_save": None}, weights, folder)
            return (edit, Full(targets=names)) if names else (edit,), tensors | saved
    known = ", ".join(t for method in METHODS for t in method.types)
    raise FettleError(f"{folder / CONFIG}: holds a {kind} adapter; only {known} can be read here")


def _split(config: Settings, weights: Tensors) -> tuple[tuple[str, ...], Tensors]:
    """The modules that a folder saves whole, and their tensors by name, taken out of `weights`."""
    found: dict[str, None] = {}
    saved: Tensors = {}
    for key in list(weights):
        name = key.removeprefix(STEM)
        for end in config.get("modules_to_save") or ():
            if match := re.match(rf"(?:.*\.)?{re.escape(end)}(?=\.)", name):
                found[match[0]] = None
                saved[name] = weights.pop(key)
                break
    if config.get("modules_to_save") and not found:
        raise FettleError(
            f"{WEIGHTS}: holds none of the whole modules beside the adapter that {CONFIG} names in 'modules_to_save'; save it again"
        )
    return tuple(found), saved


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
def load_peft(forest: Forest, folder: Path) -> tuple[Any, ...]:
    """Put a PEFT adapter on a base; returns the edits as applied. FettleError where it is not this model's."""
    (edit, *rest), tensors = read_peft(folder)
    edits = (_conversion(edit).fit(forest.model, edit, tensors, folder), *rest)
    for edit in edits:
        edit.apply(forest.model)
        edit.settle(forest.model)
    forest.model.train(forest.model.training)  # new modules begin in training mode, and dropout would be on
    wanted = {key: there for edit in edits for key, there in edit.tensors(forest.model).items()}
    every = dict(forest.model.named_parameters(remove_duplicate=False))
    first = {id(every[key]): key for key in wanted.keys() & every.keys()}
    for key in tensors.keys() & every.keys() - wanted.keys():  # a tied weight once more, under its other name
        if (same := first.get(id(every[key]))) in tensors and torch.equal(tensors[key], tensors[same]):
            del tensors[key]
    if wrong := sorted(wanted.keys() ^ tensors.keys()):
        raise FettleError(
            f"{folder}: '{wrong[0]}' stands only in one of the adapter and the model; it belongs to another base"
        )
    for key, there in wanted.items():
        if there.shape != tensors[key].shape:
            raise FettleError(
                f"{folder}: '{key}' has shape {tuple(tensors[key].shape)}, the model needs {tuple(there.shape)}; it belongs to another base"
            )
        there.copy_(tensors[key])
    return edits
