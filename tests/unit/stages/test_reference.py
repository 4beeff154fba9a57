"""What a kept reference belongs to: everything that decides what the model was before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fettle.core.families import Edit
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import Full, LoRA
from fettle.quantize import RTN
from fettle.stages.artifact import apply_edits
from fettle.stages.reference import identity_of


def identity(folder: Path, edits: tuple[Edit, ...], seed: int = 0) -> list[Any]:
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    apply_edits(forest, edits, seed=seed)
    return identity_of(forest, None, edits, seed)


def test_what_is_switched_off_does_not_count_and_what_stays_does(tiny_llama: Path) -> None:
    lora = identity(tiny_llama, (LoRA(rank=2),))
    assert lora == identity(tiny_llama, (LoRA(rank=4),), seed=3), "off, both are the base"
    quantized = identity(tiny_llama, (RTN(), LoRA(rank=2)))
    assert quantized != lora, "the base is another one"
    assert quantized == identity(tiny_llama, (RTN(), LoRA(rank=4)))


@pytest.mark.parametrize("other", [(Full(targets="q_proj"),), (Full(targets=("q_proj", "k_proj")),)])
def test_what_cannot_be_switched_off_counts(other: tuple[Edit, ...], tiny_llama: Path) -> None:
    assert identity(tiny_llama, other) != identity(tiny_llama, (LoRA(rank=2),))
    assert identity(tiny_llama, other) != identity(tiny_llama, (Full(),))
