"""What the PEFT benchmark leaves: a summary as JSON, a section for a page, one line."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.command import shown
from benchmarks.common import Spread, closeness, heading, ratios, table
from benchmarks.peft_arms import ALPHA, OURS, RANK

FASTER, LEANER = 1.15, 0.80  # what is asked for: one of both, and never worse at either


def summary(
    asked: argparse.Namespace, facts: dict[str, Any], trained: dict[float, Any], routed: dict[int, Any]
) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    dropouts = {str(p): _dropout(asked.warmup, one) for p, one in trained.items()}
    against = [one for of in dropouts.values() for one in of["against"].values()]
    batches = {
        str(count): {
            what: {
                "seconds": {way: Spread.of(one[what][way]).plain() for way in ("together", "alone")},
                "ratio": ratios(one[what]["alone"], one[what]["together"]).plain(),
            }
            for what in ("read", "answer")
        } | {"apart": one["apart"]}
        for count, one in routed.items()
    }  # fmt: skip
    return {
        "benchmark": "peft", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": asked.device,
        "command": shown("benchmarks/peft.py"), "data": Path(asked.data).name, "size": asked.size, "pairs": asked.pairs,
        "steps": asked.steps, "warmup": asked.warmup, **facts,
        "ratio": min(one["ratio"]["median"] for one in against),
        "memory_ratio": max(one["saved_ratio"] for one in against),
        "met": all(one["met"] for one in against), "dropouts": dropouts, "batches": batches,
    }  # fmt: skip


def _dropout(warmup: int, found: dict[str, Any]) -> dict[str, Any]:
    runs, saved = found["runs"], found["saved"]
    seconds = {name: [_step(run["marks"], warmup) for run in of] for name, of in runs.items()}
    peaks = {name: [run["peak"] for run in of] for name, of in runs.items()}
    against = {}
    for name in runs:
        if name == OURS:
            continue
        speed, memory = ratios(seconds[name], seconds[OURS]), saved[OURS] / saved[name]
        against[name] = {
            "ratio": speed.plain(), "saved_ratio": memory, "peak_ratio": ratios(peaks[OURS], peaks[name]).plain(),
            "loss_apart": closeness(runs[OURS][0]["loss"], runs[name][0]["loss"]),
            "met": (speed.median >= FASTER or memory <= LEANER) and speed.median >= 1 and memory <= 1,
        }  # fmt: skip
    return {
        "seconds": {name: Spread.of(of).plain() for name, of in seconds.items()}, "saved": saved,
        "peak_bytes": {name: Spread.of(of).plain() for name, of in peaks.items()}, "against": against,
        "trained": runs[OURS][0]["trained"], "loss": {name: of[0]["loss"] for name, of in runs.items()},
    }  # fmt: skip


def _step(marks: list[float], warmup: int) -> float:
    """The median time between the ends of two steps, after `warmup` steps."""
    return statistics.median(b - a for a, b in zip(marks[warmup - 1 :], marks[warmup:], strict=False))


def line(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script looks for."""
    return {
        "benchmark": "peft", "quick": result["quick"], "device": result["device"], "ratio": round(result["ratio"], 3),
        "memory_ratio": round(result["memory_ratio"], 3), "met": result["met"],
        "lora": {
            dropout: {
                name: {
                    "ratio": round(one["ratio"]["median"], 3), "memory_ratio": round(one["saved_ratio"], 3),
                    "peak_ratio": round(one["peak_ratio"]["median"], 3),
                    "loss_apart": round(one["loss_apart"]["mean"], 5), "met": one["met"],
                }
                for name, one in of["against"].items()
            }
            for dropout, of in result["dropouts"].items()
        },
        "batches": {
            count: {what: round(one[what]["ratio"]["median"], 3) for what in ("read", "answer")}
            for count, one in result["batches"].items()
        },
    }  # fmt: skip


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown: what was run and where, training against each setting of PEFT, the batches."""
    made, some = result["made"], next(iter(result["dropouts"].values()))
    parts = [
        heading(result),
        f"Llama, {made['parameters'] / 1e6:.1f}M weights ({result['size']}), {made['dtype']}; LoRA of rank {RANK} (alpha {ALPHA}) "
        f"on all linear layers, {some['trained']:,} weights with float32 masters; {result['data']}; {result['steps']} steps of "
        f"{made['row']:,} positions ({result['warmup']} to warm up), {result['pairs']} rounds.",
        *(_training(dropout, one) for dropout, one in result["dropouts"].items()),
        "Quotients are of PEFT's time over fettle's, and of fettle's bytes over PEFT's: above 1 and below 1 fettle is better. "
        f"The least speed-up is {result['ratio']:.2f}, the greatest share of activation memory {result['memory_ratio']:.2f}.",
        _batches(result["batches"]),
    ]  # fmt: skip
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _training(dropout: str, one: dict[str, Any]) -> str:
    mib = 2**20
    rows = []
    for name, seconds in one["seconds"].items():
        cells = [Spread(**seconds).text(".3f"), f"{one['saved'][name] / mib:,.1f}", f"{one['peak_bytes'][name]['median'] / mib:,.0f}"]  # fmt: skip
        if name == OURS:
            rows.append([name, *cells, "", "", "", ""])
            continue
        against = one["against"][name]
        rows.append([
            f"PEFT, {name}", *cells, f"**{Spread(**against['ratio']).text('.2f')}**", f"**{against['saved_ratio']:.2f}**",
            f"{against['peak_ratio']['median']:.2f}", f"{against['loss_apart']['mean']:.3%}",
        ])  # fmt: skip
    head = [
        f"dropout {dropout}; median (least - most)", "seconds a step", "activations saved, MiB", "peak, MiB",
        "time", "activations", "peak", "loss apart",
    ]  # fmt: skip
    return table(head, rows)


def _batches(batches: dict[str, Any]) -> str:
    rows = []
    for count, one in batches.items():
        for what, said in (("read", "reading"), ("answer", "answering")):
            seconds = {way: Spread(**one[what]["seconds"][way]).text(".3f") for way in ("together", "alone")}
            ratio = Spread(**one[what]["ratio"]).text(".2f")
            rows.append([f"{count} adapters, {said}", seconds["together"], seconds["alone"], f"**{ratio}**"])
    apart = max(one["apart"] for one in batches.values())
    head = ["seconds, median (least - most)", "one batch", "an adapter at a time", "speed-up"]
    return (
        table(head, rows)
        + f"\n\nIn float32 both ways give the same answers, and hidden states at most {apart:.1g} apart "
        "(relative to the largest); the times are of bfloat16."
    )
