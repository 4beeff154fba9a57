"""What a model prefers: accuracy, calibration and length bias, worked by hand and of a small model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.core.errors import FettleError
from fettle.evaluate import evaluate, find
from fettle.evaluate.preference import Judged, Preferences, calibration, correlation, holds_preferences
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec

ROWS = [
    {"prompt": "Count.", "chosen": "one two three", "rejected": "bread"},
    {"prompt": "Good morning.", "chosen": "Yes.", "rejected": "A long answer in the afternoon."},
    {"prompt": "p", "answers": ["b b", "a", "c c c"], "ranks": [2, 1, 3]},
]


def test_calibration_by_hand() -> None:
    """Four pairs at odds of three to one, three of them right: sure of 0.75, right in 0.75. Two at a tie: sure of a half."""
    d = math.log(3)
    error, table = calibration(np.array([d, d, d, -d]))
    assert error == pytest.approx(0) and table == [{"confidence": pytest.approx(0.75), "right": 0.75, "pairs": 4}]
    error, table = calibration(np.array([d, d, d, d, 0.0, 0.0]))
    assert error == pytest.approx(4 / 6 * 0.25)
    assert [row["pairs"] for row in table] == [2, 4]


def test_length_correlation_is_within_prompts() -> None:
    """Prompts with long answers and great rewards say nothing; within each the shorter one has the greater reward."""
    judged = [
        Judged("a", np.array([1.0, 0.0]), np.array([1.0, 2.0]), (1, 2)),
        Judged("b", np.array([9.0, 8.0]), np.array([11.0, 12.0]), (1, 2)),
    ]
    assert correlation(judged) == pytest.approx(-1)
    assert correlation([Judged("a", np.array([1.0, 1.0]), np.array([1.0, 2.0]), (1, 2))]) is None


@pytest.fixture(scope="module")
def forest(tiny_llama: Path) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32", device="cpu"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_language_model_goes_by_its_likelihood_a_token(forest: Forest, file: Path) -> None:
    assert holds_preferences(file) and isinstance(find([str(file)])[0], Preferences)
    (result,) = evaluate(forest, [Preferences(path=str(file))], progress=False).results
    tokenizer = forest.tokenizer

    def mean(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logps = forest.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(logps[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:])].mean())

    right = [mean(r["prompt"], r["chosen"]) > mean(r["prompt"], r["rejected"]) for r in ROWS[:2]]  # type: ignore[arg-type]
    a, b, c = (mean("p", x) for x in ("a", "b b", "c c c"))
    wanted = [*map(float, right), ((a > b) + (a > c) + (b > c)) / 3]
    assert [row.score for row in result.rows] == pytest.approx(wanted)
    assert result.scores["accuracy"].mean == pytest.approx(np.mean(wanted))
    assert result.scores["people_prefer_longer"].mean == pytest.approx(1 / 5)
    assert {result.scores[name].n for name in ("accuracy", "prefers_longer", "people_prefer_longer")} == {3}, "by row"
    assert set(result.families) == {"chosen longer", "chosen shorter"}
    assert "brier" not in result.scores and result.about["pairs"] == 5
    assert -1 <= result.about["length_correlation"] <= 1


def test_a_reward_model_is_calibrated(tiny_llama: Path, file: Path) -> None:
    spec = ModelSpec(path=str(tiny_llama), task="classify", labels=("reward",), dtype="float32", device="cpu")
    (result,) = evaluate(load(spec), [Preferences(path=str(file))], progress=False).results
    assert result.scores.keys() == {"accuracy", "calibration_error", "brier", "prefers_longer", "people_prefer_longer"}
    assert sum(row["pairs"] for row in result.about["calibration"]) == 5


def test_rows_that_are_no_preferences_are_named(forest: Forest, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(FettleError, match=r"pairs.jsonl:2: chosen and rejected are the same"):
        evaluate(forest, [Preferences(path=str(file))], progress=False)


def test_a_model_of_several_labels_has_no_reward(tiny_llama: Path, file: Path) -> None:
    spec = ModelSpec(path=str(tiny_llama), task="classify", labels=("no", "yes"), dtype="float32", device="cpu")
    with pytest.raises(FettleError, match="a head of one output"):
        evaluate(load(spec), [Preferences(path=str(file))], progress=False)


def test_prompts_that_are_texts_are_read_as_in_training(forest: Forest, tmp_path: Path) -> None:
    """With chat they are the conversations that they stand for, system turn and all."""
    texts = [{"system": "Be brief.", "prompt": "Count.", "chosen": "one", "rejected": "bread"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]
    talks = [
        {
            "messages": turns,
            "chosen": {"role": "assistant", "content": "one"},
            "rejected": {"role": "assistant", "content": "bread"},
        }
    ]
    said = {}
    for name, rows in {"texts": texts, "talks": talks}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for chat in (False, True):
            (spec,) = find([str(tmp_path / f"{name}.jsonl")], chat=chat)
            said[name, chat] = evaluate(forest, [spec]).results[0].rows[0].output
    assert said["texts", True] == said["talks", True] == said["talks", False] != said["texts", False]
