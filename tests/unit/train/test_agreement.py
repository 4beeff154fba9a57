"""A run is resumed only with the recipe, the data and the parent that it was begun with; a refusal says which differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.core.files import write_json
from fettle.stages.tune import Recipe
from fettle.train.agreement import require_same

MADE = {
    "recipe": {"optim": {"lr": 1e-3}, "edits": [{"kind": "lora", "rank": 4}]},
    "data": [["a.jsonl", "0"], ["b.jsonl", "1"]],
    "parent": "2",
}
CHANGES = [
    ({"recipe": {"optim": {"lr": 0.1}, "edits": MADE["recipe"]["edits"]}}, r"another recipe \(optim.lr: 0.001 then, 0.1 now\)"),
    ({"recipe": {"optim": {"lr": 1e-3}, "edits": []}}, r"another recipe \(edits: not given then, \[\] now\)"),
    ({"data": [["a.jsonl", "0"], ["b.jsonl", "9"]]}, r"other data \('b.jsonl' has changed since\)"),
    ({"parent": "3"}, "another parent"),
    ({"parent": None}, "another parent"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_the_part_that_differs_is_named(change: dict, said: str) -> None:
    require_same(Path("run"), MADE, MADE)
    for then, now in ((MADE, MADE | change),):
        with pytest.raises(FettleError, match="^run: was written .*" + said):
            require_same(Path("run"), then, now)


def test_a_recipe_is_made_of_its_data_and_its_parent(tmp_path: Path) -> None:
    data, parent = tmp_path / "data.jsonl", tmp_path / "artifact"
    data.write_text("one")
    parent.mkdir()
    write_json(parent / "manifest.json", {"seed": 0})
    recipe = Recipe(output=tmp_path / "run", edits=[{"kind": "lora"}], data=[{"path": str(data)}])
    then = recipe.made_of(parent)
    require_same(tmp_path, then, recipe.model_copy(update={"output": tmp_path / "other"}).made_of(parent))
    write_json(parent / "manifest.json", {"seed": 1})
    with pytest.raises(FettleError, match="another parent"):
        require_same(tmp_path, then, recipe.made_of(parent))
    data.write_text("two")
    with pytest.raises(FettleError, match="other data .*data.jsonl"):
        require_same(tmp_path, then, recipe.made_of(parent))
