"""Checking a recipe of several stages: each on what it will open, before anything has run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.stages import check, load_recipe, open_model, run

STAGES = """
stages:
  - model: {{path: {model}, dtype: float32}}
    edits: [{{kind: lora, rank: 2}}]
    data: [{{path: {data}}}]
    optim: {{steps: 2}}
    batch: {{tokens: 128}}
    output: {folder}/one
  - edits: [{{kind: lora, rank: 4, targets: [q_proj]}}]
    data: [{{path: {data}}}]
    optim: {{steps: 3}}
    batch: {{tokens: 64}}
    validation: {{data: [{{path: {held}}}], every: 2}}
    output: {folder}/two
  - edits: [{{kind: full}}]
    data: [{{path: {data}}}]
    optim: {{steps: 4}}
    batch: {{tokens: 64}}
    output: {folder}/three
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    for name in ("data", "held"):
        rows = [{"instruction": f"{name} {i}", "output": "one two"} for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, folder = tmp_path / "r.yaml", tmp_path
    file.write_text(
        STAGES.format(model=tiny_llama, data=folder / "data.jsonl", held=folder / "held.jsonl", folder=folder)
    )
    return file


def checked(recipe: Path, *overrides: str, **more: Any) -> tuple[list, str]:
    out = io.StringIO()
    console = Console(file=out, width=200, color_system=None)
    return check(load_recipe(recipe, overrides), 1, console, **{"time_steps": False, **more}), out.getvalue()


def test_every_stage_is_checked_on_the_edits_before_it(recipe: Path, tmp_path: Path) -> None:
    reports, said = checked(recipe)
    assert [report.ok for report in reports] == [True, True, True]
    assert [report.steps for report in reports] == [2, 3, 4]
    # two layers of width 64, 4 query and 2 key heads, inner width 128: lora, then lora beside it, then all there is
    lora = 2 * 2 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert [report.trained for report in reports][:2] == [lora, 2 * 4 * (64 + 64)]
    assert reports[1].parameters == reports[0].parameters + 2 * 4 * (64 + 64)
    assert reports[2].trained <= reports[2].parameters == reports[1].parameters
    assert all(f"stage {i} of 3: {tmp_path}/{name}" in said for i, name in ((1, "one"), (2, "two"), (3, "three")))
    assert said.count("ready to run") == 3
    assert not (tmp_path / "one" / "artifact").exists()


def test_a_parent_that_is_there_is_opened(recipe: Path, tmp_path: Path) -> None:
    before = load_recipe(recipe).stages
    run(before[0])
    forest = before[1].preview(before[:1])
    learned, _ = open_model(str(tmp_path / "one"))
    tensors = {n: p for n, p in learned.model.named_parameters() if "lora" in n or "up" in n}
    assert tensors
    own = list(forest.model.state_dict().values())
    for tensor in tensors.values():
        assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in own)
    reports, said = checked(recipe)
    assert f"{tmp_path}/one holds a run already" in said and len(reports) == 3


def test_what_keeps_a_later_stage_from_running_is_said(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(FettleError) as caught:
        checked(recipe, "stages.1.data.0.path=nowhere.jsonl", "stages.2.edits.0={kind: lora, targets: [nothing_proj]}")
    first, second = str(caught.value).split("\nstage ")
    assert first.startswith(f"stage 2 ({tmp_path}/two): ") and "nowhere.jsonl" in first
    assert second.startswith(f"3 ({tmp_path}/three): ") and "nothing_proj" in second
    with pytest.raises(FettleError, match=r"stage 2 .*nothing_proj(.|\n)*stage 3 .*: not checked$"):
        checked(recipe, "stages.1.edits.0.targets=[nothing_proj]")
    with pytest.raises(FettleError) as caught:  # a recipe of one stage says it as it is
        load = load_recipe(recipe, ["stages.0.data.0.path=nowhere.jsonl"])
        check(load.model_copy(update={"stages": load.stages[:1]}), 1, Console(file=io.StringIO()))
    assert not str(caught.value).startswith("stage")


def test_a_later_stage_names_no_model_of_its_own(recipe: Path, tiny_llama: Path) -> None:
    assert load_recipe(recipe, [f"stages.1.model={{path: {tiny_llama}, device: cpu}}"])
    with pytest.raises(FettleError, match=r"stages\.1\.model\.path: a later stage opens the artifact"):
        load_recipe(recipe, ["stages.1.model=fettle/tiny"])
    text = recipe.read_text().replace(
        "  - edits: [{kind: full}]", "  - model: {dtype: bfloat16}\n    edits: [{kind: full}]"
    )
    recipe.write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "bfloat16" in row)
    with pytest.raises(FettleError, match=rf"r\.yaml:{line}: stages\.2\.model\.dtype"):
        load_recipe(recipe)


def test_a_warm_up_that_does_not_end_is_noted(recipe: Path) -> None:
    reports, said = checked(recipe, "stages.0.optim.warmup=20", "stages.0.optim.lr=1e-3", "stages.1.optim.warmup=3")
    assert "the warm-up takes 20 steps and the run has 2, so the learning rate reaches 0.0001 of 0.001" in " ".join(
        said.split()
    )
    assert ["warm-up" in " ".join(report.notes) for report in reports] == [True, False, False]


@pytest.mark.parametrize(("learned", "held"), [([True, False], [True]), ([True, True], [True, False])])
def test_answers_of_one_kind_are_noted_where_they_are_learned(
    learned: list[bool], held: list[bool], recipe: Path, tmp_path: Path
) -> None:
    for name, labels in (("data", learned), ("held", held)):
        rows = [{"prompt": f"{name} {i}", "completion": "one", "label": label} for i, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kto = [f"stages.{i}.objective.kind=kto" for i in range(3)]
    notes = [[note for note in report.notes if "both kinds" in note] for report in checked(recipe, *kto)[0]]
    told = [] if False in learned else ["data: 2 of 2 answers are desired"]
    assert [[note.partition(";")[0] for note in of] for of in notes] == [told] * 3


def test_steps_and_held_out_losses_are_timed(recipe: Path) -> None:
    reports, said = checked(recipe, time_steps=True)
    assert all(report.step_seconds for report in reports)
    assert [bool(report.held_out_seconds) for report in reports] == [False, True, False]
    assert "for held-out losses" in said
