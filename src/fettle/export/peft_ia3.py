"""(IA)^3 in PEFT's words.

ours        model.layers.0.self_attn.k_proj.scale [out]        model.layers.0.mlp.down_proj.scale [in]
PEFT's      base_model.model.<name>.ia3_l [out, 1]             <name>.ia3_l [1, in], of a layer in `feedforward_modules`
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.spec import nearest
from fettle.export.peft_lora import CONFIG, WEIGHTS, is_in_out, short_targets
from fettle.models.select import linears
from fettle.models.weight import is_adapter, is_linear
from fettle.peft import IA3
from fettle.peft.ia3 import Scaled, scaled_layers

KEY = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.ia3_l")


@torch.no_grad()
def write(model: nn.Module, edit: IA3) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors). FettleError where a vector scales experts, or lies around another adapter."""
    tensors: dict[str, Tensor] = {}
    names: dict[bool, list[str]] = {True: [], False: []}  # by whether the input is scaled
    flat: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, Scaled) or module.edit != edit:
            continue
        if not is_linear(module) or is_adapter(module.base):
            what = "another adapter inside" if is_adapter(module.base) else "a vector for the inside of experts"
            raise FettleError(f"export: {name} has {what}, which a peft folder cannot say; use --to hf")
        names[module.of_input].append(name)
        flat.append(module)
        tensors[f"base_model.model.{name}.ia3_l"] = module.scale[None] if module.of_input else module.scale[:, None]
    inputs, outputs = (list(short_targets(model, names[kind])) for kind in (True, False))
    settings = {
        "peft_type": "IA3",
        "target_modules": outputs + inputs,
        "feedforward_modules": inputs,
        "fan_in_fan_out": all(is_in_out(m) for m in flat),
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    return settings, tensors


def read(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> tuple[IA3, dict[str, Tensor]]:
    """(edit, its tensors under our names). The edit's layers are those that have tensors."""
    if config.get("modules_to_save"):
        raise FettleError(
            f"{folder / CONFIG}: 'modules_to_save' is set (whole modules beside the adapter), which an IA3 here does not have"
        )
    tensors: dict[str, Tensor] = {}
    names: dict[bool, list[str]] = {True: [], False: []}
    for key, value in weights.items():
        match = KEY.fullmatch(key)
        if not match or value.ndim != 2 or 1 not in value.shape:
            raise FettleError(f"{folder / WEIGHTS}: holds '{key}' {tuple(value.shape)}, which is no vector of IA3")
        tensors[f"{match['name']}.scale"] = value.flatten()
        names[_is_input(config, match["name"], value, folder)].append(match["name"])
    if not tensors:
        raise FettleError(f"{folder / WEIGHTS}: no tensors in it")
    return IA3(outputs=tuple(sorted(names[False])), inputs=tuple(sorted(names[True]))), tensors


def _is_input(config: dict[str, Any], name: str, value: Tensor, folder: Path) -> bool:
    """Whether a vector scales the input, by its shape and by `feedforward_modules`, which must agree."""
    said = config.get("feedforward_modules") or []
    if isinstance(said, str):
        by_name = re.fullmatch(said, name) is not None
    else:
        by_name = any(name == end or name.endswith(f".{end}") for end in said)
    if by_name != (value.shape[0] == 1) and value.numel() > 1:
        raise FettleError(
            f"{folder}: the vector of {name} is {tuple(value.shape)}, but {CONFIG} says that it scales the "
            f"{'input' if by_name else 'output'}"
        )
    return by_name


def fit(model: nn.Module, edit: IA3, tensors: dict[str, Tensor], folder: Path) -> IA3:
    """The edit as shortly as it can be said of this model. FettleError where the model lacks a layer."""
    every = linears(model)
    outputs, inputs = tuple(edit.outputs or ()), tuple(edit.inputs or ())
    for name in (*outputs, *inputs):
        if name not in every:
            raise FettleError(f"{folder}: adapts '{name}', which this model does not have; {nearest(name, every)}")
    try:
        usual = scaled_layers(IA3(), model)
    except FettleError:  # blocks that are not understood; the layers have names
        usual = None
    if usual is not None and not usual[2] and ({*usual[0]}, {*usual[1]}) == ({*outputs}, {*inputs}):
        return IA3()
    return IA3(outputs=short_targets(model, outputs), inputs=short_targets(model, inputs))
