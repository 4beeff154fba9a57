"""SFT: fettle and TRL's SFTTrainer in turn, on the same model, data, examples in each step, start, optimizer and dtype.

    python benchmarks/sft.py                    # two cores: about 10 minutes on a quiet machine
    python benchmarks/sft.py --quick            # does it run? the figures mean nothing
    python benchmarks/sft.py --write docs/benchmarks.md

fettle runs a recipe with its defaults. TRL gets the fastest of its settings, found first: padded, packed without padding,
packed to one size; bf16 weights, bf16 arithmetic on float32 weights, fp32; on a GPU also flash attention and liger kernels.
Each measurement is a process of its own. The last line on stdout is JSON; `ratio` is the worse of LoRA and full.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import sft_arms, sft_report, sides
from benchmarks.command import arguments, workplace
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
from benchmarks.sft_arms import Setting

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "flash-attn")
MODES = ("lora", "full")
LR = {"lora": 2e-3, "full": 5e-4}  # high: the weights are random, and the curves must have something to fall


def candidates(mode: str, cuda: bool) -> list[list[Setting]]:
    """TRL's settings in two rounds: the layouts in bf16, then the other precisions, padded and in the best packed layout."""
    installed = importlib.util.find_spec
    attentions = (
        ["sdpa"] if not cuda else ["flash_attention_2"] if installed("flash_attn") else ["sdpa", "flex_attention"]
    )
    liger = [True, False] if cuda and installed("liger_kernel") else [False]
    layouts = ["packed, one size", "packed", "padded", "wrapped"]
    first = [Setting(la, "bf16", at, li) for li in liger for at in attentions for la in layouts]
    others = ["fp32", "mixed"] if mode == "full" else ["fp32"]  # LoRA's own weights are float32 in any case
    return [first, [Setting(la, pr, attentions[0], liger[0]) for pr in others for la in ("packed", "padded")]]


def calibrate(children: Children, job: dict[str, Any], search: tuple[int, int]) -> tuple[Setting, list[dict[str, Any]]]:
    """TRL's fastest setting, and all that were tried; `search` is the steps to warm up, and to time."""
    job = job | {"warmup": search[0], "timed": search[1]}
    first, second = candidates(job["mode"], job["device"] == "cuda")
    found = children("calibrate", **job, settings=[asdict(s) for s in first])
    best = Setting(**fastest(_same_training(found)))
    second = [Setting(s.layout if s.layout == "padded" or best.layout == "padded" else best.layout, s.precision,
                      best.attention, best.liger) for s in second]  # fmt: skip
    found += children("calibrate", **job, settings=[asdict(s) for s in second])
    return Setting(**play_off(children, job, _same_training(found))), found


def _same_training(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in found if Setting(**row["setting"]).same_training]


def same_examples(folder: Path) -> list[dict[str, Any]]:
    """What each step holds, after checking that both sides have the same tokens and learn the same of them."""
    steps = json.loads((folder / "steps.json").read_text())
    made = json.loads((folder / "trl.json").read_text())
    for example in (e for step in steps for e in step):
        theirs = made[str(example["row"])]
        learned = [i for i, label in enumerate(theirs["labels"]) if label != -100]
        if theirs["input_ids"] != example["tokens"] or learned != example["learned"]:
            fail(
                f"conversation {example['row'] + 1}: fettle and TRL disagree about its tokens or about what is learned"
            )
        if not 0 < len(learned) < len(example["tokens"]):
            fail(f"conversation {example['row'] + 1}: TRL masks nothing or everything in it")
    return [
        {"lengths": [len(e["tokens"]) for e in step], "learned": sum(len(e["learned"]) for e in step)} for step in steps
    ]


def check_run(name: str, run: dict[str, Any], steps: list[dict[str, Any]], counted: bool) -> None:
    """End the benchmark where a side did not train on what it was given, or not all of it."""
    tokens = [sum(step["lengths"]) for step in steps]
    if len(run["marks"]) != len(steps) or len(run["loss"]) != len(steps):
        fail(f"{name}: {len(run['marks'])} steps ran, {len(steps)} were asked for")
    if "tokens" in run and (run["tokens"] != tokens or run["learned"] != [step["learned"] for step in steps]):
        fail(f"{name}: trained on {run['tokens']} tokens a step, {tokens} were prepared")
    if counted and run["counted"] != [sum(tokens[: i + 1]) for i in range(len(tokens))]:
        fail(f"{name}: counted {run['counted']} tokens itself, {tokens} a step were prepared")


def measure(
    children: Children, asked: argparse.Namespace, job: dict[str, Any], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """One mode: TRL's best setting, then the pairs."""
    mode = job["mode"]
    say(f"{mode}: looking for TRL's fastest setting")
    best, tried = calibrate(children, job, asked.search)
    say(f"{mode}: TRL's fastest is {best}")

    def check(name: str, run: dict[str, Any], setting: Setting | None) -> None:
        counts = setting is not None and setting.layout in ("padded", "packed")  # elsewhere it counts its filling too
        check_run(name, run, steps, counts)

    runs = take_turns(children, asked.pairs, job, {"trl": best}, check, f"fettle-{mode}")
    return {"setting": best, "tried": tried, "runs": runs}


def main() -> None:
    """Prepare, calibrate, measure in turn, report."""
    asked = arguments(__doc__, "sft")
    asked.search = (1, 1) if asked.quick else (3, 8) if asked.device == "cuda" else (1, 2)
    with workplace(asked, __file__) as (children, where):
        seconds = 0.2 if asked.quick else 1.5
        job: dict[str, Any] = {
            "folder": children.folder, "output": children.folder / "out", "device": asked.device, "steps": asked.steps,
            "lr": LR, "tokens": asked.tokens,
        }  # fmt: skip
        say("preparing the model, the data and the steps")
        made = children("prepare", **job, data=asked.data, size=asked.size)
        job |= {"row": made["row"], "optim": made["optim"]}
        children("prepare_trl", **job)
        steps = same_examples(children.folder)
        peaks = [children("matmul_peak", device=asked.device, seconds=seconds)]
        found = {mode: measure(children, asked, job | {"mode": mode}, steps) for mode in MODES}
        peaks.append(children("matmul_peak", device=asked.device, seconds=seconds))
        facts = {
            "machine": where,
            "versions": versions(*PACKAGES),
            "made": made,
            "matmul": max(peaks, key=lambda p: p["flops"]),
        }
        result = sft_report.summary(asked, facts, steps, found)
        leave(asked, result, sft_report.section, sft_report.draw)
        emit(sft_report.line(result))


TASKS = {
    "prepare": sft_arms.prepare, "prepare_trl": sft_arms.prepare_trl,
    "run_fettle": sft_arms.run_fettle, **sides.trl_tasks(Setting, sft_arms.train), "matmul_peak": matmul_peak,
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
