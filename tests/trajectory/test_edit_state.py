"""What edits remember beside their weights survives a kill, bit for bit; and artifacts meet again on one base."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.stages.adapters import open_adapters
from fettle.stages.artifact import open_artifact
from trajectory.conftest import Fettle, trace, weights

DIE = """
import os, signal, fettle.train.loop as loop
step = loop.run_step
def deadly(job, index, *rest):
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(job, index, *rest)
loop.run_step = deadly
"""
EDITS = {
    "adalora": "[{kind: adalora, rank: 4, target_rank: 2, warmup: 1, final: 2, every: 2, dropout: 0.1}]",
    "pissa": "[{kind: lora, rank: 4, init: pissa, dora: true, lr_ratio: 8.0, dropout: 0.1}]",
}


@pytest.mark.parametrize("name", EDITS)
def test_killed_and_resumed_is_uninterrupted(name: str, recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    edits = f"edits={EDITS[name]}"
    whole = fettle("run", str(recipe), edits, f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert fettle("run", str(recipe), edits, before=DIE).returncode == -signal.SIGKILL
    again = fettle("run", str(recipe), edits, "--resume")
    assert again.returncode == 0 and "resuming after step 4" in again.stderr.replace("\n", " "), again.stderr
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(("penalty" in row) == (name == "adalora") for row in rows)


def test_two_runs_open_as_adapters_of_one_base(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    runs = {"one": ("seed=1", EDITS["adalora"]), "two": ("seed=2", "[{kind: lora, rank: 4}]")}
    for name, (seed, edits) in runs.items():
        done = fettle("run", str(recipe), seed, f"edits={edits}", "optim.steps=5", f"output={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    forest, adapters = open_adapters({name: str(tmp_path / name) for name in runs})
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        for name in runs:
            adapters.use(name)
            alone, _ = open_artifact(tmp_path / name / "artifact")
            assert torch.allclose(
                forest.model(input_ids=tokens).logits, alone.model(input_ids=tokens).logits, atol=1e-5
            )
    with pytest.raises(FettleError, match="'x': .* holds no artifact"):
        open_adapters({"x": str(tmp_path)})
