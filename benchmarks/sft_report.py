"""What the SFT benchmark leaves: a summary as JSON, the loss curves as a picture, a section for a page, one line."""

from __future__ import annotations

import argparse
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.command import shown
from benchmarks.common import DATA_SHEET, Spread, closeness, heading, ratios, steady, table
from benchmarks.flops import Shape, step_flops
from benchmarks.sft_arms import Setting

NAMES = {"lora": "LoRA r8, all linear layers", "full": "full"}


def summary(
    asked: argparse.Namespace, facts: dict[str, Any], steps: list[dict[str, Any]], found: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    modes = {mode: _mode(asked, facts, steps, mode, one) for mode, one in found.items()}
    return {
        "benchmark": "sft", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": asked.device,
        "command": shown("benchmarks/sft.py"), "data": Path(asked.data).name,
        "size": asked.size, "pairs": asked.pairs, "warmup": asked.warmup, "steps": steps,
        "ratio": min(one["ratio"]["median"] for one in modes.values()),
        "memory_ratio": max(one["memory_ratio"]["median"] for one in modes.values()),
        **facts, "modes": modes,
    }  # fmt: skip


def _mode(
    asked: argparse.Namespace, facts: dict[str, Any], steps: list[dict[str, Any]], mode: str, found: dict[str, Any]
) -> dict[str, Any]:
    runs = found["runs"]
    tokens = [sum(step["lengths"]) for step in steps]
    rates = {name: [steady(run["marks"], tokens, asked.warmup) for run in runs[name]] for name in runs}
    peaks = {name: [run["peak"] for run in runs[name]] for name in runs}
    shape = Shape(**facts["made"]["shape"][mode])
    flops = sum(step_flops(shape, mode == "full", s["lengths"], s["learned"]) for s in steps[asked.warmup :])
    each = flops / sum(tokens[asked.warmup :])  # model FLOPs a useful token
    reached = {name: Spread.of(rates[name]).median * each for name in rates}
    sheet = next((peak for part, peak in DATA_SHEET.items() if part in (facts["machine"]["gpu"] or "")), None)
    curves = {name: runs[name][0]["loss"] for name in runs}
    first = asked.search[0]
    return {
        "tokens_per_second": {name: Spread.of(values).plain() for name, values in rates.items()},
        "ratio": ratios(rates["fettle"], rates["trl"]).plain(),
        "peak_bytes": {name: Spread.of(values).plain() for name, values in peaks.items()},
        "memory_ratio": ratios(peaks["fettle"], peaks["trl"]).plain(),
        "flops_per_token": each, "flops": reached,
        "share_of_matmul_peak": {name: value / facts["matmul"]["flops"] for name, value in reached.items()},
        "mfu": {name: value / sheet for name, value in reached.items()} if sheet and asked.device == "cuda" else None,
        "loss": curves, "loss_apart": closeness(curves["fettle"], curves["trl"]),
        "lr": {name: runs[name][0]["lr"] for name in runs},
        "lr_apart": closeness(runs["fettle"][0]["lr"], runs["trl"][0]["lr"]),
        "trl_setting": str(found["setting"]),
        "trl_tried": [
            {"setting": str(Setting(**row["setting"])), "same_training": Setting(**row["setting"]).same_training,
             "tokens_per_second": sum(tokens[first : first + row["steps"]]) / (row["seconds"] * row["steps"])}
            if "seconds" in row else {"setting": str(Setting(**row["setting"])), "error": row["error"]}
            for row in found["tried"]
        ],
    }  # fmt: skip


def line(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script looks for."""
    modes = {
        mode: {
            "ratio": round(one["ratio"]["median"], 3), "ratio_low": round(one["ratio"]["low"], 3),
            "ratio_high": round(one["ratio"]["high"], 3),
            "tokens_per_second": {k: round(v["median"], 1) for k, v in one["tokens_per_second"].items()},
            "peak_mib": {k: round(v["median"] / 2**20, 1) for k, v in one["peak_bytes"].items()},
            "memory_ratio": round(one["memory_ratio"]["median"], 3),
            "share_of_matmul_peak": round(one["share_of_matmul_peak"]["fettle"], 3),
            "mfu": one["mfu"] and round(one["mfu"]["fettle"], 3),
            "loss_apart": {k: round(v, 6) for k, v in one["loss_apart"].items()}, "trl_setting": one["trl_setting"],
        }
        for mode, one in result["modes"].items()
    }  # fmt: skip
    return {
        "benchmark": "sft", "quick": result["quick"], "device": result["device"], "ratio": round(result["ratio"], 3),
        "memory_ratio": round(result["memory_ratio"], 3), **modes,
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss against useful tokens seen, both sides, a panel for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen = list(accumulate(sum(step["lengths"]) for step in result["steps"]))
    figure, panels = plt.subplots(1, len(result["modes"]), figsize=(9, 3.4), layout="constrained")
    for panel, (mode, one) in zip(panels, result["modes"].items(), strict=True):
        panel.plot(seen, one["loss"]["trl"], color="#c46210", lw=3.2, alpha=0.55, label="TRL")
        panel.plot(seen, one["loss"]["fettle"], color="#1f4e79", lw=1.4, marker=".", label="fettle")
        panel.set_title(f"{NAMES[mode]}: {one['loss_apart']['mean']:.2%} apart in the mean", fontsize=10)
        panel.set_xlabel("useful tokens seen")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    panels[0].set_ylabel("loss (nats a learned token)")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown: what was run and where, the table, the shares, the settings tried, the curves."""
    made = result["made"]
    parts = [
        heading(result),
        f"Llama, {made['parameters'] / 1e6:.1f}M weights ({result['size']}), {made['dtype']}; {result['data']}; "
        f"{len(result['steps'])} steps of {made['row']:,} positions ({result['warmup']} to warm up), {result['pairs']} pairs.",
        _main_table(result), _shares(result), _tried(result),
        f"![loss against tokens seen, fettle and TRL](sft-{result['device']}.png)", _curves(result),
    ]  # fmt: skip
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _main_table(result: dict[str, Any]) -> str:
    rows = []
    for mode, one in result["modes"].items():
        rate, peak = one["tokens_per_second"], one["peak_bytes"]
        speed, memory = Spread(**one["ratio"]), Spread(**one["memory_ratio"])
        rows.append([f"{NAMES[mode]}: useful tokens/s", *(Spread(**rate[k]).text() for k in ("fettle", "trl")),
                     f"**{speed.text('.2f')}**"])  # fmt: skip
        rows.append([f"{NAMES[mode]}: peak memory, MiB", *(f"{peak[k]['median'] / 2**20:,.0f}" for k in ("fettle", "trl")),
                     memory.text(".2f")])  # fmt: skip
    return table(["median (least - most)", "fettle", "TRL, its best setting", "fettle / TRL"], rows)


def _shares(result: dict[str, Any]) -> str:
    peak = result["matmul"]
    told = [
        f"{NAMES[mode]} {one['share_of_matmul_peak']['fettle']:.1%} (TRL {one['share_of_matmul_peak']['trl']:.1%})"
        + (f", MFU by the data sheet {one['mfu']['fettle']:.1%} (TRL {one['mfu']['trl']:.1%})" if one["mfu"] else "")
        for mode, one in result["modes"].items()
    ]
    return f"Share of the matmul peak measured here ({peak['flops'] / 1e9:,.0f} GFLOP/s in {peak['dtype']}): {'; '.join(told)}."


def _tried(result: dict[str, Any]) -> str:
    settings: dict[str, dict[str, str]] = {}
    for mode, one in result["modes"].items():
        for row in one["trl_tried"]:
            text = row.get("error") or f"{row['tokens_per_second']:,.0f}"
            chosen = f"**{text}**" if row["setting"] == one["trl_setting"] else text
            settings.setdefault(row["setting"], {})[mode] = chosen + ("" if row.get("same_training", True) else " (*)")
    rows = [[setting, *(cells.get(mode, "") for mode in result["modes"])] for setting, cells in settings.items()]
    head = ["TRL's settings, useful tokens/s over a few steps", *result["modes"]]
    return table(head, rows) + "\n\n(*) lets examples see the ones before them: another training, so never chosen."


def _curves(result: dict[str, Any]) -> str:
    told = [
        f"{NAMES[mode]}: from {one['loss']['fettle'][0]:.3f} to {one['loss']['fettle'][-1]:.3f} (TRL "
        f"{one['loss']['trl'][0]:.3f} to {one['loss']['trl'][-1]:.3f}), {one['loss_apart']['mean']:.3%} apart in the mean, "
        f"{one['loss_apart']['largest']:.3%} at most"
        for mode, one in result["modes"].items()
    ]
    return f"Loss at equal examples, steps, learning rates and starting weights. {'; '.join(told)}."
