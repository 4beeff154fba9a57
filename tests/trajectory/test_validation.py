"""A held-out loss on the way changes nothing of the run, and is itself the same after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from trajectory.conftest import Fettle, trace, weights

DIE = """
import os, signal, fettle.train.loop as loop
step = loop.run_step
loop.run_step = lambda job, number, *rest: os.kill(os.getpid(), signal.SIGKILL) if number == 5 else step(job, number, *rest)
"""


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    rows = [{"instruction": f"Count {i}.", "output": "three two one " * (1 + i % 3)} for i in range(100, 120)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"validation={{data: [{{path: {tmp_path / 'held.jsonl'}}}], every: 3, batches: 2}}"


def measured(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


def test_training_is_the_same_bit_for_bit(recipe: Path, fettle: Fettle, tmp_path: Path, held_out: str) -> None:
    assert fettle("run", str(recipe), f"output={tmp_path / 'without'}").returncode == 0
    done = fettle("run", str(recipe), held_out, f"output={tmp_path / 'with'}")
    assert done.returncode == 0, done.stderr
    assert trace(tmp_path / "without") == trace(tmp_path / "with")
    assert weights(tmp_path / "without") == weights(tmp_path / "with")
    found = measured(tmp_path / "with")
    assert [step for step, _ in found] == [3, 6, 8] and not measured(tmp_path / "without")
    assert found[0][1] > found[1][1] > found[2][1] > 0
    assert "held-out data" in done.stderr and f"step 3: held-out loss {found[0][1]:.4f}" in done.stderr
    report = (tmp_path / "with" / "report.md").read_text()
    assert f"held-out loss | {found[0][1]:.4f} (step 3) -> {found[2][1]:.4f} (step 8), lowest" in report
    died = fettle("run", str(recipe), held_out, f"output={tmp_path / 'killed'}", before=DIE)
    assert died.returncode == -signal.SIGKILL
    done = fettle("run", str(recipe), held_out, f"output={tmp_path / 'killed'}", "--resume")
    assert done.returncode == 0 and "resuming after step 4" in done.stderr, done.stderr
    assert trace(tmp_path / "killed") == trace(tmp_path / "with") and measured(tmp_path / "killed") == found
    assert weights(tmp_path / "killed") == weights(tmp_path / "with")
