"""Preferences through the command line, in this process: checked, trained, resumed, evaluated, exported; and whose reference it is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fettle.cli import main
from fettle.train.log import read_metrics as trace
from small import rows

PAIRS = [
    {"messages": [{"role": "user", "content": f"Count {i}."}], "chosen": {"role": "assistant", "content": "one two " * (1 + i % 3)},
     "rejected": {"role": "assistant", "content": f"bread {i}"}}
    for i in range(12)
]  # fmt: skip
SFT = """
  - model: {{path: {model}, dtype: float32}}
    edits: [{{kind: lora, rank: 4}}]
    data: [{{path: {data}, format: messages}}]
    optim: {{lr: 1.0e-2, steps: 4, warmup: 0}}
    batch: {{tokens: 128}}
    output: {output}/sft
"""
DIRECT = """
  - edits: {edits}
    data: [{{path: {data}}}]
    objective: {objective}
    optim: {{lr: 3.0e-3, steps: 4, accumulate: 2, warmup: 0}}
    batch: {{tokens: 192}}
    checkpoint: {{every: 2}}
    output: {output}/{name}
"""
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
        return said

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return rows(tmp_path / "pairs.jsonl", PAIRS)


def flat(
    folder: Path, model: Path, data: Path, objective: str, edits: str = "[{kind: lora, rank: 4}]", name: str = "run"
) -> Path:
    """A recipe of one stage on the base."""
    text = DIRECT.format(edits=edits, data=data, objective=objective, output=folder, name=name)
    lines = [line[4:] for line in text.strip("\n").splitlines()]
    file = folder / f"{name}.yaml"
    file.write_text("\n".join([f"model: {{path: {model}, dtype: float32}}", *lines]))
    return file


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in trace(folder)]


def test_dpo_from_check_to_export(fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    recipe = flat(tmp_path, tiny_llama, data, "{kind: dpo, beta: 0.5}")
    said = fettle("check", str(recipe), "--examples", "1")
    for word in ("-- prompt --", "-- chosen --", "-- rejected --", "12 pairs", "ready to run"):
        assert word in said
    fettle("run", str(recipe))
    found = trace(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "before the first step the policy is the reference"
    assert found[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert found[-1]["loss"] < 0.6 and found[-1]["margin"] > 0.1
    assert not list((tmp_path / "run" / "cache").glob("reference-*")), "the adapter is switched off: nothing is kept"
    said = fettle("eval", str(tmp_path / "run"), str(data))
    for word in ("accuracy", "prefers_longer", "people_prefer_longer"):
        assert word in said
    fettle("export", str(tmp_path / "run"), "--to", "peft", "--output", str(tmp_path / "peft"))
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("objective", ["cdpo", "ipo", "hinge", "robust", "simpo, beta: 1.0, gamma: 0.1", "orpo", "kto"])
def test_every_method_learns(objective: str, fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    fettle("run", str(flat(tmp_path, tiny_llama, data, f"{{kind: {objective}}}")))
    found = trace(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["margin"] > found[0]["margin"]


def pipeline(folder: Path, model: Path, data: Path, reference: str) -> Path:
    sft = rows(folder / "sft.jsonl", [{"messages": [*p["messages"], p["chosen"]]} for p in PAIRS])
    text = "stages:" + SFT.format(model=model, data=sft, output=folder) + DIRECT.format(
        edits="[{kind: lora, rank: 4}]", data=data, objective=f"{{kind: dpo, beta: 0.5, reference: {reference}}}", output=folder,
        name="dpo",
    )  # fmt: skip
    file = folder / "stages.yaml"
    file.write_text(text)
    return file


def test_a_policy_that_carries_an_adapter_is_held_to_it(
    fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    """The reference is what the stage opened, its adapter on, and not the base: switched off, kept or copied, it is the same."""
    found: dict[str, list[dict[str, Any]]] = {}
    for reference in ("auto", "cached", "copy"):
        folder = tmp_path / reference
        folder.mkdir()
        fettle("run", str(pipeline(folder, tiny_llama, data, reference)))
        found[reference] = trace(folder / "dpo")
    assert found["auto"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for reference in ("cached", "copy"):
        for one, other in zip(found["auto"], found[reference], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5), reference
            assert other["chosen"] == pytest.approx(one["chosen"], abs=1e-4), reference
    base = tmp_path / "base"
    base.mkdir()
    recipe = pipeline(base, tiny_llama, data, str(tiny_llama))
    fettle("run", str(recipe))
    first = trace(base / "dpo")[0]
    assert abs(first["margin"]) > 0.01, "held to the base by its name, the policy is ahead before the first step"


def test_full_tuning_keeps_the_reference_on_disk(fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    cached = flat(tmp_path, tiny_llama, data, "{kind: dpo}", "[{kind: full}]", "cached")
    copied = flat(tmp_path, tiny_llama, data, "{kind: dpo, reference: copy}", "[{kind: full}]", "copied")
    fettle("check", str(cached), "--examples", "0")
    assert not list((tmp_path / "cached").rglob("reference-*")), "a check leaves nothing"
    fettle("run", str(cached))
    fettle("run", str(copied))
    (file,) = (tmp_path / "cached" / "cache").glob("reference-*.npy")
    kept = np.load(file)
    assert kept.shape[0] == 12 and np.isfinite(kept).all()
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "copied"), abs=1e-5)
    assert losses(tmp_path / "cached")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_resumed_run_has_the_reference_of_the_first(
    fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    recipe = flat(tmp_path, tiny_llama, data, "{kind: dpo}", "[{kind: full}]")
    fettle("run", str(recipe))
    whole = trace(tmp_path / "run")
    for found in [*(tmp_path / "run" / "checkpoints").glob("*4"), tmp_path / "run" / "artifact"]:
        shutil.rmtree(found)
    for file in (tmp_path / "run" / "cache").glob("reference-*"):
        file.unlink()
    fettle("run", str(recipe), "--resume")
    assert [(r["step"], r["loss"]) for r in trace(tmp_path / "run")] == [(r["step"], r["loss"]) for r in whole]


def test_kto_keeps_and_copies_alike(fettle: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    judged = rows(
        tmp_path / "judged.jsonl",
        [
            {"messages": [*p["messages"], p["chosen" if i % 2 else "rejected"]], "label": bool(i % 2)}
            for i, p in enumerate(PAIRS)
        ],
    )
    for name in ("cached", "copy"):
        fettle(
            "run", str(flat(tmp_path, tiny_llama, judged, f"{{kind: kto, reference: {name}}}", "[{kind: full}]", name))
        )
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "copy"), abs=1e-5)
    assert any(row["kl"] > 0 for row in trace(tmp_path / "cached")), "no estimate of the KL ever counted"
    said = fettle("run", str(flat(tmp_path, tiny_llama, judged, "{kind: dpo}", name="wrong")), code=1)
    assert "kind: kto" in said


def test_a_reward_model_from_an_instructed_one(fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    sft = rows(tmp_path / "sft.jsonl", [{"messages": [*p["messages"], p["chosen"]]} for p in PAIRS])
    text = "stages:" + SFT.format(model=tiny_llama, data=sft, output=tmp_path) + DIRECT.format(
        edits="[{kind: lora, rank: 4}]", data=data, objective="{kind: reward, centre: 0.01}", output=tmp_path, name="reward"
    ).replace("steps: 4", "steps: 12")  # fmt: skip
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    said = fettle("check", str(file), "--examples", "0")
    assert said.count("ready to run") == 2
    fettle("run", str(file))
    found = trace(tmp_path / "reward")
    assert found[-1]["accuracy"] == 1 and found[-1]["brier"] < found[0]["brier"]
    manifest = json.loads((tmp_path / "reward" / "artifact" / "manifest.json").read_text())
    assert (manifest["model"]["task"], manifest["model"]["labels"]) == ("classify", ["reward"])
    assert [e["kind"] for e in manifest["edits"]] == ["lora", "lora", "head"]
    said = fettle("eval", str(tmp_path / "reward"), str(data))
    for word in ("accuracy", "calibration_error", "brier", "prefers_longer", "chosen longer"):
        assert word in said
    fettle("export", str(tmp_path / "reward"), "--to", "hf", "--output", str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


def test_a_reference_of_another_family_is_refused(fettle: Cli, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    said = fettle("run", str(flat(tmp_path, tiny_llama, data, "{kind: dpo, reference: cashed}", name="no")), code=1)
    assert "objective.reference: 'cashed' is neither" in said and "auto, off, cached, copy" in said
    said = fettle("run", str(flat(tmp_path, tiny_llama, data, "{kind: dpo, reference: fettle/tiny}")), code=1)
    assert "another tokenizer" in said
    said = fettle(
        "run", str(flat(tmp_path, tiny_llama, data, "{kind: dpo, reference: off}", "[{kind: full}]", "full")), code=1
    )
    assert "off cannot be had" in said
