"""`fettle peft compare` through the command line: every arm in its own process, a failing one told, an ended one not run again."""

from __future__ import annotations

import json
from pathlib import Path

from trajectory.conftest import Fettle

ARMS = """
full: {edits: [{kind: full}], optim: {lr: 1.0e-3}}
lora: {edits: [{kind: lora, rank: 2}]}
wide: {edits: [{kind: lora, rank: 4000}]}
"""


def test_arms_are_measured_alike(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(ARMS)
    task = tmp_path / "held.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Count {i}."}], "answer": "one"} for i in range(4)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "peft", "compare", str(recipe), "optim.steps=2", f"evaluate=[{{path: {task}, max_tokens: 2}}]",
        "--arms", str(tmp_path / "arms.yaml"), "-o", str(tmp_path / "compared"),
    )  # fmt: skip
    done = fettle(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compared" / "findings.json").read_text())
    by_arm = {o["arm"]: o for o in found["outcomes"]}
    assert set(by_arm) == {"full", "lora"} and "rank 4000 is over the size" in found["failed"]["wide"]
    assert by_arm["full"]["trained"] == by_arm["full"]["parameters"] > by_arm["lora"]["trained"] > 0
    for outcome in by_arm.values():
        assert outcome["peak_bytes"] > 2**20 and outcome["step_seconds"] > 0 and outcome["latency"] > 0
        assert outcome["merged_latency"] > 0 and len(outcome["scores"]["held.jsonl"]) == 3
    before = (tmp_path / "compared" / "lora" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    assert fettle(*words, "--only", "lora").returncode == 0
    assert (tmp_path / "compared" / "lora" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_mistake_in_an_arm_is_told_before_anything_runs(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text("good: {edits: [{kind: full}]}\nbad: {edits: [{kind: lora, rnk: 2}]}\n")
    done = fettle("peft", "compare", str(recipe), "--arms", str(tmp_path / "arms.yaml"), "-o", str(tmp_path / "out"))
    assert done.returncode == 1 and "rnk" in done.stderr and not (tmp_path / "out").exists()
