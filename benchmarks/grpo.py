"""GRPO: fettle and TRL's GRPOTrainer in turn, on the same model, prompts in each step, reward, start, optimizer and dtype.

    python benchmarks/grpo.py                    # two cores: about 20 minutes on a quiet machine
    python benchmarks/grpo.py --quick            # does it run? the figures mean nothing
    python benchmarks/grpo.py --write docs/benchmarks.md

A step writes 8 answers to each of some prompts, rewards them, and learns once. fettle runs a recipe with its defaults but for
batch.tokens. TRL gets the fastest of its settings, found first: all answers at a time or fewer, bf16 or fp32. The reference is
the base with the LoRA off on both sides, asked at each step. Answers end at random: a share of the vocabulary are end tokens.
Then TRL trains once more on fettle's own answers, so that rewards, losses and gradients can be held against each other.
Each measurement is a process of its own. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import grpo_arms, grpo_report, sides
from benchmarks.command import arguments, workplace
from benchmarks.common import Children, emit, fail, fastest, leave, play_off, say, serve, take_turns, versions
from benchmarks.grpo_arms import Setting

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
GROUP = 8
SHAPE = {"cpu": {"prompts": 4, "max_tokens": 128}, "cuda": {"prompts": 32, "max_tokens": 512}}
QUICK = {"prompts": 2, "max_tokens": 16}
TOKENS = 1024  # of a row on a CPU
LR = 1e-3  # high: the weights are random, and the curves must have something to move


def calibrate(children: Children, job: dict[str, Any], search: tuple[int, int]) -> tuple[Setting, list[dict[str, Any]]]:
    """TRL's fastest setting, and all that were tried; `search` is the steps to warm up, and to time."""
    job = job | {"warmup": search[0], "timed": search[1]}
    settings = [Setting(None, "bf16"), Setting(GROUP, "bf16")]
    found = children("calibrate", **job, settings=[asdict(s) for s in settings])
    found += children("calibrate", **job, settings=[asdict(Setting(Setting(**fastest(found)).answers, "fp32"))])
    return Setting(**play_off(children, job, found)), found


def check_run(name: str, run: dict[str, Any], job: dict[str, Any]) -> None:
    """End the benchmark where a side did not take the steps or write the answers that it was asked for."""
    answers = job["prompts"] * GROUP
    if len(run["marks"]) != job["steps"] or run["answers"] != [answers] * job["steps"]:
        fail(
            f"{name}: {len(run['marks'])} steps of {run['answers']} answers ran, {job['steps']} of {answers} were asked for"
        )


def measure(children: Children, asked: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """TRL's best setting, the two in turn, and TRL on fettle's answers."""
    say("looking for TRL's fastest setting")
    best, tried = calibrate(children, job, asked.search)
    say(f"TRL's fastest is {best}")
    runs = take_turns(children, asked.pairs, job, {"trl": best}, lambda name, run, setting: check_run(name, run, job))
    say("TRL on fettle's own answers")
    check = children("run_fettle", **job | {"output": f"{job['output']}/fettle-check", "dtype": "float32"})
    same = children("run_trl", **job, setting=asdict(Setting(None, "fp32")), given=f"{job['output']}/fettle-check")
    return {"setting": best, "tried": tried, "runs": runs, "same": {"fettle": check, "trl": same}}


def main() -> None:
    """Prepare, calibrate, measure in turn, report."""
    asked = arguments(__doc__, "grpo")
    asked.tokens = asked.tokens or TOKENS
    asked.steps = min(asked.steps, 6) if asked.device == "cpu" else asked.steps
    asked.search = (1, 1)
    with workplace(asked, __file__) as (children, where):
        job: dict[str, Any] = {
            "folder": children.folder, "output": children.folder / "out", "device": asked.device, "steps": asked.steps,
            "lr": LR, "tokens": asked.tokens, "group": GROUP, **(QUICK if asked.quick else SHAPE[asked.device]),
        }  # fmt: skip
        say("preparing the model and the prompts")
        made = children("prepare", **job, data=asked.data, size=asked.size)
        job |= {"optim": made["optim"], "beta": made["beta"]}
        found = measure(children, asked, job)
        facts = {
            "machine": where,
            "versions": versions(*PACKAGES),
            "made": made,
            "job": {k: job[k] for k in ("prompts", "max_tokens", "group", "beta")},
        }
        result = grpo_report.summary(asked, facts, found)
        leave(asked, result, grpo_report.section, grpo_report.draw)
        emit(grpo_report.line(result))


TASKS = {
    "prepare": grpo_arms.prepare,
    "run_fettle": grpo_arms.run_fettle, **sides.trl_tasks(Setting, grpo_arms.train),
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
