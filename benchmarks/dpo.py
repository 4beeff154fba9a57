"""DPO: fettle and TRL's DPOTrainer in turn, on the same model, data, pairs in each step, start, optimizer and dtype.

    python benchmarks/dpo.py                    # two cores: about 15 minutes on a quiet machine
    python benchmarks/dpo.py --quick            # does it run? the figures mean nothing
    python benchmarks/dpo.py --write docs/benchmarks.md

fettle runs a recipe with its defaults but for batch.tokens. TRL gets the fastest of its settings, found first: all pairs of a step
at a time or fewer, bf16 or fp32; beside it stands TRL with the pairs of a step in one padded batch, as it runs unless one asks. On both sides the reference is the base with the LoRA off, computed at each step. Each
measurement is a process of its own. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import dpo_arms, dpo_report, sides
from benchmarks.command import DATA, arguments, workplace
from benchmarks.common import (
    Children,
    emit,
    fail,
    fastest,
    leave,
    matmul_peak,
    play_off,
    say,
    serve,
    take_turns,
    versions,
)
from benchmarks.dpo_arms import Setting

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
PAIRS = DATA.with_name("dpo_en_demo.json")
TOKENS = 4096  # of a step on a CPU: three or four pairs
LR = 1e-3  # high: the weights are random, and the curves must have something to fall


def calibrate(children: Children, job: dict[str, Any], search: tuple[int, int]) -> tuple[Setting, list[dict[str, Any]]]:
    """TRL's fastest setting, and all that were tried; `search` is the steps to warm up, and to time."""
    job = job | {"warmup": search[0], "timed": search[1]}
    settings = [Setting(pairs, "bf16") for pairs in (1, 2, None)]
    found = children("calibrate", **job, settings=[asdict(s) for s in settings])
    found += children("calibrate", **job, settings=[asdict(Setting(Setting(**fastest(found)).pairs, "fp32"))])
    return Setting(**play_off(children, job, found)), found


def same_pairs(folder: Path, newline: int) -> list[dict[str, Any]]:
    """What each step holds, after checking that both sides have the same tokens in prompts and answers."""
    steps = json.loads((folder / "steps.json").read_text())
    made = json.loads((folder / "trl.json").read_text())
    for pair in (p for step in steps for p in step):
        theirs = made[str(pair["row"])]
        for name in ("prompt", "chosen", "rejected"):
            tokens = theirs[name][:-1] if name != "prompt" and theirs[name][-1] == newline else theirs[name]
            if tokens != pair[name]:
                fail(f"pair {pair['row'] + 1}: fettle and TRL disagree about the tokens of '{name}'")
    return [
        {"pairs": len(step), "prompt": sum(len(p["prompt"]) for p in step),
         "answers": sum(len(p["chosen"]) + len(p["rejected"]) for p in step)}
        for step in steps
    ]  # fmt: skip


def check_run(name: str, run: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """End the benchmark where a side did not train on what it was given, or not all of it."""
    if len(run["marks"]) != len(steps) or len(run["loss"]) != len(steps):
        fail(f"{name}: {len(run['marks'])} steps ran, {len(steps)} were asked for")
    if run["pairs"] != [step["pairs"] for step in steps]:
        fail(f"{name}: trained on {run['pairs']} pairs a step, {[step['pairs'] for step in steps]} were prepared")


def measure(
    children: Children, asked: argparse.Namespace, job: dict[str, Any], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """TRL's best setting, then in turn fettle, TRL at that, and TRL with the pairs of a step in one batch."""
    say("looking for TRL's fastest setting")
    best, tried = calibrate(children, job, asked.search)
    say(f"TRL's fastest is {best}")
    whole = Setting(None, best.precision)
    settings = {"trl": best} | ({"trl_whole": whole} if whole != best else {})
    runs = take_turns(children, asked.pairs, job, settings, lambda name, run, setting: check_run(name, run, steps))
    return {"setting": best, "tried": tried, "runs": runs}


def main() -> None:
    """Prepare, calibrate, measure in turn, report."""
    asked = arguments(__doc__, "dpo", PAIRS)
    asked.tokens = asked.tokens or TOKENS
    asked.search = (1, 1) if asked.quick else (3, 8) if asked.device == "cuda" else (1, 2)
    with workplace(asked, __file__) as (children, where):
        seconds = 0.2 if asked.quick else 1.5
        job: dict[str, Any] = {
            "folder": children.folder, "output": children.folder / "out", "device": asked.device, "steps": asked.steps,
            "lr": LR, "tokens": asked.tokens,
        }  # fmt: skip
        say("preparing the model, the data and the steps")
        made = children("prepare", **job, data=asked.data, size=asked.size)
        job |= {"optim": made["optim"], "beta": made["beta"]}
        steps = same_pairs(children.folder, children("prepare_trl", **job)["newline"])
        peaks = [children("matmul_peak", device=asked.device, seconds=seconds)]
        found = measure(children, asked, job, steps)
        peaks.append(children("matmul_peak", device=asked.device, seconds=seconds))
        facts = {
            "machine": where,
            "versions": versions(*PACKAGES),
            "made": made,
            "matmul": max(peaks, key=lambda p: p["flops"]),
        }
        result = dpo_report.summary(asked, facts, steps, found)
        leave(asked, result, dpo_report.section, dpo_report.draw)
        emit(dpo_report.line(result))


TASKS = {
    "prepare": dpo_arms.prepare, "prepare_trl": dpo_arms.prepare_trl,
    "run_fettle": dpo_arms.run_fettle, **sides.trl_tasks(Setting, dpo_arms.train), "matmul_peak": matmul_peak,
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
