"""GPTQ's folders, versions 1 and 2: what vLLM, ExLlama, GPTQModel and others load; github.com/AutoGPTQ/AutoGPTQ.

    qweight int32 [K b/32, N]      qzeros int32 [G, N b/32]      scales float16 [G, N]      g_idx int32 [K]

The layout is of any integer grid, not of the method GPTQ alone. One number of bits and one group size for all layers; layers
that are not packed stand in `dynamic` with '-:'. Version 1 stores zero points less one, and has no place for a zero point of 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.export.packed import Format, export_folder, one_grid, reread_here
from fettle.export.parity import Parity
from fettle.quantize.layouts import affine_of, gptq
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.packed import Quantized

if TYPE_CHECKING:
    from fettle.models.forest import Forest

BITS = (2, 3, 4, 8)
TAKES = "integers of 2, 3, 4 or 8 bits, one number of bits and one group size in all layers"
ADVICE = "{kind: rtn, grid: {bits: 4, group: 128, scale: float16}}"


def export_gptq(
    forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None, version: int = 1
) -> Parity:
    """Write the packed model in a version of the format, open it as fettle opens such folders, compare."""

    def fit(name: str, packed: Quantized) -> Quantized:
        weight = affine_of(packed).with_scales(torch.float16)
        if weight.bits not in BITS:
            raise FettleError(f"its weights have {weight.bits} bits")
        try:
            gptq(weight, version)
        except FettleError as error:
            raise FettleError(
                f"{error}{'; use --to gptq-v2' if version == 1 and 'zero point 0' in str(error) else ''}"
            ) from None
        return weight.packed()

    def tensors(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
        if layer.transposed:
            raise FettleError(
                "export: its layers are Conv1D, as GPT-2's are, which readers of GPTQ take for nn.Linear; use --to gguf"
            )
        return gptq(affine_of(layer.packed), version)

    form = Format(
        "gptq" if version == 1 else "gptq-v2", TAKES, ADVICE, "float16", fit, tensors,
        lambda layers, dense: config_of(layers, dense, version),
    )  # fmt: skip
    return export_folder(form, forest, edits, folder, dtype, lambda *aside: reread_here(forest, *aside))


def config_of(layers: dict[str, QuantizedLinear], dense: list[str], version: int) -> dict[str, Any]:
    """The `quantization_config`. FettleError where layers differ in bits or groups."""
    bits, group = one_grid(layers, "gptq")
    left = [name for name in dense if name.rsplit(".", 1)[-1] not in ("lm_head", "score", "classifier")]
    said: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "lm_head": False,
        "sym": all(layer.packed.grid.symmetric for layer in layers.values()),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "pack_dtype": "int32",
    }  # fmt: skip
    if left:
        said["dynamic"] = {f"-:{re.escape(name)}$": {} for name in left}
    return said
