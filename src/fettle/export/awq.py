"""AWQ's folders in the GEMM version: what vLLM and AutoAWQ load; github.com/casper-hansen/AutoAWQ.

    qweight int32 [K, N/8]      qzeros int32 [G, N/8]      scales float16 [G, N]

The layout is of any integer grid of 4 bits, not of the method AWQ alone. One group size for all layers; layers that are not
packed stand in `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.export.packed import Format, export_folder, one_grid, reread_here
from fettle.export.parity import Parity
from fettle.quantize.layouts import affine_of, awq
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.packed import Quantized

if TYPE_CHECKING:
    from fettle.models.forest import Forest

TAKES = "integers of 4 bits, one group size in all layers"
ADVICE = "{kind: rtn, grid: {bits: 4, group: 128, symmetric: false, scale: float16}}"


def export_awq(forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None) -> Parity:
    """Write the packed model, open it as fettle opens such folders, compare."""

    def fit(name: str, packed: Quantized) -> Quantized:
        weight = affine_of(packed).with_scales(torch.float16)
        awq(weight)
        return weight.packed()

    form = Format("awq", TAKES, ADVICE, "float16", fit, tensors, config_of)
    return export_folder(form, forest, edits, folder, dtype, lambda *aside: reread_here(forest, *aside))


def tensors(layer: QuantizedLinear) -> dict[str, Tensor]:
    """What stands in the place of a layer's weight."""
    if layer.transposed:
        raise FettleError(
            "export: its layers are Conv1D, as GPT-2's are, which readers of AWQ take for nn.Linear; use --to gguf"
        )
    return awq(affine_of(layer.packed))


def config_of(layers: dict[str, QuantizedLinear], dense: list[str]) -> dict[str, Any]:
    """The `quantization_config`. FettleError where layers differ in their groups."""
    _, group = one_grid(layers, "awq")
    return {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": dense,
    }  # fmt: skip
