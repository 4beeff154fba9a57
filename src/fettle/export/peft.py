"""PEFT's LoRA folder, written and read: adapter_config.json and adapter_model.safetensors.

ours        model.layers.0.self_attn.q_proj.a [r, in]        .b [out, r]
PEFT's      base_model.model.<name>.lora_A.weight [r, in]    .lora_B.weight [out, r]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder, read_json, write_json
from fettle.core.spec import nearest
from fettle.export.common import save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure, plain_logits
from fettle.models.load import load
from fettle.models.select import linears
from fettle.peft.lora import LoRA, LoRALinear

if TYPE_CHECKING:
    from fettle.models.forest import Forest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<ab>[AB])\.weight")
# Settings of PEFT that change what is computed and that LoRA here does not have, with what each means.
UNKNOWN = {
    "use_dora": "DoRA's magnitudes", "use_qalora": "QALoRA's pooling", "use_bdlora": "block-diagonal factors",
    "lora_bias": "a bias of B", "modules_to_save": "whole modules beside the adapter", "layer_replication": "repeated layers",
    "trainable_token_indices": "trained token embeddings", "target_parameters": "parameters outside of linear layers",
    "rank_pattern": "ranks that differ by layer", "alpha_pattern": "alphas that differ by layer", "velora_config": "VeLoRA's groups",
    "use_velora": "VeLoRA's groups", "monteclora_config": "sampled weights", "kasa_config": "KaSA's singular values", "use_kasa": "KaSA's singular values",
    "alora_invocation_tokens": "an adapter that begins at a token",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights too


def export_peft(forest: Forest, edits: Sequence[Edit], folder: Path) -> Parity:
    """Write the adapter; read it back with `peft` where that is installed, else with `read_peft`, on a fresh base; compare."""
    edit = _only_lora(forest, edits)
    wrapped = {n: m for n, m in forest.model.named_modules() if isinstance(m, LoRALinear)}
    reference = measure(forest)
    tensors = {}
    for name, module in wrapped.items():
        for ab in ("a", "b"):
            tensors[f"base_model.model.{name}.lora_{ab.upper()}.weight"] = (
                getattr(module, ab).detach().cpu().contiguous().clone()
            )
    with new_folder(folder) as aside:
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        write_json(aside / CONFIG, _config(forest, edit, wrapped))
        save_tokenizer(forest, aside)
        model, by = _reloaded(forest, aside)
        parity = check(reference, lambda rows: plain_logits(model, rows), str(folder), by)
        write_manifest(aside, "peft", forest, edits, parity)
    return parity


def _only_lora(forest: Forest, edits: Sequence[Edit]) -> LoRA:
    found = [e for e in edits if isinstance(e, LoRA)]
    others = [e for e in edits if not isinstance(e, LoRA) and e.tensors(forest.model)]
    if others or len(found) != 1:
        listed = ", ".join(type(e).__name__ for e in edits) or "none"
        raise FettleError(
            f"export: a peft folder holds one LoRA and nothing else, the edits here are: {listed}; use --to hf, which merges them"
        )
    if forest.spec.config is not None:
        raise FettleError(
            "export: a peft adapter needs a base that others can load, and this one began with random weights; use --to hf"
        )
    return found[0]


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The ends of the names ('q_proj') where they mean exactly these layers, else the names."""
    ends = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    return ends if set(linears(model, ends)) == set(names) else tuple(names)


def _config(forest: Forest, edit: LoRA, wrapped: dict[str, LoRALinear]) -> dict[str, Any]:
    alpha = 2.0 * edit.rank if edit.alpha is None else edit.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(forest.config, "name_or_path", "") or forest.spec.path,
        "revision": forest.spec.revision,
        "r": edit.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": edit.dropout,
        "use_rslora": edit.rslora,
        "target_modules": list(short_targets(forest.model, list(wrapped))),
        "fan_in_fan_out": all(isinstance(m.base, Conv1D) for m in wrapped.values()),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _reloaded(forest: Forest, folder: Path) -> tuple[nn.Module, str]:
    dtype = str(forest.model.dtype).removeprefix("torch.")
    fresh = load(forest.spec.model_copy(update={"dtype": dtype, "device": str(forest.device)}))
    try:
        from peft import PeftModel
    except ImportError:
        load_peft(fresh, folder)
        return fresh.model, "fettle"
    return PeftModel.from_pretrained(fresh.model, folder), "peft"


def read_peft(folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """A PEFT LoRA folder as (edit, its tensors under our names). The edit's targets are the layers that have tensors.

    FettleError where the folder holds something else, or a LoRA with more to it than A and B.
    """
    config = read_json(folder / CONFIG)
    _refuse(config, folder / CONFIG)
    tensors = {}
    for key, value in _weights(folder).items():
        match = KEY.fullmatch(key)
        if not match:
            raise FettleError(
                f"{folder / WEIGHTS}: holds '{key}', which is no A or B of a linear layer; merge the adapter with peft and use the model"
            )
        tensors[f"{match['name']}.{match['ab'].lower()}"] = value.float()
    names = sorted({key.rpartition(".")[0] for key in tensors})
    rank = int(config["r"])
    for name in names:
        a, b = (tensors.get(f"{name}.{ab}") for ab in "ab")
        if a is None or b is None:
            raise FettleError(f"{folder / WEIGHTS}: {name} has only one of lora_A and lora_B; the file is incomplete")
        if a.shape[0] != rank or b.shape[1] != rank:
            raise FettleError(
                f"{folder / WEIGHTS}: {name} has rank {a.shape[0]} and {b.shape[1]}, but {CONFIG} says r = {rank}"
            )
    if not names:
        raise FettleError(f"{folder / WEIGHTS}: no tensors in it")
    edit = LoRA(
        rank=rank, alpha=float(config["lora_alpha"]), dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")), targets=tuple(names),
    )  # fmt: skip
    return edit, tensors


def _refuse(config: dict[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise FettleError(f"{file}: holds a {config.get('peft_type')} adapter; only LORA can be read here")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise FettleError(f"{file}: '{key}' is {config.get(key)!r}; expected a positive number")
    if config.get("bias", "none") != "none":
        raise FettleError(
            f"{file}: bias is '{config['bias']}', trained biases; merge the adapter with peft and use the model"
        )
    for key, what in UNKNOWN.items():
        if config.get(key):
            raise FettleError(
                f"{file}: '{key}' is set ({what}), which a LoRA here does not have; merge the adapter with peft and use the model"
            )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise FettleError(
            f"{file}: init_lora_weights is '{start}', which changed the base's weights too; convert it with peft first"
        )


def _weights(folder: Path) -> dict[str, Tensor]:
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
def load_peft(forest: Forest, folder: Path) -> LoRA:
    """Put a PEFT LoRA on a base; returns the edit as applied. FettleError where the layers are not this model's."""
    edit, tensors = read_peft(folder)
    every = linears(forest.model)
    for name in edit.targets:
        if name not in every:
            raise FettleError(f"{folder}: adapts '{name}', which this model does not have; {nearest(name, every)}")
    edit = edit.model_copy(update={"targets": short_targets(forest.model, edit.targets)})
    edit.apply(forest.model)
    forest.model.train(forest.model.training)  # new modules begin in training mode, and dropout would be on
    for key, there in edit.tensors(forest.model).items():
        if there.shape != tensors[key].shape:
            raise FettleError(
                f"{folder}: '{key}' has shape {tuple(tensors[key].shape)}, the model needs {tuple(there.shape)}; it belongs to another base"
            )
        there.copy_(tensors[key])
    return edit
