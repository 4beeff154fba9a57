"""What the GRPO benchmark leaves: a summary as JSON, the curves as a picture, a section for a page, one line."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.command import shown
from benchmarks.common import Spread, closeness, heading, ratios, table
from benchmarks.grpo_arms import Setting


def summary(asked: argparse.Namespace, facts: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    runs, same, last = found["runs"], found["same"], asked.warmup

    def seconds(run: dict[str, Any]) -> float:
        return float(run["marks"][-1] - run["marks"][last - 1]) / (len(run["marks"]) - last)

    def rate(run: dict[str, Any]) -> float:
        return float(sum(run["tokens"][last:])) / (run["marks"][-1] - run["marks"][last - 1])

    steps = {name: [seconds(run) for run in some] for name, some in runs.items()}
    rates = {name: [rate(run) for run in some] for name, some in runs.items()}
    peaks = {name: [run["peak"] for run in some] for name, some in runs.items()}
    rollout = [statistics.fmean(run["rollout"][last:]) for run in runs["fettle"]]
    return {
        "benchmark": "grpo", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": asked.device,
        "command": shown("benchmarks/grpo.py"), "data": Path(asked.data).name,
        "size": asked.size, "pairs": asked.pairs, "warmup": asked.warmup, "steps": asked.steps, **facts,
        "seconds": {name: Spread.of(values).plain() for name, values in steps.items()},
        "rollout_seconds": Spread.of(rollout).plain(),
        "tokens_per_second": {name: Spread.of(values).plain() for name, values in rates.items()},
        "tokens": {name: [sum(run["tokens"]) for run in some] for name, some in runs.items()},
        "ratio": ratios(steps["trl"], steps["fettle"]).plain(),
        "ratio_by_tokens": ratios(rates["fettle"], rates["trl"]).plain(),
        "peak_bytes": {name: Spread.of(values).plain() for name, values in peaks.items()},
        "memory_ratio": ratios(peaks["fettle"], peaks["trl"]).plain(),
        "same": {name: {key: run[key] for key in ("loss", "reward", "grad_norm", "k3", "lr")} for name, run in same.items()},
        "apart": {key: closeness(same["fettle"][key], same["trl"][key]) for key in ("reward", "grad_norm", "lr")},
        "kl_apart": max(abs(a - b) for a, b in zip(*(run["k3"] for run in same.values()), strict=True)),
        "gap": max(gap for run in runs["fettle"] for gap in run["gap"]),
        "trl_setting": str(found["setting"]),
        "trl_tried": [{"setting": str(Setting(**row["setting"])), **{k: row[k] for k in ("seconds", "error") if k in row}} for row in found["tried"]],
    }  # fmt: skip


def line(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that a script looks for."""
    speed = result["ratio"]
    return {
        "benchmark": "grpo", "quick": result["quick"], "device": result["device"], "ratio": round(speed["median"], 3),
        "ratio_low": round(speed["low"], 3), "ratio_high": round(speed["high"], 3),
        "ratio_by_tokens": round(result["ratio_by_tokens"]["median"], 3),
        "memory_ratio": round(result["memory_ratio"]["median"], 3),
        "seconds": {k: round(v["median"], 3) for k, v in result["seconds"].items()},
        "rollout_seconds": round(result["rollout_seconds"]["median"], 3),
        "peak_mib": {k: round(v["median"] / 2**20, 1) for k, v in result["peak_bytes"].items()},
        "apart": {key: {k: float(f"{v:.3g}") for k, v in one.items()} for key, one in result["apart"].items()},
        "kl_apart": float(f"{result['kl_apart']:.3g}"), "gap": float(f"{result['gap']:.3g}"),
        "trl_setting": result["trl_setting"], "load_before": result["machine"]["load"],
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Reward and gradient norm by step on the same answers, both sides."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, (key, label) in zip(panels, (("reward", "reward"), ("grad_norm", "gradient norm")), strict=True):
        steps = range(1, result["steps"] + 1)
        panel.plot(steps, result["same"]["trl"][key], color="#c46210", lw=3.2, alpha=0.55, label="TRL")
        panel.plot(steps, result["same"]["fettle"][key], color="#1f4e79", lw=1.4, marker=".", label="fettle")
        panel.set_ylabel(label)
        panel.set_xlabel("optimizer step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.2)
    panels[0].set_title(f"on the same answers: gradients {result['apart']['grad_norm']['mean']:.2%} apart", fontsize=10)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown: what was run and where, the table, the settings tried, the same answers."""
    made, job, apart = result["made"], result["job"], result["apart"]
    tokens = {name: statistics.fmean(some) / result["steps"] for name, some in result["tokens"].items()}
    parts = [
        heading(result),
        f"Llama, {made['parameters'] / 1e6:.1f}M weights ({result['size']}), {made['dtype']}, LoRA r8 on all linear layers; prompts of "
        f"{result['data']}, {made['prompt']:.0f} tokens in the mean; {result['steps']} steps ({result['warmup']} to warm up) of "
        f"{job['prompts']} prompts x {job['group']} answers of up to {job['max_tokens']} tokens, beta {job['beta']}; a step holds "
        f"{tokens['fettle']:,.0f} tokens of answers (TRL {tokens['trl']:,.0f}, drawn by its own sampler); {result['pairs']} measurements of each side.",
        _main_table(result), _tried(result),
        f"![reward and gradient norm by step, fettle and TRL](grpo-{result['device']}.png)",
        f"On fettle's answers, in fp32 and from the same weights, all {result['steps']} steps: rewards {apart['reward']['largest']:.2%} apart at most, "
        f"gradient norms {apart['grad_norm']['largest']:.3%}, divergences {result['kl_apart']:.2g} nats a token. fettle's sampler and trainer "
        f"were {result['gap']:.2g} nats a token apart at most.",
    ]  # fmt: skip
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _main_table(result: dict[str, Any]) -> str:
    def row(what: str, key: str, ratio: str, form: str, scale: float = 1.0) -> list[str]:
        cells = [Spread(*(x / scale for x in result[key][k].values())).text(form) for k in ("fettle", "trl")]
        return [what, *cells, Spread(**result[ratio]).text(".2f")]

    rows = [
        row("seconds a step", "seconds", "ratio", ".2f"),
        row("tokens of answers/s, written and learned", "tokens_per_second", "ratio_by_tokens", ",.0f"),
        row("peak memory, MiB", "peak_bytes", "memory_ratio", ",.0f", 2**20),
    ]
    rows[0][-1] = f"**{rows[0][-1]}**"
    rows.insert(1, ["of which writing and rewarding", Spread(**result["rollout_seconds"]).text(".2f"), "", ""])
    return table(
        ["median (least - most)", "fettle", "TRL, its best setting", "faster by; of memory fettle / TRL"], rows
    )


def _tried(result: dict[str, Any]) -> str:
    rows = []
    for one in result["trl_tried"]:
        text = one.get("error") or f"{one['seconds']:.2f}"
        rows.append([one["setting"], f"**{text}**" if one["setting"] == result["trl_setting"] else text])
    return table(["TRL's settings", "seconds a step"], rows)
