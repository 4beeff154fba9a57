"""Trajectories go through the real command line, on a small model and a small file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
model: {{path: {model}, dtype: {dtype}}}
edits:
  - {{kind: lora, rank: 4, dropout: 0.1}}
data:
  - {{path: {data}}}
optim: {{lr: 5.0e-3, steps: 8, accumulate: 2}}
batch: {{tokens: 128}}
checkpoint: {{every: 2}}
output: {output}
"""

Fettle = Callable[..., subprocess.CompletedProcess[str]]


def command(*words: str, before: str = "") -> list[str]:
    """The command line as a child process; `before` is Python that runs first in it."""
    code = f"{before}\nimport sys; from fettle.cli import main; sys.argv = ['fettle', *sys.argv[1:]]; main()"
    return [sys.executable, "-c", code, *words]


@pytest.fixture
def fettle() -> Fettle:
    """Run `fettle` with some words; `before` is Python that runs first in the child."""

    def call(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command(*words, before=before), capture_output=True, text=True, env=environment, timeout=300, check=False
        )

    return call


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    """A recipe of 8 steps over 24 short conversations: several epochs, dropout on, accumulation 2."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count {i}."},
                {"role": "assistant", "content": "one two " * (1 + i % 5)},
            ]
        }
        for i in range(24)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_llama, dtype="float32", data=data, output=tmp_path / "run"))
    return file


def trace(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of a run, exactly as written."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def weights(folder: Path) -> bytes:
    """The trained tensors of a run's artifact, byte for byte."""
    return (folder / "artifact" / "edits.safetensors").read_bytes()


def under_torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """`fettle ...` as two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "fettle.cli", *words],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False,
    )  # fmt: skip
