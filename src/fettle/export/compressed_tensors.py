"""compressed-tensors: the form that vLLM and transformers load; github.com/vllm-project/compressed-tensors.

    weight_packed  int32 [N, ceil(K b/32)]      'pack-quantized': 4 and 8 bits, symmetric or not
    weight         int8 [N, K]                  'int-quantized': 8 bits, with activations in integers too (W8A8)
    weight_scale   [N, G] in the type of the model, which its readers give to scales

Each layer is named in the group of its grid, so a model may be on several; what is not packed stands under `ignore`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.export.packed import Format, Reader, export_folder, reread_here
from fettle.export.parity import Parity, silently
from fettle.models.experts import is_stacked
from fettle.models.tasks import auto_class
from fettle.quantize.activations import Activations
from fettle.quantize.layouts import affine_of, compressed
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.packed import Quantized

if TYPE_CHECKING:
    from fettle.models.forest import Forest

TAKES = "integers of 4 or 8 bits"
ADVICE = "{kind: rtn, grid: {bits: 4, group: 128}}"


def export_compressed_tensors(
    forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None
) -> Parity:
    """Write the packed model; read it back with transformers where compressed-tensors is installed, else with fettle; compare."""
    scales = dtype or forest.dtype

    def fit(name: str, packed: Quantized) -> Quantized:
        weight = affine_of(packed)
        if weight.bits not in (4, 8):
            raise FettleError(f"its weights have {weight.bits} bits")
        compressed(weight)
        return weight.with_scales(scales).packed()

    form = Format(
        "compressed-tensors",
        TAKES,
        ADVICE,
        str(scales).removeprefix("torch."),
        fit,
        tensors,
        config_of,
        activations=True,
    )
    return export_folder(form, forest, edits, folder, dtype, lambda *aside: _reread(forest, scales, *aside))


def tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """What stands in the place of a layer's weight."""
    if layer.transposed:
        raise FettleError(
            "export: its layers are Conv1D, as GPT-2's are, and compressed-tensors is for nn.Linear; use --to gguf"
        )
    made = compressed(affine_of(layer.packed), whole=_is_whole(layer))
    held = layer.held_range
    if held is not None:
        made["input_scale"] = held[0].to(layer.like.dtype).reshape(1)
        if held[1] is not None:
            middle = 2 ** (layer.activations.bits - 1)  # type: ignore[union-attr]
            made["input_zero_point"] = (held[1] - middle).to(torch.int8).reshape(1)
    return made


def _is_whole(layer: QuantizedLinear) -> bool:
    return layer.activations is not None and layer.packed.grid.bits == 8


def config_of(layers: dict[str, QuantizedLinear], dense: list[str]) -> dict[str, Any]:
    """The `quantization_config`."""
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        group = {
            "weights": _weights(layer), "input_activations": _inputs(layer.activations), "output_activations": None,
            "format": "int-quantized" if _is_whole(layer) else "pack-quantized",
        }  # fmt: skip
        same = next((g for g in groups if {k: g[k] for k in group} == group), None)
        if same is None:
            groups.append(group | {"targets": [name]})
        else:
            same["targets"].append(name)
    forms = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision", "ignore": dense,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)}, "kv_cache_scheme": None,
    }  # fmt: skip


def _weights(layer: QuantizedLinear) -> dict[str, Any]:
    packed = layer.packed
    whole_row = packed.length == packed.shape[1]
    return {
        "num_bits": packed.grid.bits, "type": "int", "symmetric": packed.grid.symmetric, "dynamic": False,
        "strategy": "channel" if whole_row else "group", "group_size": None if whole_row else packed.length,
    }  # fmt: skip


def _inputs(activations: Activations | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    plain = activations.levels == "int" and activations.range == "minmax" and not activations.narrow
    if not plain or isinstance(activations.group, int) or activations.outliers is not None:
        raise FettleError(
            "export: activations are rounded in a way that compressed-tensors does not have; it takes integers by token or by "
            "tensor with range: minmax"
        )
    return {
        "num_bits": activations.bits, "type": "int", "symmetric": activations.symmetric, "dynamic": not activations.static,
        "strategy": "token" if activations.group == "row" else "tensor",
    }  # fmt: skip


def _reread(forest: Forest, scales: torch.dtype, folder: Path, inputs: bool) -> Reader:
    """With transformers where it computes what the file says, in float32; `inputs`: whether layers round theirs.

    With zero points it opens a folder only by dequantizing it, of one group, in the type of the scales, and lets go of what is
    said of activations. Experts that it stacks it looks for packed ones of, and these are as they were.
    """
    from transformers import AutoConfig, CompressedTensorsConfig

    spec = forest.spec.model_copy(update={"task": forest.task})
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    groups = list(config.quantization_config["config_groups"].values())
    uneven = not all(group["weights"]["symmetric"] for group in groups)
    dequantized = len(groups) == 1 and scales == torch.float32 and not inputs
    stacked = any(is_stacked(module) for module in forest.model.modules())
    if importlib.util.find_spec("compressed_tensors") is None or uneven and not dequantized or stacked:
        return reread_here(forest, folder, inputs)
    for group in groups:
        group["input_activations"] = group["input_activations"] if inputs else None
    said = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if uneven else {}

    @silently()
    def opened() -> nn.Module:
        return auto_class(spec, forest.config).from_pretrained(  # type: ignore[no-any-return]
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            **said,
        )

    return "transformers with compressed-tensors", opened
