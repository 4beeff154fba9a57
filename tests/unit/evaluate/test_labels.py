from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fettle.core.errors import FettleError
from fettle.evaluate import Labels, Tags, evaluate, find
from fettle.evaluate.labels import macro_f1, span_counts, spans
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from small import make, rows


def forest(folder: Path, kind: str = "bert", **spec: object) -> Forest:
    make(kind, folder / "model")
    return load(ModelSpec.model_validate({"path": str(folder / "model"), "dtype": "float32", "device": "cpu", **spec}))


def test_macro_f1_is_the_mean_over_labels() -> None:
    wanted, found = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    score = macro_f1(wanted, found)
    assert (
        score.mean == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
        and score.low < score.mean < score.high
        and score.n == 6
    )
    assert macro_f1(wanted, wanted).mean == 1.0


@pytest.mark.parametrize(("tags", "found"), [
    ("B-X I-X O B-Y", {(0, 2, "X"), (3, 4, "Y")}), ("I-X I-X", {(0, 2, "X")}), ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
    ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}), ("O O", set()),
])  # fmt: skip
def test_spans(tags: str, found: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == found


def test_a_span_is_right_where_place_and_type_are() -> None:
    assert span_counts("B-X I-X O B-Y".split(), "B-X O O B-Y".split()) == (1, 2, 2)


def test_files_are_known_by_their_columns(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", [{"text": "x", "label": 1}])
    rows(tmp_path / "b.jsonl", [{"tokens": ["x"], "tags": ["O"]}])
    rows(tmp_path / "c.jsonl", [{"prompt": "x", "answer": "y"}])
    assert [spec.kind for spec in find([str(tmp_path)])] == ["classify", "tag", "task"]


def test_scores_of_each_kind(tmp_path: Path) -> None:
    one = rows(
        tmp_path / "one.jsonl",
        [{"text": f"the soup was {w}", "label": i} for i, w in enumerate(("good", "bad", "warm"))],
    )
    model = forest(tmp_path, task="classify", labels=("a", "b", "c"))
    (result,) = evaluate(model, [Labels(path=str(one))], progress=False).results
    assert list(result.scores) == ["accuracy", "macro_f1"] and len(result.rows) == 3 and result.rows[1].right == "b"
    many = rows(tmp_path / "many.jsonl", [{"text": "good", "labels": ["a", "c"]}, {"text": "bad", "labels": []}])
    model = forest(tmp_path, task="classify", labels=("a", "b", "c"), multi=True)
    assert model.config.problem_type == "multi_label_classification"
    (result,) = evaluate(model, [Labels(path=str(many))], progress=False).results
    assert list(result.scores) == ["micro_f1", "accuracy"] and result.rows[0].right == "a, c"
    number = rows(tmp_path / "number.jsonl", [{"text": "good", "label": 0.5}, {"text": "bad", "label": -1}])
    (result,) = evaluate(
        forest(tmp_path, task="classify", labels=("score",)), [Labels(path=str(number))], progress=False
    ).results
    assert list(result.scores) == ["absolute_error", "squared_error"] and result.kind == "regression"


def test_tags_without_spans_are_scored_by_word(tmp_path: Path) -> None:
    file = rows(tmp_path / "t.jsonl", [{"tokens": ["red", "stones"], "tags": ["ADJ", "NOUN"]}])
    (result,) = evaluate(
        forest(tmp_path, task="tag", labels=("ADJ", "NOUN")), [Tags(path=str(file))], progress=False
    ).results
    assert list(result.scores) == ["word_accuracy", "macro_f1"]


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    file = rows(tmp_path / "t.jsonl", [{"text": "one two " * 60, "label": 0}, {"text": "one", "label": 1}])
    (result,) = evaluate(
        forest(tmp_path, "roberta", task="classify", labels=("a", "b")), [Labels(path=str(file))], progress=False
    ).results
    assert result.about["cut"] == 1 and result.rows[0].prompt_tokens > 62


def test_bad_rows_and_other_models_are_sentences(tmp_path: Path) -> None:
    file = rows(tmp_path / "t.jsonl", [{"text": "one", "label": "c"}, {"text": "", "label": "a"}])
    with pytest.raises(FettleError) as error:
        evaluate(forest(tmp_path, task="classify", labels=("a", "b")), [Labels(path=str(file))], progress=False)
    assert "t.jsonl:1: unknown label 'c'" in str(error.value) and "t.jsonl:2: 'text' is empty" in str(error.value)
    with pytest.raises(FettleError, match="need a model with task: classify"):
        evaluate(forest(tmp_path, task="tag", labels=("a", "b")), [Labels(path=str(file))], progress=False)
