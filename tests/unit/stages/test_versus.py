"""Versus: the figures of policies against their start, what is refused, a stage at the end of a recipe."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import small_tokenizer
from fettle.core.errors import FettleError
from fettle.data.prompts import Prompt
from fettle.evaluate.interval import mean_interval
from fettle.feedback import judge as judging
from fettle.feedback.reward import Scores
from fettle.generate.request import Completion
from fettle.stages import versus as module
from fettle.stages.check import check
from fettle.stages.pipeline import load_recipe, run
from fettle.stages.versus import Versus

WATCHED = {
    "kind": "sum",
    "terms": [
        {"weight": 1.0, "reward": {"kind": "length", "most": 1, "per": 2}},
        {"weight": 0.0, "reward": {"kind": "regex", "pattern": "e"}},
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with prompts, and a policy that a stage of tuning gives: far from its start after a few large steps."""
    folder = tmp_path_factory.mktemp("versus")
    rows = [{"messages": [{"role": "user", "content": f"Count to {i}."}], "answer": "one"} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = [{"messages": [*row["messages"], {"role": "assistant", "content": "one two"}]} for row in rows]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    tune = {
        "model": {"path": str(tiny_llama), "dtype": "float32"}, "edits": [{"kind": "lora", "rank": 2}],
        "data": [{"path": str(folder / "talks.jsonl")}], "optim": {"lr": 3e-2, "steps": 12}, "batch": {"tokens": 96},
        "output": str(folder / "sft"),
    }  # fmt: skip
    stages = [tune, stage(folder, str(tiny_llama))]
    (folder / "recipe.yaml").write_text(json.dumps({"stages": stages}))
    assert run(load_recipe(folder / "recipe.yaml")) == folder / "sft" / "artifact"
    return folder


def stage(folder: Path, start: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "versus", "start": start, "data": [{"path": str(folder / "prompts.jsonl")}], "reward": WATCHED,
        "answers": 4, "max_tokens": 6, "output": str(folder / "versus"), **changes,
    }  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> Any:
    (folder / "one.yaml").write_text(json.dumps(data))
    return load_recipe(folder / "one.yaml")


def look_at(pipeline: Any) -> list[Any]:
    return check(pipeline, 0, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, Path]:
    """A model that writes no text, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("labels", "other"):
        shutil.copytree(tiny_llama, folder / name)
    config = json.loads((folder / "labels" / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "labels" / "config.json").write_text(json.dumps(config))
    small_tokenizer(300).save_pretrained(folder / "other")
    return {name: folder / name for name in ("labels", "other")}


def answers(folder: Path) -> list[list[dict[str, Any]]]:
    files = sorted((folder / "versus" / "answers").iterdir(), key=lambda f: f.name.endswith("sft.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_the_figures_are_those_of_the_answers(made: Path) -> None:
    start, policy = json.loads((made / "versus" / "versus.json").read_text())["standings"]
    of_start, of_policy = answers(made)
    assert len(of_start) == len(of_policy) == 24 and {row["question"] for row in of_policy} == {
        f"Count to {i}." for i in range(6)
    }
    for standing, rows in ((start, of_start), (policy, of_policy)):
        assert set(standing["rewards"]) == {"reward", "length", "regex"}
        assert standing["rewards"]["reward"]["mean"] == pytest.approx(sum(r["reward"] for r in rows) / 24)
        assert standing["rewards"]["regex"]["mean"] == pytest.approx(sum("e" in r["answer"] for r in rows) / 24)
        assert standing["rewards"]["reward"]["n"] == 6  # intervals are by prompt
    by_prompt = [sum(r["kl"] for r in of_policy[i : i + 4]) / 4 for i in range(0, 24, 4)]
    assert policy["kl"]["mean"] == pytest.approx(mean_interval(by_prompt).mean) and policy["kl"]["mean"] > 0.05
    assert start["kl"] is None and start["wins"] is None
    pairs = [(p["reward"], s["reward"]) for p, s in zip(of_policy, of_start, strict=True)]
    wins = [0.5 + 0.5 * ((p > s) - (p < s)) for p, s in pairs]
    assert policy["wins"]["rate"]["n"] == len(policy["wins"]["scores"]) == 6
    assert policy["wins"]["rate"]["mean"] == pytest.approx(sum(wins) / 24) and policy["wins"]["wins"] == wins.count(1.0)


def test_it_leaves_a_page_and_a_picture(made: Path) -> None:
    page = (made / "versus" / "report.md").read_text()
    assert "| model | reward | regex | KL, nats an answer | win rate |" in page and f"{made}/sft " in page
    assert (made / "versus" / "versus.png").stat().st_size > 5_000


def test_a_run_that_has_its_figures_is_not_run_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_recipe(made / "recipe.yaml")
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("it is there"))
    assert run(pipeline, resume=True) == made / "sft" / "artifact"
    with pytest.raises(FettleError, match="holds figures already"):
        run(pipeline.stages[1])


def test_a_judge_is_asked_in_both_orders(made: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Engine:
        def generate(self, prompts: Any, sampling: Any = None, **more: Any) -> list[Completion]:
            asked.extend(prompts)
            return [Completion((), "Verdict: A", (), "end") for _ in prompts]

    data = stage(made, str(tiny_llama), policies=[str(made / "sft")], judge={"engine": "big"}, answers=2, output=str(made / "judged"),
                 engines={"big": {"url": "http://localhost:1/v1", "model": "m"}})  # fmt: skip
    monkeypatch.setattr(module, "by_judge", lambda judge, engine, *rest: judging_by(judge, rest))

    def judging_by(judge: Any, rest: Any) -> Any:
        from fettle.feedback.win_rate import by_judge

        return by_judge(judge, Engine(), *rest)

    run(read(made, data))
    (_, policy) = json.loads((made / "judged" / "versus.json").read_text())["standings"]
    assert (
        len(asked) == 24 and policy["judged"]["flips"] + policy["judged"]["ties"] >= 12
    )  # whoever stands first wins: all flip
    assert (
        policy["judged"]["rate"]["mean"] == 0.5
        and policy["judged"]["rate"]["n"] == 6
        and judging.PAIR[:20] in str(asked[0])
    )


def test_a_judge_reads_what_the_policy_was_offered(
    made: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = {"url": "http://localhost:1/v1", "model": "m"}
    (versus,) = read(made, stage(made, str(tiny_llama), judge={"engine": "big"}, engines={"big": endpoint})).stages
    tool = {"type": "function", "function": {"name": "add"}}
    prompt = Prompt("p.jsonl:1", ({"role": "user", "content": "2 + 2?"},), np.array([1]), {}, (tool,))
    answered = module.Answered([prompt] * 4, ["a"] * 4, [1] * 4, Scores([1.0] * 4, {}), [0.0] * 4)
    read_by: list[Any] = []
    monkeypatch.setattr(module, "by_judge", lambda judge, engine, asked, *rest: read_by.extend(asked))
    versus.standing("policy", answered, answered)
    assert [[turn["role"] for turn in asked] for asked in read_by] == [["system", "user"]] * 4
    assert '"function":{"name":"add"}' in read_by[0][0]["content"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": []}, "no stage before"),
        ({"policies": ["{start}"]}, "stands there twice"),
        ({"policies": ["x", "x"]}, "stands there twice"),
        ({"judge": {"engine": "big"}}, "asks the engine 'big'"),
        ({"reward": {"kind": "judge", "judge": {"engine": "big"}}}, "asks the engine 'big'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str, made: Path, tiny_llama: Path) -> None:
    changes = json.loads(json.dumps(changes).replace("{start}", str(tiny_llama)))
    with pytest.raises(FettleError, match=said):
        run(read(made, stage(made, str(tiny_llama), output=str(made / "no"), **changes)))
    assert not (made / "no" / "versus.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": [{"path": "nope.jsonl"}]}, r"one.yaml:1: data.0.path: .*nope.jsonl"),
        ({"start": "no/such/model"}, r"one.yaml:1: start: there is no folder 'no/such/model'"),
        ({"policies": ["{start}/typo/x"]}, r"one.yaml:1: policies.0: there is no folder '.*typo/x'"),
        ({"policies": ["{broken}"]}, r"one.yaml:1: policies.0: .*holds a run that did not end"),
        ({"reward": {"kind": "model", "path": "no/such/model"}}, "reward: there is no folder 'no/such/model'"),
    ],
)
def test_what_is_not_there_is_named_by_check_and_before_a_run_begins(
    changes: dict[str, Any], said: str, made: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Versus, "run", lambda *_, **__: pytest.fail("it began"))
    (made / "broken" / "checkpoints").mkdir(parents=True, exist_ok=True)
    changes = json.loads(
        json.dumps(changes).replace("{start}", str(tiny_llama)).replace("{broken}", str(made / "broken"))
    )
    pipeline = read(
        made, {**stage(made, str(tiny_llama), output=str(made / "no")), "policies": [str(made / "sft")], **changes}
    )
    for verb in (run, look_at):
        with pytest.raises(FettleError, match=said):
            verb(pipeline)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": []}, "policies: there is no stage before"),
        ({"max_tokens": 100_000}, "max_tokens: 100000 leaves no room for a prompt in the 512 tokens that .* sees"),
        ({"max_tokens": 510}, "room for 2 before an answer of max_tokens in what the model sees"),
        ({"reward": {"kind": "number", "column": "anwser"}}, "needs the column 'anwser' of the data: .*answer"),
        ({"policies": ["{labels}"]}, "has task: classify and writes no text"),
        ({"policies": ["{other}"]}, "have different tokenizers"),
        ({"reward": {"kind": "model", "path": "{start}"}}, "has no head of one number"),
    ],
)
def test_what_cannot_be_compared_is_no_ready_stage(
    changes: dict[str, Any], said: str, made: Path, tiny_llama: Path, models: dict[str, Path]
) -> None:
    text = json.dumps(changes).replace("{start}", str(tiny_llama))
    for name, folder in models.items():
        text = text.replace(f"{{{name}}}", str(folder))
    data = {**stage(made, str(tiny_llama), output=str(made / "no")), "policies": [str(made / "sft")]}
    with pytest.raises(FettleError, match=said):
        look_at(read(made, data | json.loads(text)))


def test_a_look_says_what_is_not_there_yet(made: Path, tiny_llama: Path) -> None:
    pipeline = load_recipe(made / "recipe.yaml")
    assert isinstance(pipeline.stages[1], Versus)
    console = Console(file=io.StringIO())
    report = pipeline.stages[1].look(pipeline.stages[:1], 1, console)
    assert report.ok and report.trained == 0 and report.parameters > 0 and not report.notes
    later = pipeline.stages[0].model_copy(update={"output": made / "later"})
    waiting = pipeline.stages[1].model_copy(update={"start": str(made / "later")})
    assert waiting.look([later], 1, console).notes == [f"{made}/later is not there yet"]
    waiting.require_files([later])
    with pytest.raises(FettleError, match=r"start: there is no folder '.*later'"):
        waiting.require_files()
