"""Through the command line, in this process: encoders with heads and encoder-decoders are checked, trained, evaluated, exported, opened again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fettle.cli import main
from small import make, rows
from trajectory.conftest import trace

RECIPE = """
model: {{path: {model}, dtype: float32, attention: auto{model_more}}}
edits: {edits}
data:
  - {{path: {data}}}
optim: {{lr: 2.0e-3, steps: 40, accumulate: 1, warmup: 0}}
batch: {{tokens: 192}}
evaluate: [{{kind: {task}, path: {data}}}]
output: {output}
"""
LORA = "[{kind: lora, rank: 4}]"
FULL = "[{kind: full}]"
TEXTS = [
    {"text": f"{a} {b}", "label": "positive" if good else "negative"}
    for good in (0, 1) for a in ("the soup was", "a", "the day was")
    for b in (("good", "warm", "good and warm") if good else ("bad", "cold", "bad and cold"))
]  # fmt: skip
WORDS = [
    {"tokens": ["Ada", "lives", "in", place], "tags": ["B-PER", "O", "O", "B-LOC"]} for place in ("Paris", "Rome")
] + [{"tokens": ["count", "the", "red", "stones"], "tags": ["O", "O", "O", "O"]}] * 4
PAIRS = [{"prompt": f"count {w}", "completion": w} for w in ("one", "two", "three", "four", "five")]


def recipe(folder: Path, model: Path, data: Path, task: str, edits: str, more: str = "") -> Path:
    text = RECIPE.format(model=model, data=data, task=task, edits=edits, model_more=more, output=folder / "run")
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


Cli = Callable[..., str]


@pytest.fixture
def fettle(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process; returns what it said. `code` is the exit code that is expected."""

    def call(*words: str, code: int = 0) -> str:
        found = 0
        try:
            main(list(words))
        except SystemExit as end:
            found = int(end.code or 0)
        said = " ".join(capsys.readouterr())
        assert found == code, said
        return " ".join(said.split())

    return call


def scores(folder: Path) -> dict[str, Any]:
    (result,) = json.loads((folder / "results.json").read_text())["results"]
    return {name: score["mean"] for name, score in result["scores"].items()}


@pytest.mark.parametrize(("kind", "edits"), [("bert", LORA), ("roberta", FULL)])
def test_a_classifier_from_a_base_without_a_head(kind: str, edits: str, fettle: Cli, tmp_path: Path) -> None:
    model, data = make(kind, tmp_path / "model"), rows(tmp_path / "data.jsonl", TEXTS)
    file = recipe(tmp_path, model, data, "classify", edits, ", task: classify")
    said = fettle("check", str(file), "optim.lr=1e-3")
    assert "labels, from the data: negative, positive" in said and "begin at random" in said and "ready to run" in said
    fettle("run", str(file), "optim.lr=5e-3")
    losses = [loss for _, loss, _ in trace(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    assert scores(tmp_path / "run" / "evaluation")["accuracy"] > 0.9
    fettle("eval", str(tmp_path / "run"), str(data), "-o", str(tmp_path / "eval"))
    assert scores(tmp_path / "eval") == scores(tmp_path / "run" / "evaluation")
    fettle("export", str(tmp_path / "run"), "--to", "hf", "-o", str(tmp_path / "hf"))
    fettle(
        "eval", str(tmp_path / "hf"), str(data), "-o", str(tmp_path / "again")
    )  # the task is read from the checkpoint
    assert scores(tmp_path / "again")["accuracy"] == scores(tmp_path / "eval")["accuracy"]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fettle.stages import open_model

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [row["text"] for row in TEXTS]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    right = [row["label"] for row in TEXTS]
    found = [loaded.config.id2label[int(i)] for i in loaded.eval()(**batch).logits.argmax(-1)]
    assert sum(a == b for a, b in zip(found, right, strict=True)) / len(right) == scores(tmp_path / "eval")["accuracy"]
    assert open_model(str(tmp_path / "run"))[0].spec.labels == ("negative", "positive")


def test_tags(fettle: Cli, tmp_path: Path) -> None:
    model, data = make("bert", tmp_path / "model"), rows(tmp_path / "data.jsonl", WORDS)
    file = recipe(tmp_path, model, data, "tag", LORA, ", task: tag")
    fettle("run", str(file), "optim.lr=1e-2")
    assert scores(tmp_path / "run" / "evaluation")["span_f1"] > 0.9
    fettle("export", str(tmp_path / "run"), "--to", "hf", "-o", str(tmp_path / "hf"))
    fettle("eval", str(tmp_path / "hf"), str(data), "-o", str(tmp_path / "again"))
    assert scores(tmp_path / "again") == scores(tmp_path / "run" / "evaluation")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder(kind: str, fettle: Cli, tmp_path: Path) -> None:
    model, data = make(kind, tmp_path / "model"), rows(tmp_path / "data.jsonl", PAIRS)
    tasks = rows(tmp_path / "tasks.jsonl", [{"prompt": r["prompt"], "answer": r["completion"]} for r in PAIRS] + [
        {"prompt": r["prompt"], "choices": ["one", "two", "three", "four", "five"], "answer": i} for i, r in enumerate(PAIRS)
    ])  # fmt: skip
    file = recipe(tmp_path, model, tasks, "task", FULL)
    file.write_text(file.read_text().replace(f"- {{path: {tasks}}}", f"- {{path: {data}}}"))
    assert "ready to run" in fettle("check", str(file))
    fettle("run", str(file), "optim.lr=1e-2", f"optim.steps={80 if kind == 't5' else 200}")  # BART spells its words
    assert scores(tmp_path / "run" / "evaluation")["score"] > 0.9
    fettle("export", str(tmp_path / "run"), "--to", "hf", "-o", str(tmp_path / "hf"))
    fettle("eval", str(tmp_path / "hf"), str(tasks), "-o", str(tmp_path / "again"))
    assert scores(tmp_path / "again") == scores(tmp_path / "run" / "evaluation")


@pytest.mark.parametrize(("kind", "task"), [("bert", "classify"), ("bert", "tag"), ("t5", "task")])
def test_one_packed_batch_is_many_single_ones(kind: str, task: str, fettle: Cli, tmp_path: Path) -> None:
    values = {"classify": TEXTS, "tag": WORDS, "task": PAIRS}[task]
    model, data = make(kind, tmp_path / "model"), rows(tmp_path / "data.jsonl", values)
    file = recipe(tmp_path, model, data, task, FULL, "" if task == "task" else f", task: {task}")
    plain = [str(file), "optim.steps=4", "evaluate=[]", "checkpoint.every=100"]
    if kind == "bert":  # whose dropout draws otherwise in another shape
        config = json.loads((model / "config.json").read_text()) | {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        (model / "config.json").write_text(json.dumps(config))
    fettle("run", *plain, "batch.tokens=2048", f"output={tmp_path / 'a'}")
    single = ["batch.tokens=48", "batch.packing=false", f"optim.accumulate={len(values)}"]
    fettle("run", *plain, *single, f"output={tmp_path / 'b'}")
    for (_, loss, size), (_, loss2, size2) in zip(trace(tmp_path / "a"), trace(tmp_path / "b"), strict=True):
        assert loss == pytest.approx(loss2, rel=1e-5) and size == pytest.approx(size2, rel=1e-3)


def test_mistakes_are_sentences(fettle: Cli, tmp_path: Path) -> None:
    model, data = (
        make("bert", tmp_path / "model"),
        rows(tmp_path / "data.jsonl", [*TEXTS, {"text": "x", "label": "postive"}]),
    )
    file = recipe(tmp_path, model, data, "classify", LORA, ", task: classify, labels: [negative, positive]")
    said = fettle("run", str(file), code=1)
    assert "unknown label 'postive': did you mean 'positive'?" in said and "data.jsonl:19" in said
    said = fettle("run", str(file), "objective={kind: sft}", "data.0.max_bad=1.0", code=1)
    assert "objective: sft does not fit a model with task: classify" in said
