"""The same examples give the same training, however they are cut into batches and processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from trajectory.conftest import Fettle, trace, under_torchrun

EPOCH = ["optim.steps=4", "checkpoint.every=100", "edits=[{kind: full}]"]


def close(one: Path, two: Path, tolerance: float) -> None:
    left, right = trace(one), trace(two)
    assert len(left) == len(right) == 4
    for (step, loss, size), (_, loss2, size2) in zip(left, right, strict=True):
        assert math.isclose(loss, loss2, rel_tol=tolerance), f"loss of step {step}"
        assert math.isclose(size, size2, rel_tol=10 * tolerance), f"gradient of step {step}"
    assert left[0][1] != left[-1][1]


def test_one_packed_batch_is_many_single_ones(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    """Packed = unpacked and accumulation 1 x 24 = 24 x 1: an epoch a step, all in one row or an example a row."""
    packed = fettle("run", str(recipe), *EPOCH, "batch.tokens=1024", "optim.accumulate=1", f"output={tmp_path / 'a'}")
    assert packed.returncode == 0, packed.stderr
    single = fettle(
        "run",
        str(recipe),
        *EPOCH,
        "batch.tokens=128",
        "batch.packing=false",
        "optim.accumulate=24",
        f"output={tmp_path / 'b'}",
    )
    assert single.returncode == 0, single.stderr
    close(tmp_path / "a", tmp_path / "b", 2e-6)


@pytest.mark.slow
def test_two_processes_are_one(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    words = [*EPOCH, "optim.accumulate=2"]
    assert fettle("run", str(recipe), *words, f"output={tmp_path / 'a'}").returncode == 0
    two = under_torchrun("run", str(recipe), *words, f"output={tmp_path / 'b'}")
    assert two.returncode == 0, two.stderr
    close(tmp_path / "a", tmp_path / "b", 2e-6)


STAGES = """
stages:
  - kind: quantize
    model: {{path: {model}, dtype: float32}}
    edits: [{{kind: gptq, grid: {{group: {group}}}}}]
    calibration: {{data: [{{path: {folder}/data.jsonl}}], samples: 4, length: 96}}
    output: {folder}/quantized
  - edits: [{{kind: lora, rank: 2}}]
    data: [{{path: {folder}/data.jsonl}}]
    optim: {{steps: 2, accumulate: 2}}
    batch: {{tokens: 128}}
    output: {folder}/tuned
"""


@pytest.mark.parametrize(("group", "said"), [(32, ""), (48, "the first process failed: edits.0: gptq: ")])
def test_what_one_process_does_the_others_wait_for(
    recipe: Path, tiny_llama: Path, tmp_path: Path, group: int, said: str
) -> None:
    """A quantizer's stage before a tuned one; where it fails, all end with its sentence."""
    (tmp_path / "stages.yaml").write_text(STAGES.format(model=tiny_llama, folder=tmp_path, group=group))
    two = under_torchrun("run", str(tmp_path / "stages.yaml"))
    assert said in two.stderr and "fettle/stages" not in two.stderr, two.stderr  # no traceback of ours
    assert (two.returncode == 0) is (not said) is (tmp_path / "tuned" / "artifact" / "manifest.json").exists()


# The memory prediction rehearses two batches, so the seventh call is the first of step 3.
NAN = """
import fettle.objectives.sft as s
loss, calls = s.sft_loss, [0]
def poisoned(logps, weights):
    calls[0] += 1
    return loss(logps * (float('nan') if calls[0] == 7 else 1.0), weights)
s.sft_loss = poisoned
"""


def test_a_loss_that_is_not_finite_stops_and_names_the_examples(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    died = fettle("run", str(recipe), before=NAN)
    assert died.returncode == 1
    assert "step 3: loss nan" in died.stderr and "data.jsonl:" in died.stderr
    assert len(trace(tmp_path / "run")) == 2


def test_a_loss_that_is_not_finite_can_be_skipped(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    done = fettle("run", str(recipe), "not_finite=skip", before=NAN)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 8 and '"skipped"' in rows[2] and "data.jsonl:" in rows[2]
    assert "1 skipped" in (tmp_path / "run" / "report.md").read_text()
