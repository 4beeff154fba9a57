"""Memory as predicted and as measured, over a run's many batches: no two have the same lengths, and each must find the same room."""

from __future__ import annotations

import json
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
