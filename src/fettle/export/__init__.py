"""Formats that others read; every export is read back and its logits compared before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.spec import nearest
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
}


def export(forest: Forest, edits: Sequence[Edit], folder: Path, to: str, dtype: str | None = None) -> Parity:
    """Write a model with its edits in a format of FORMATS; returns how exactly it reads back.

    `dtype` (float32, bfloat16, float16) is that of merged weights; None keeps the model's.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise FettleError(f"export: dtype '{dtype}' is none of float32, bfloat16, float16")
    if to not in FORMATS:
        raise FettleError(f"export: there is no format '{to}': {nearest(to, FORMATS)}")
    return FORMATS[to](forest, edits, folder, None if dtype is None else getattr(torch, dtype))
