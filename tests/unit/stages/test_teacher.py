"""What a teacher said is kept by example: whatever the packing, it comes back in the order of the learned tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fettle.core.batch import IGNORE
from fettle.core.files import read_json
from fettle.data import DataSpec, prepare
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives.distill import GIVEN, Distill, Live, Teacher, given
from fettle.peft import Full, LoRA
from fettle.quantize import QAT, Grid
from fettle.stages.artifact import apply_edits
from fettle.stages.teacher import Said, taught
from small import rows

OBJECTIVE = Distill(teacher=Teacher(cached=True), top_k=9, temperature=1.5)


def tuned(folder: Path, *edits: Any) -> Forest:
    return apply_edits(load(ModelSpec(path=str(folder), dtype="float32")), edits)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [{"prompt": f"Count {i}.", "completion": "one two " * (1 + i % 4)} for i in range(14)]
    return rows(tmp_path / "data.jsonl", texts)


@pytest.mark.parametrize("edits", [(LoRA(rank=2), QAT(grid=Grid(bits=2))), (Full(), QAT(grid=Grid(bits=2)))], ids=["lora", "full"])  # fmt: skip
def test_it_is_what_the_model_from_before_the_stage_says(
    edits: Any, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    """In full precision, although the stage rounds from its first step on; also where every weight will train."""
    forest, base = tuned(tiny_llama, *edits), tuned(tiny_llama)
    corpus = prepare([DataSpec(path=str(data))], forest.tokenizer, 96)
    assert taught(OBJECTIVE, forest, [corpus]) is OBJECTIVE and isinstance(corpus.beside, Said)
    blank = corpus.batch(0)
    assert torch.allclose(given(blank, torch.device("cpu"))(slice(None)).logps(1.5).exp().sum(1), torch.ones(()))
    said = corpus.beside
    said.fill(forest, 7, "x", tmp_path / "cache")
    live = Live(1.5, 9, base)
    for index in range(7):  # more than an epoch, so that rows are packed anew
        batch = corpus.batch(index)
        learned = (batch.targets != IGNORE).nonzero()[:, 0]
        mine, theirs = given(batch, torch.device("cpu"))(slice(None)), live.targets(forest, batch, learned)(slice(None))
        assert mine.ids is not None and theirs.ids is not None and len(mine.ids) == len(learned) > 0
        assert torch.equal(mine.ids, theirs.ids) and torch.allclose(mine.logits, theirs.logits, atol=1e-5)
        assert torch.allclose(mine.logps(1.5), theirs.logps(1.5), atol=1e-5)
        assert torch.allclose(mine.logps(1.5).exp().sum(1), torch.ones(()), atol=1e-5)
    (folder,) = (tmp_path / "cache").glob("teacher-*")
    assert read_json(folder / "manifest.json")["objective"]["top_k"] == 9
    loss = OBJECTIVE(forest, corpus.batch(0))
    loss.sum.backward()
    assert float(loss.sum.detach()) > 0


def test_another_teacher_another_temperature_and_other_data_are_kept_apart(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    forest, cache = tuned(tiny_llama, LoRA(rank=2)), tmp_path / "cache"
    corpus = prepare([DataSpec(path=str(data))], forest.tokenizer, 96)
    changes = ({}, {}, {"temperature": 2.0}, {"top_k": 4}, {"teacher": Teacher(path=str(tiny_llama), cached=True)})
    found = []
    for change in changes:
        taught(OBJECTIVE.model_copy(update=change), forest, [corpus])
        corpus.beside.fill(forest, 2, "x", cache)  # type: ignore[union-attr]
        found.append(len(list(cache.glob("teacher-*"))))
    assert found == [1, 1, 2, 3, 4]
    corpus.beside.fill(forest, 2, "y", None)  # type: ignore[union-attr]
    assert len(list(cache.glob("teacher-*"))) == 4 and set(GIVEN.values()) <= corpus.batch(0).extra.keys()


@pytest.mark.parametrize(("cached", "top_k"), [(False, None), (False, 9), (False, 400), (True, 9), (True, 400)])
def test_rows_that_only_fill_up_a_teacher_s_embedding_say_nothing(
    cached: bool, top_k: int | None, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    """The student itself with 64 rows more, as likely as any other: it teaches what the student says."""
    forest = tuned(tiny_llama, LoRA(rank=2))
    wide = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    wide.model.resize_token_embeddings(len(forest.tokenizer) + 64, mean_resizing=False)
    wide.model.get_output_embeddings().weight.data[-64:].normal_()
    wide.model.save_pretrained(tmp_path / "wide")
    wide.tokenizer.save_pretrained(tmp_path / "wide")
    objective = Distill(teacher=Teacher(path=str(tmp_path / "wide"), dtype="float32", cached=cached), top_k=top_k)
    corpus = prepare([DataSpec(path=str(data))], forest.tokenizer, 96)
    objective = taught(objective, forest, [corpus])
    if cached:
        corpus.beside.fill(forest, 1, "x", None)  # type: ignore[union-attr]
    loss = objective(forest, corpus.batch(0))
    assert abs(loss.sum.item()) < 1e-5 * float(loss.count)
    loss.sum.backward()
