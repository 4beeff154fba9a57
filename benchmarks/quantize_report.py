"""What the quantization benchmark leaves: a summary as JSON, a section for a page, one line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.command import shown
from benchmarks.common import Spread, heading, ratios, table

BASE = "bf16"
NEEDED = 1.5  # int8 or int4 over bf16, one row of a large layer
QUIET = 0.5  # load average over the threads at work, beyond which a machine is not quiet


def summary(asked: argparse.Namespace, facts: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    layers = [_layer(one) for one in found.get("layers", [])]
    return {
        "benchmark": "quantize", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": "cpu",
        "command": shown("benchmarks/quantize.py"), **facts, "layers": layers,
        "ratio": min((max(one["speed"]["1"][arm]["median"] for arm in ("int8", "int4")) for one in layers), default=None),
        "generate": _generation(found["generate"]) if "generate" in found else None,
        "quantizers": found.get("quantizers"), "load": max(_loads(found), default=facts["machine"]["load"]),
    }  # fmt: skip


def _layer(one: dict[str, Any]) -> dict[str, Any]:
    """Of a shape: microseconds, and speed over bf16, by rows and arm."""
    timed = {name: arm for name, arm in one["arms"].items() if "seconds" in arm}
    rows = list(timed[BASE]["seconds"])
    return {
        "shape": one["shape"], "threads": one["threads"], "load": one["load"],
        "errors": {name: arm["error"] for name, arm in one["arms"].items() if "error" in arm},
        "kernels": {name: arm["kernels"] for name, arm in timed.items() if "kernels" in arm},
        "bytes": {name: arm["bytes"] for name, arm in timed.items()},
        "microseconds": {
            r: {name: Spread.of([1e6 * s for s in arm["seconds"][r]]).plain() for name, arm in timed.items()} for r in rows
        },
        "speed": {
            r: {name: ratios(timed[BASE]["seconds"][r], arm["seconds"][r]).plain() for name, arm in timed.items()} for r in rows
        },
    }  # fmt: skip


def _generation(found: dict[str, Any]) -> dict[str, Any]:
    """By arm: tokens a second, speed over bf16, bytes."""
    runs = found["runs"]

    def rates(arm: str, count: str, what: str) -> list[float]:
        return [run["rates"][count][what] for run in runs[arm]]

    arms = {}
    for arm, of in runs.items():
        speeds = {
            count: {
                what: {"tokens_per_second": Spread.of(rates(arm, count, what)).plain(),
                       "speed": ratios(rates(arm, count, what), rates(BASE, count, what)).plain()}
                for what in ("prefill", "decode")
            }
            for count in of[0]["rates"]
        }  # fmt: skip
        arms[arm] = {
            "batches": speeds,
            "weights": of[0]["weights"],
            "peak": Spread.of([run["peak"] for run in of]).plain(),
        }
    return {"made": found["made"], "prompt": found["prompt"], "new": found["new"], "size": found["size"], "arms": arms}


def _loads(found: Any) -> list[float]:
    """Every load average that a task told."""
    if isinstance(found, Mapping):
        return ([found["load"]] if "load" in found else []) + [
            load for value in found.values() for load in _loads(value)
        ]
    return [load for value in found for load in _loads(value)] if isinstance(found, list) else []


def line(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script looks for."""
    layers = {
        f"{one['shape'][0]}x{one['shape'][1]}, {one['threads']} threads": {
            rows: {name: round(speed["median"], 2) for name, speed in by.items()} for rows, by in one["speed"].items()
        }
        for one in result["layers"]
    }
    generation = result["generate"] and {
        arm: {
            count: {what: round(by["speed"]["median"], 2) for what, by in of.items()}
            for count, of in one["batches"].items()
        }
        for arm, one in result["generate"]["arms"].items()
    }
    return {
        "benchmark": "quantize", "quick": result["quick"], "ratio": result["ratio"] and round(result["ratio"], 2),
        "load": result["load"], "speed_over_bf16": {"layers": layers, "generate": generation},
    }  # fmt: skip


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = [heading(result)]
    if result["load"] > max(1.0, result["machine"]["threads"]) + QUIET:
        parts.append(
            f"**The machine was not quiet**: the load average rose to {result['load']:.1f} with {result['machine']['threads']} threads "
            "of ours, so times are too long; ratios are of neighbours and suffer less."
        )
    parts += [_layer_tables(one) for one in result["layers"]]
    if result["ratio"] is not None:
        said = "reached" if result["ratio"] >= NEEDED else "not reached"
        parts.append(
            f"One row of a large layer, the better of int8 and int4 over bf16: at least {result['ratio']:.2f} ({NEEDED} needed: {said})."
        )
    if result["generate"]:
        parts.append(_generation_table(result["generate"]))
    if result["quantizers"]:
        parts.append(_quantizer_table(result["quantizers"]))
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _layer_tables(one: dict[str, Any]) -> str:
    rows = list(one["microseconds"])
    head = [
        f"{one['shape'][0]} x {one['shape'][1]}, {one['threads']} threads",
        "MiB",
        *(f"{r} rows, ms" for r in rows),
        *(f"{r}: over bf16" for r in rows),
    ]
    lines = []
    for name, size in one["bytes"].items():
        times = [f"{one['microseconds'][r][name]['median'] / 1e3:.3f}" for r in rows]
        speeds = [Spread(**one["speed"][r][name]).text(".2f") for r in rows]
        lines.append([name, f"{size / 2**20:.1f}", *times, *speeds])
    told = [f"{name} did not run: {why}" for name, why in one["errors"].items()]
    plain = [
        f"{name} makes the weight for {', '.join(r for r, k in by.items() if k == 'plain')} rows"
        for name, by in one["kernels"].items()
        if "plain" in by.values()
    ]
    return table(head, lines) + "\n\n" + "; ".join([*plain, *told]) + ("." if plain or told else "")


def _generation_table(found: dict[str, Any]) -> str:
    counts = list(next(iter(found["arms"].values()))["batches"])
    columns = [(count, what) for count in counts for what in ("prefill", "decode")]
    head = [
        "tokens/s, and over bf16",
        *(f"{what}, {count} at once" for count, what in columns),
        "weights, MiB",
        "peak, MiB",
    ]
    lines = []
    for arm, one in found["arms"].items():
        cells = [one["batches"][count][what] for count, what in columns]
        lines.append([
            arm,
            *(f"{Spread(**c['tokens_per_second']).median:,.0f} ({Spread(**c['speed']).text('.2f')})" for c in cells),
            f"{one['weights'] / 2**20:,.0f}", f"{one['peak']['median'] / 2**20:,.0f}",
        ])  # fmt: skip
    said = f"Generation, a random Llama of {found['made']['parameters'] / 1e6:.0f}M weights; prompts of {found['prompt']} tokens, answers of {found['new']}; the head and the embedding stay in bf16."
    return said + "\n\n" + table(head, lines)


def _quantizer_table(found: dict[str, Any]) -> str:
    lines = [
        [f"{name}, {one['made']['parameters'] / 1e6:.0f}M", f"{m['seconds']:.1f}", f"{m['peak'] / 2**20:,.0f}",
         "" if m["stated"] is None else f"{m['stated'] / 2**20:,.0f}", f"{m['dense'] / 2**20:,.0f}", f"{m['bits']:.2f}", str(m["fallbacks"])]
        for one in found["sizes"].values() for name, m in one["methods"].items()
    ]  # fmt: skip
    head = [
        "quantizer",
        "seconds",
        "most beside the model, MiB",
        "stated before, MiB",
        "the model, MiB",
        "bits a weight",
        "fell back",
    ]
    return f"Quantizing, on {found['samples']} rows of {found['length']} tokens.\n\n" + table(head, lines)
