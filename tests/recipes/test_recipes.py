"""The recipes that come with fettle: each is valid, and the first that a reader runs passes its check. Those in the pages
are read by tests/unit/test_docs.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.core.config import read_yaml
from fettle.lab.alignment import write_alignment
from fettle.lab.world import World
from fettle.lab.write import write_lab
from fettle.stages import check, load_recipe
from fettle.stages.compare import read_arms

RECIPES = Path(__file__).parents[2] / "recipes"
ARMS = RECIPES / "peft.yaml"
QUICKSTART = RECIPES / "quickstart.yaml"
BESIDE = {ARMS, RECIPES / "quantizers.yaml", RECIPES / "lab" / "arms.yaml"}  # what comparisons change in a recipe


@pytest.mark.parametrize(
    "file", sorted(set(RECIPES.rglob("*.yaml")) - BESIDE), ids=lambda f: str(f.relative_to(RECIPES))
)
def test_every_recipe_is_valid(file: Path) -> None:
    assert load_recipe(file).stages


@pytest.mark.parametrize("arm", read_arms(ARMS))
def test_every_arm_fits_the_recipe_it_changes(arm: str) -> None:
    (stage,) = load_recipe(QUICKSTART, read_arms(ARMS)[arm]).stages
    wanted = read_yaml(ARMS)[0][arm]
    assert [edit.kind for edit in stage.edits] == [edit["kind"] for edit in wanted["edits"]]
    assert stage.optim.lr == wanted["optim"]["lr"]


def test_the_quickstart_passes_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the lab's data where it says that they lie, fewer of them."""
    monkeypatch.chdir(tmp_path)
    write_lab(Path("runs/lab"), documents=0, instructions=200, each=2)
    (report,) = check(load_recipe(QUICKSTART), 1, time_steps=False)
    assert report.ok and report.steps == 600 and 0 < report.trained < report.parameters


@pytest.mark.parametrize("name", ["align.yaml", "dpo.yaml"])
def test_the_stages_of_alignment_pass_their_checks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few rows of the lab's data, before any stage has run."""
    monkeypatch.chdir(tmp_path)
    write_alignment("runs/lab/alignment", World.build(0), 0, 40, 3)
    reports = check(load_recipe(RECIPES / name), 0, time_steps=False)
    assert all(report.ok for report in reports)
    assert [report.steps for report in reports] == ([200, 80, 120, 0] if name == "align.yaml" else [200, 100])
