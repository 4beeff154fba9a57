"""Reinforcement learning through the real command: killed in the middle of a phase it goes on bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from trajectory.conftest import Fettle, under_torchrun, weights

RECIPE = """
kind: reinforce
model: {{path: {model}, dtype: float32}}
edits:
  - {{kind: lora, rank: 4}}
data:
  - {{path: {data}}}
reward: {{kind: function, name: "{rewards}:letters"}}
objective: {{kind: ppo, kl: {{beta: 0.02, target: 1.0}}}}
rollouts: {{prompts: 4, answers: 3, max_tokens: 8, passes: 2, parts: 2}}
critic: {{edits: [{{kind: lora, rank: 2}}]}}
optim: {{lr: 1.0e-2, steps: 10}}
batch: {{tokens: 192}}
checkpoint: {{every: 1, keep: 99}}
output: {output}
"""
REWARD = """
def letters(prompts, answers, **columns):
    return [answer.count("e") / max(len(answer), 1) for answer in answers]
"""
DIE = """
import os, signal
import fettle.train.loop as loop
step, done = loop.run_step, [0]
def last(*a):
    done[0] += 1
    if done[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*a)
loop.run_step = last
"""
TIMES = ("seconds", "rollout_seconds", "tokens_per_second", "elapsed", "peak_bytes")


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    data, rewards, file = tmp_path / "prompts.jsonl", tmp_path / "rewards.py", tmp_path / "recipe.yaml"
    rows = [{"messages": [{"role": "user", "content": f"Count to {i}."}]} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards.write_text(REWARD)
    file.write_text(RECIPE.format(model=tiny_llama, data=data, rewards=rewards, output=tmp_path / "run"))
    return file


def rows_of(folder: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what differs from one machine to the next."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def answers_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((folder / "answers").iterdir())}


@pytest.mark.parametrize("grpo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_phase_it_goes_on_bit_for_bit(
    grpo: bool, recipe: Path, fettle: Fettle, tmp_path: Path
) -> None:
    """Phases are steps 1 to 4, 5 to 8, 9 and 10; it dies before step 7, the third of its phase."""
    words = ["objective={kind: grpo}", "critic={}", "edits=[{kind: full}]"] if grpo else []
    if grpo:
        recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("critic")))
        words.remove("critic={}")
    whole = fettle("run", str(recipe), *words, f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    died = fettle("run", str(recipe), *words, before=DIE.format(at=7))
    assert died.returncode == -signal.SIGKILL
    done = fettle("run", str(recipe), *words, "--resume")
    assert done.returncode == 0 and "resuming after step 6" in done.stderr, done.stderr
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert answers_of(tmp_path / "run") == answers_of(tmp_path / "whole")
    assert (tmp_path / "run" / "reward.png").exists() and "## Rewards" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_two_processes_are_one(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    """The same answers, rewards and losses, whoever wrote and learned them."""
    words = ["optim.steps=6"]
    alone = fettle("run", str(recipe), *words, f"output={tmp_path / 'a'}")
    assert alone.returncode == 0, alone.stderr
    two = under_torchrun("run", str(recipe), *words, f"output={tmp_path / 'b'}")
    assert two.returncode == 0, two.stderr
    one, other = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert len(one) == len(other) == 6
    texts = [
        [json.loads(line)["answer"] for file in answers_of(tmp_path / run).values() for line in file.splitlines()]
        for run in "ab"
    ]
    assert texts[0] == texts[1]
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=2e-4, abs=1e-6)
