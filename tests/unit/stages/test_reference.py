"""What a kept reference belongs to: everything that decides what the model was before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fettle.core.families import Edit
from fettle.data import DataSpec, prepare
from fettle.data.forms import form_of
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import KTO
from fettle.peft import Full, LoRA, PromptTuning
from fettle.quantize import RTN
from fettle.stages.artifact import apply_edits
from fettle.stages.reference import Kept, identity_of, refer
from small import rows


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


def test_mismatched_answers_are_cut_to_the_policy_s_context_by_every_reference(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """A long prompt before a short answer and a short one before a long; with its soft prompt off the policy would see more."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    plain = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **plain)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    long = "bread " * 36
    judged = [{"prompt": long, "completion": " a", "label": True}, {"prompt": "b", "completion": long, "label": False}]
    data = rows(tmp_path / "judged.jsonl", judged)
    forest = load(ModelSpec(path=str(tmp_path / "gpt2"), dtype="float32"))
    apply_edits(forest, [PromptTuning(tokens=8)])
    corpus = prepare([DataSpec(path=str(data))], forest.tokenizer, 256, form=form_of(forest, "judged"))
    assert forest.context == 56 and corpus.counts[0].kept == 2 and corpus.batches_per_epoch == 1
    losses = []
    for mode in ("off", "cached", "copy"):
        objective = KTO(reference=mode)
        refer(forest, objective, [corpus])
        if isinstance(corpus.beside, Kept):
            corpus.beside.fill(forest, 1, "x", None)
        loss = objective(forest, corpus.batch(0))
        assert loss.metrics["kl"] > 0
        losses.append(loss.sum.item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
