"""LoRA in PEFT's words: rsLoRA, DoRA, ranks that differ by layer, embeddings and heads too.

ours        model.layers.0.self_attn.q_proj.a [r, in]        .b [out, r]              .magnitude [out]
PEFT's      base_model.model.<name>.lora_A.weight [r, in]    .lora_B.weight [out, r]  .lora_magnitude_vector [out]
            base_model.model.<name>.lora_embedding_A [r, V]  .lora_embedding_B [C, r] of an embedding

A LoRA that began with PiSSA is written as the update to the unchanged base that it is, of twice the rank; an AdaLoRA as a
LoRA whose ranks are the triplets it kept, and PEFT's AdaLoRA is read as one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core import FettleError
from fettle.core.spec import nearest
from fettle.models.select import adaptable, linears
from fettle.models.surgery import made_by
from fettle.models.weight import innermost, is_adapter, is_embedding
from fettle.peft import AdaLoRA, LoRA
from fettle.peft.adalora import AdaLoRALinear
from fettle.peft.lora import LoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<name>.+)\.(?:lora_(?P<linear>[ABE])(?:\.weight)?|lora_embedding_(?P<table>[AB])"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?|(?P<base>base)_layer\.weight)"
)
# Settings of PEFT that change what is computed and that LoRA here does not have, with what each means.
UNKNOWN = {
    "use_qalora": "QALoRA's pooling", "use_bdlora": "block-diagonal factors",
    "lora_bias": "a bias of B", "modules_to_save": "whole modules beside the adapter", "layer_replication": "repeated layers",
    "trainable_token_indices": "trained token embeddings", "target_parameters": "parameters outside of linear layers",
    "velora_config": "VeLoRA's groups", "use_velora": "VeLoRA's groups", "monteclora_config": "sampled weights",
    "kasa_config": "KaSA's singular values", "use_kasa": "KaSA's singular values",
    "alora_invocation_tokens": "an adapter that begins at a token",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights too


@torch.no_grad()
def write(model: nn.Module, edit: LoRA | AdaLoRA) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors). FettleError where the adapter lies around another one, or nothing of it is left."""
    layers: dict[str, LoRALinear | AdaLoRALinear] = {}
    layers |= made_by(model, edit, LoRALinear if isinstance(edit, LoRA) else AdaLoRALinear)
    rslora = isinstance(edit, LoRA) and edit.rslora
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        if is_adapter(layer.base):
            raise FettleError(
                f"export: {name} has two adapters, one around the other, which a peft folder cannot say; use --to hf"
            )
        a, b = layer.factors()
        if isinstance(layer, AdaLoRALinear):
            a, b = a[layer.values != 0], b[:, layer.values != 0]
        if not len(a):
            continue
        ranks[name] = len(a)
        plain = isinstance(layer, LoRALinear) and len(a) == layer.rank
        alphas[name] = layer.alpha if plain else layer.scale * (math.sqrt(len(a)) if rslora else len(a))  # type: ignore[assignment]
        stem, table = f"base_model.model.{name}.lora_", is_embedding(layer)
        for ab, value in (("A", a), ("B", b)):
            tensors[f"{stem}embedding_{ab}" if table else f"{stem}{ab}.weight"] = value
        if isinstance(layer, LoRALinear) and layer.magnitude is not None:
            tensors[f"{stem}magnitude_vector"] = layer.magnitude
    if not ranks:
        raise FettleError(
            "export: no layer has any rank left, so there is no adapter to write; train with a larger budget"
        )
    flat = [m for m in layers.values() if not is_embedding(m)]
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _number(a) for name, a in alphas.items() if a != alpha},
        "lora_dropout": edit.dropout,
        "use_rslora": rslora,
        "use_dora": isinstance(edit, LoRA) and edit.dora,
        "target_modules": list(short_targets(model, list(ranks))),
        "fan_in_fan_out": bool(flat) and all(is_in_out(m) for m in flat),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    return settings, tensors


def is_in_out(layer: nn.Module) -> bool:
    """Whether the base stores a layer's weight as [in, out], packed here or not: `fan_in_fan_out`."""
    inner = innermost(layer)
    return bool(getattr(inner, "transposed", isinstance(inner, Conv1D)))


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def short_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The ends of the names ('q_proj') where they mean exactly these layers, else the names."""
    ends = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    return ends if set(adaptable(model, ends)) == set(names) else tuple(names)


def read(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> tuple[LoRA, dict[str, Tensor]]:
    """(edit, its tensors under our names). The edit's targets are the layers that have tensors."""
    _refuse(config, folder / CONFIG)
    layers = _layers(weights, folder / WEIGHTS)
    if config["peft_type"] == "ADALORA":
        return _read_adalora(config, layers)
    usual = int(config["r"])
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        said = int(_pattern(config.get("rank_pattern"), name, usual))
        if len(layer["a"]) != said or layer["b"].shape[1] != said:
            raise FettleError(
                f"{folder / WEIGHTS}: {name} has rank {len(layer['a'])} and {layer['b'].shape[1]}, but {CONFIG} says r = {said}"
            )
        if ("magnitude" in layer) != bool(config.get("use_dora")):
            has = "a magnitude of DoRA, but" if "magnitude" in layer else "no magnitude of DoRA, though"
            raise FettleError(f"{folder / WEIGHTS}: {name} has {has} {CONFIG} says use_dora: {config.get('use_dora')}")
        ranks[name] = said
        alphas[name] = float(_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    edit = _edit(ranks, alphas, usual, float(config["lora_alpha"]), config)
    return edit, {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.items()}


def _edit(
    ranks: Mapping[str, int], alphas: Mapping[str, float], rank: int, alpha: float, config: Mapping[str, Any]
) -> LoRA:
    return LoRA(
        rank=rank, alpha=alpha, dropout=float(config.get("lora_dropout") or 0.0), rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")), targets=tuple(ranks), ranks={n: r for n, r in ranks.items() if r != rank},
        alphas={n: a for n, a in alphas.items() if a != alpha},
    )  # fmt: skip


def _read_adalora(config: dict[str, Any], layers: dict[str, dict[str, Tensor]]) -> tuple[LoRA, dict[str, Tensor]]:
    """B (E A) alpha / (init_r + 1e-5), as PEFT computes it, with whatever triplets are left."""
    scale = float(config["lora_alpha"]) / (int(config["init_r"]) + 1e-5)
    left = {name: layer for name, layer in layers.items() if len(layer["a"])}
    ranks = {name: len(layer["a"]) for name, layer in left.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    edit = _edit(ranks, {n: scale * r for n, r in ranks.items()}, usual, scale * usual, config)
    tensors: dict[str, Tensor] = {}
    for name, layer in left.items():
        tensors |= {f"{name}.a": layer["e"].view(-1, 1) * layer["a"], f"{name}.b": layer["b"]}
    return edit, tensors


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What PEFT takes from a pattern dictionary: the first key that matches the end of the name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _layers(weights: dict[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """By layer: a, b, and where there are, magnitude, AdaLoRA's e, or the base's own weight; float32 or wider."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        match = KEY.fullmatch(key)
        if not match:
            raise FettleError(
                f"{file}: holds '{key}', which is no A or B of a linear layer; merge the adapter with peft and use the model"
            )
        part = next(match[p] for p in ("linear", "table", "magnitude", "base") if match[p]).lower()
        layers.setdefault(match["name"], {})[part] = value.to(torch.promote_types(value.dtype, torch.float32))
    for name, layer in layers.items():
        if "a" not in layer or "b" not in layer:
            raise FettleError(f"{file}: {name} has only one of lora_A and lora_B; the file is incomplete")
    if not layers:
        raise FettleError(f"{file}: no tensors in it")
    return dict(sorted(layers.items()))


def _refuse(config: dict[str, Any], file: Path) -> None:
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


def fit(model: nn.Module, edit: LoRA, tensors: dict[str, Tensor], folder: Path) -> LoRA:
    """The edit with its targets as short as they can be. FettleError where the model lacks one of them.

    PEFT writes the base's weight beside the adapter of an embedding or a head; it must be this base's.
    """
    every = linears(model, exclude_head=False) | {n: m for n, m in model.named_modules() if is_embedding(m)}
    for name in edit.targets:
        if name not in every:
            raise FettleError(f"{folder}: adapts '{name}', which this model does not have; {nearest(name, every)}")
        there, stored = every[name].weight, tensors.pop(f"{name}.base", None)
        if stored is not None and not (there.shape == stored.shape and torch.equal(there, stored.to(there))):  # type: ignore[arg-type]
            raise FettleError(
                f"{folder}: holds another weight of '{name}' than this base has, trained or enlarged with the adapter; "
                "merge it with peft and use the model"
            )
    return edit.model_copy(update={"targets": short_targets(model, edit.targets)})
