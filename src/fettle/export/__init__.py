"""Formats that others read; every export is read back and its logits compared before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.spec import nearest
from fettle.export.awq import export_awq as export_awq
from fettle.export.bitsandbytes import export_bitsandbytes as export_bitsandbytes
from fettle.export.compressed_tensors import export_compressed_tensors as export_compressed_tensors
from fettle.export.gguf import export_gguf as export_gguf
from fettle.export.gptq import export_gptq as export_gptq
from fettle.export.hf import export_hf as export_hf
from fettle.export.llama import export_llama as export_llama
from fettle.export.parity import Parity as Parity
from fettle.export.peft import export_peft as export_peft
from fettle.export.peft import load_peft as load_peft
from fettle.export.peft import read_peft as read_peft

if TYPE_CHECKING:
    from fettle.models.forest import Forest


FORMATS: dict[str, Callable[[Forest, Sequence[Edit], Path, torch.dtype | None], Parity]] = {
    "hf": export_hf,
    "peft": export_peft,
    "llama": export_llama,
    "compressed-tensors": export_compressed_tensors,
    "gptq": export_gptq,
    "gptq-v2": partial(export_gptq, version=2),
    "awq": export_awq,
    "gguf": export_gguf,
    "bitsandbytes": export_bitsandbytes,
}
TYPED = {"gguf": export_gguf, "bitsandbytes": export_bitsandbytes}  # those that round by themselves, to a type


def export(
    forest: Forest, edits: Sequence[Edit], folder: Path, to: str, dtype: str | None = None, type: str | None = None
) -> Parity:
    """Write a model with its edits in a format of FORMATS; returns how exactly it reads back.

    `dtype` (float32, bfloat16, float16) is that of merged weights; None keeps the model's. `type` is one of the format's own.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise FettleError(f"export: dtype '{dtype}' is none of float32, bfloat16, float16")
    if to not in FORMATS:
        raise FettleError(f"export: there is no format '{to}': {nearest(to, FORMATS)}")
    weights = None if dtype is None else getattr(torch, dtype)
    if type is None:
        return FORMATS[to](forest, edits, folder, weights)
    if to not in TYPED:
        raise FettleError(f"export: --type is for {' and '.join(TYPED)}; {to} has none, quantize the model first")
    return TYPED[to](forest, edits, folder, weights, type=type)
