"""Memory as predicted and as measured, over a run's many batches: no two have the same lengths, and each must find the same room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fettle.lab.write import write_lab
from trajectory.conftest import Fettle

RECIPE = """
model: fettle/tiny
edits: [{{kind: {edit}}}]
data: [{{path: {folder}/lab/instructions.jsonl}}]
optim: {{steps: 60}}
batch: {{tokens: 2048}}
output: {folder}/run
"""


@pytest.mark.parametrize("edit", ["full", "lora"])
def test_a_run_of_many_batches_needs_what_was_predicted(edit: str, fettle: Fettle, tmp_path: Path) -> None:
    write_lab(tmp_path / "lab", documents=0, instructions=6000, each=1)
    (tmp_path / "r.yaml").write_text(RECIPE.format(edit=edit, folder=tmp_path))
    done = fettle("run", str(tmp_path / "r.yaml"))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "artifact" / "manifest.json").read_text())
    assert 0.85 < facts["peak_bytes"] / facts["predicted_bytes"] < 1.15
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["peak_bytes"] < 1.1 * rows[9]["peak_bytes"], "it goes on growing"
    assert "GiB predicted)" in (tmp_path / "run" / "report.md").read_text()


TWICE = """
import json, sys
from pathlib import Path
from fettle.stages import check, load_recipe, run
recipe = load_recipe(Path(sys.argv[1]), ["optim.steps=20"])
(looked,) = check(recipe, 0)
artifact = run(recipe)
facts = json.loads((artifact / "manifest.json").read_text())
print(json.dumps([looked.memory.total, facts["predicted_bytes"], facts["peak_bytes"]]))
"""


def test_what_a_check_left_free_is_not_counted_again(tmp_path: Path) -> None:
    """The demo checks and runs in one process."""
    write_lab(tmp_path / "lab", documents=0, instructions=6000, each=1)
    (tmp_path / "r.yaml").write_text(RECIPE.format(edit="lora", folder=tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(tmp_path / "r.yaml")], capture_output=True, text=True, check=True
    )
    looked, predicted, peak = json.loads(done.stdout.splitlines()[-1])
    assert abs(predicted / looked - 1) < 0.1 and 0.85 < peak / predicted < 1.15
