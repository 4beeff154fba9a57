"""The held-out loss: its value, and that neither modes nor generators nor gradients show that it was taken."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.data import DataSpec, prepare
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import SFT
from fettle.stages import load_recipe
from fettle.stages.report import held_out
from fettle.train import Validation
from fettle.train.log import draw_loss
from fettle.train.parallel import World


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> tuple:
    forest = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    rows = [{"prompt": f"Count {i}.", "completion": "one " * (1 + i % 7)} for i in range(30)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([DataSpec(path=str(tmp_path / "held.jsonl"))], forest.tokenizer, 64)
    return forest, Validation(corpus, corpus.batches_per_epoch, 10)


def test_it_is_the_mean_over_all_learned_tokens(made: tuple) -> None:
    forest, validation = made
    found = validation.measure(forest, SFT())
    with torch.no_grad():
        parts = [SFT()(forest, validation.corpus.batch(i)) for i in range(validation.count)]
    assert validation.count > 2
    assert found["validation_loss"] == pytest.approx(
        float(sum(p.sum for p in parts)) / float(sum(p.count for p in parts)), rel=1e-6
    )


def test_shares_of_processes_add_up(made: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    forest, validation = made
    sums: list[list[float]] = []
    monkeypatch.setattr(World, "sum", lambda self, tensors: sums.append([t.item() for t in tensors]))
    found = []
    for size in (1, 4, validation.count + 3):
        sums.clear()
        for rank in range(size):
            validation.measure(forest, SFT(), World(rank, size))
        found.append(np.sum(sums, 0).tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)


def test_it_leaves_no_trace(made: tuple) -> None:
    forest, validation = made
    forest.model.train()
    odd = forest.model.model.layers[0]
    odd.eval()
    modes = [module.training for module in forest.model.modules()]

    class Noisy(SFT):
        def __call__(self, model, batch):
            random.random(), np.random.rand(), torch.rand(3)
            assert not model.model.training and not torch.is_grad_enabled()
            return super().__call__(model, batch)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    validation.measure(forest, Noisy())
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected
    assert [module.training for module in forest.model.modules()] == modes and not odd.training
    assert all(p.grad is None for p in forest.model.parameters())


def test_when_it_is_due(made: tuple) -> None:
    validation = made[1]
    for steps in (1, 9, 10, 11, 30, 31):
        due = [step for step in range(1, steps + 1) if validation.due(step, steps)]
        assert due[-1] == steps and len(due) == validation.times(steps)


def test_a_mistake_names_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    with pytest.raises(FettleError, match=r"r\.yaml:3: unknown key 'validation.evry': did you mean 'every'\?"):
        recipe.write_text("data: [{path: a.jsonl}]\noutput: out\nvalidation: {data: [{path: b.jsonl}], evry: 3}\n")
        load_recipe(recipe)


def test_it_stands_in_the_picture_and_the_report(tmp_path: Path, made: tuple) -> None:
    rows = [{"step": i, "loss": 3 / i, "lr": 1e-3, "tokens": 1, "learned": 1, "seconds": 1} for i in range(1, 41)]
    draw_loss(rows, tmp_path / "plain.png")
    for row in rows[9::10]:
        row["validation_loss"] = row["loss"] + 0.2
    rows[19]["validation_loss"] = None  # not finite
    draw_loss(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert held_out(rows) == "0.5000 (step 10) -> 0.2750 (step 40), lowest 0.2750 (step 40)"
    assert held_out(rows[:5]) == ""
    console = Console(record=True, width=100)
    console.print(made[1].corpus.table("held-out data"))
    assert "held-out data" in console.export_text()
