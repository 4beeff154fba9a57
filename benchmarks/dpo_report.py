"""What the DPO benchmark leaves: a summary as JSON, the curves as a picture, a section for a page, one line."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.command import shown
from benchmarks.common import Spread, closeness, heading, ratios, steady, table
from benchmarks.dpo_arms import Setting


def summary(
    asked: argparse.Namespace, facts: dict[str, Any], steps: list[dict[str, Any]], found: dict[str, Any]
) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    runs, pairs = found["runs"], [step["pairs"] for step in steps]
    useful = [step["prompt"] + step["answers"] for step in steps]  # a prompt counts once, on either side
    rates = {name: [steady(run["marks"], pairs, asked.warmup) for run in some] for name, some in runs.items()}
    tokens = {name: [steady(run["marks"], useful, asked.warmup) for run in some] for name, some in runs.items()}
    peaks = {name: [run["peak"] for run in some] for name, some in runs.items()}
    curves = {name: some[0]["loss"] for name, some in runs.items()}
    first = asked.search[0]
    return {
        "benchmark": "dpo", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": asked.device,
        "command": shown("benchmarks/dpo.py"), "data": Path(asked.data).name,
        "size": asked.size, "pairs": asked.pairs, "warmup": asked.warmup, "steps": steps, **facts,
        "pairs_per_second": {name: Spread.of(values).plain() for name, values in rates.items()},
        "tokens_per_second": {name: Spread.of(values).plain() for name, values in tokens.items()},
        "ratio": ratios(rates["fettle"], rates["trl"]).plain(),
        "ratio_whole": ratios(rates["fettle"], rates.get("trl_whole", rates["trl"])).plain(),
        "peak_bytes": {name: Spread.of(values).plain() for name, values in peaks.items()},
        "memory_ratio": ratios(peaks["fettle"], peaks["trl"]).plain(),
        "loss": curves, "loss_apart": closeness(curves["fettle"], curves["trl"]),
        "margin": {name: some[0]["margin"] for name, some in runs.items()},
        "lr_apart": closeness(runs["fettle"][0]["lr"], runs["trl"][0]["lr"]),
        "trl_setting": str(found["setting"]),
        "trl_tried": [
            {"setting": str(Setting(**row["setting"])),
             "pairs_per_second": sum(pairs[first : first + row["steps"]]) / (row["seconds"] * row["steps"])}
            if "seconds" in row else {"setting": str(Setting(**row["setting"])), "error": row["error"]}
            for row in found["tried"]
        ],
    }  # fmt: skip


def line(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script looks for."""
    speed = result["ratio"]
    return {
        "benchmark": "dpo", "quick": result["quick"], "device": result["device"], "ratio": round(speed["median"], 3),
        "ratio_low": round(speed["low"], 3), "ratio_high": round(speed["high"], 3),
        "ratio_whole": round(result["ratio_whole"]["median"], 3),
        "memory_ratio": round(result["memory_ratio"]["median"], 3),
        "pairs_per_second": {k: round(v["median"], 3) for k, v in result["pairs_per_second"].items()},
        "peak_mib": {k: round(v["median"] / 2**20, 1) for k, v in result["peak_bytes"].items()},
        "loss_apart": {k: round(v, 6) for k, v in result["loss_apart"].items()}, "trl_setting": result["trl_setting"],
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss, and the margin between rewards, by step, both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    told = (("loss", "loss (nats a pair)"), ("margin", "reward of the chosen less the rejected"))
    for panel, (key, label) in zip(panels, told, strict=True):
        steps = range(1, len(result[key]["fettle"]) + 1)
        panel.plot(steps, result[key]["trl"][: len(steps)], color="#c46210", lw=3.2, alpha=0.55, label="TRL")
        panel.plot(steps, result[key]["fettle"], color="#1f4e79", lw=1.4, marker=".", label="fettle")
        panel.set_ylabel(label)
        panel.set_xlabel("optimizer step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    panels[0].set_title(f"{result['loss_apart']['mean']:.2%} apart in the mean", fontsize=10)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown: what was run and where, the table, the settings tried, the curves."""
    made, steps = result["made"], result["steps"]
    counts = [sum(step[key] for step in steps) for key in ("pairs", "prompt", "answers")]
    loss = result["loss"]
    parts = [
        heading(result),
        f"Llama, {made['parameters'] / 1e6:.1f}M weights ({result['size']}), {made['dtype']}, LoRA r8 on all linear layers; "
        f"{result['data']} ({made['too_long']} pairs longer than a row left out); {len(steps)} steps of {made['row']:,} positions "
        f"({result['warmup']} to warm up) with {counts[0]} pairs in all, {counts[1]:,} tokens of prompts and {counts[2]:,} of answers; "
        f"{result['pairs']} measurements of each side.",
        _main_table(result), _tried(result),
        f"![loss and margins by step, fettle and TRL](dpo-{result['device']}.png)",
        f"Loss at equal pairs, steps, learning rates and starting weights: from {loss['fettle'][0]:.4f} to {loss['fettle'][-1]:.4f} "
        f"(TRL {loss['trl'][0]:.4f} to {loss['trl'][-1]:.4f}), {result['loss_apart']['mean']:.3%} apart in the mean, "
        f"{result['loss_apart']['largest']:.3%} at most.",
    ]  # fmt: skip
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _main_table(result: dict[str, Any]) -> str:
    sides = {"fettle": "fettle", "trl": "TRL, its best setting", "trl_whole": "TRL, a step's pairs in one batch"}
    sides = {key: name for key, name in sides.items() if key in result["pairs_per_second"]}
    over = ["fettle / TRL at its best", "fettle / TRL in one batch"][: len(sides) - 1]

    def row(what: str, key: str, form: str, *ratios: str, scale: float = 1.0) -> list[str]:
        cells = [Spread(*(x / scale for x in result[key][k].values())).text(form) for k in sides]
        told = [Spread(**result[ratio]).text(".2f") for ratio in ratios[: len(over)]]
        return [what, *cells, *told, *[""] * (len(over) - len(told))]

    rows = [
        row("pairs/s", "pairs_per_second", ".3f", "ratio", "ratio_whole"),
        row("useful tokens/s, a prompt once", "tokens_per_second", ",.0f"),
        row("peak memory, MiB", "peak_bytes", ",.0f", "memory_ratio", scale=2**20),
    ]
    rows[0] = [*rows[0][: -len(over)], *(f"**{cell}**" for cell in rows[0][-len(over) :])]
    return table(["median (least - most)", *sides.values(), *over], rows)


def _tried(result: dict[str, Any]) -> str:
    rows = []
    for one in result["trl_tried"]:
        text = one.get("error") or f"{one['pairs_per_second']:.3f}"
        rows.append([one["setting"], f"**{text}**" if one["setting"] == result["trl_setting"] else text])
    return table(["TRL's settings", "pairs/s over a few steps"], rows)
