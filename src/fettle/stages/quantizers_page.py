"""What a comparison of quantizers looks like: a table, quality against bits, output error by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fettle.evaluate.interval import ratio_interval
from fettle.stages.findings import said_bits, worst

Row = dict[str, Any]
COLOURS = {
    "rtn": "#a0522d",
    "hqq": "#6b8e23",
    "awq": "#7b4fa3",
    "gptq": "#1f4e79",
    "nf4": "#c71585",
    "llm_int8": "#111111",
}


QUALITY = ("arm", "bits", "group", "bits/weight", "perplexity", "change", "KL mean, p99", "top-1", "worst layer")
COST = ("arm", "size", "prefill/s", "decode/s", "of the full model's", "kernel", "fell back", "time", "peak")


def tables(rows: Sequence[Row]) -> list[Table]:
    """What is left of the model, and what it costs: a row an arm, figures by their mean over seeds."""
    made, arms = [], means(rows)
    for title, heads, cells in (("quality", QUALITY, _quality), ("cost", COST, _cost)):
        shown = Table(title=title, title_justify="left", padding=(0, 0), pad_edge=False)
        for head in heads:
            shown.add_column(head, justify="left" if head in ("arm", "worst layer", "kernel") else "right")
        for row in arms:
            shown.add_row(row["arm"], *cells(row, rows[0]))
        made.append(shown)
    return made


def _quality(row: Row, full: Row) -> list[str]:
    errors = row.get("errors") or {}
    bad = worst([{"layer": name, "error": error} for name, error in errors.items()], 1)
    group = "" if row["group"] is None else f"{row['group']}{'' if row['symmetric'] else ', zeros'}"
    return [
        said_bits(row) + (f" {row['by']}" if row["by"] else ""), group, f"{row['bits_packed'] or row['bits_all']:.2f}",
        f"{row['perplexity']:.3f}", paired(row, full), f"{row['kl']:.4f}, {row['kl_p99']:.2f}", f"{100 * row['agreement']:.1f}%",
        f"{_short(bad[0]['layer'])} {bad[0]['error']:.1g}" if bad else "",
    ]  # fmt: skip


def _cost(row: Row, _: Row) -> list[str]:
    speed, beside = row["speed"], row["speed_full"]
    faster = "" if beside is None else ", ".join(f"{speed[key] / beside[key]:.2f}x" for key in ("prefill", "decode"))
    ran = row.get("seconds") is not None
    return [
        f"{row['model_bytes'] / 2**20:,.1f} MiB", f"{speed['prefill']:,.0f}", f"{speed['decode']:,.0f}", faster,
        ", ".join(row.get("kernels") or ()), str(len(row.get("fallbacks") or ())) if ran else "",
        f"{row['seconds']:,.0f} s" if ran else "", f"{row['peak_bytes'] / 2**20:,.0f} MiB" if ran else "",
    ]  # fmt: skip


def paired(row: Row, full: Row) -> str:
    """The change of perplexity with its paired interval, as text; '' for the full model itself."""
    if row["arm"] == full["arm"]:
        return ""
    change, low, high = rise(row, full)
    return f"{100 * change:+.2f}%" + (
        "" if low is None or high is None else f" ({100 * low:+.2f} to {100 * high:+.2f})"
    )


def rise(row: Row, full: Row) -> tuple[float, float | None, float | None]:
    """(perplexity over the full model's less one, low, high): by windows of the text, resampled in pairs."""
    apart = [a - b for (a, _), (b, _) in zip(row["windows"], full["windows"], strict=True)]
    found = ratio_interval(apart, [count for _, count in full["windows"]])
    low, high = (None if edge is None else math.expm1(edge) for edge in (found.low, found.high))
    return math.expm1(found.mean), low, high


def means(rows: Sequence[Row]) -> list[Row]:
    """One row an arm: figures are means over its seeds; what is no figure is the first seed's."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        merged = dict(runs[0])
        for key in ("perplexity", "kl", "kl_p99", "agreement", "seconds", "peak_bytes"):
            known = [run[key] for run in runs if run.get(key) is not None]
            merged[key] = sum(known) / len(known) if known else None
        merged["windows"] = np.mean([run["windows"] for run in runs], axis=0).tolist()
        found.append(merged)
    return found


def _short(layer: str) -> str:
    return layer.removeprefix("model.").replace("layers.", "").replace("self_attn.", "").replace("mlp.", "")


# Pictures.


def draw_bits(rows: Sequence[Row], file: Path) -> None:
    """Rise of perplexity, and KL, against effective bits a weight; a line a method where it has several widths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    full, arms = (
        rows[0],
        [
            row
            for row in means(rows)
            if row["bits_packed"] and row["stage"] == "quantize" and not row["outliers"] and not row["after"]
        ],
    )
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axis, what in zip(axes, ("perplexity", "KL"), strict=True):
        labelled: set[str] = set()
        for name in dict.fromkeys(row["name"] for row in arms):
            mine = sorted(
                (r for r in arms if r["name"] == name and r["activations"] is None), key=lambda r: r["bits_packed"]
            )
            colour = COLOURS.get(name, "#555555")
            if len(mine) > 1:
                axis.plot(
                    [r["bits_packed"] for r in mine],
                    [_height(r, full, what) for r in mine],
                    "-",
                    lw=1.2,
                    color=colour,
                    alpha=0.7,
                )
        for row in arms:
            weights = row["activations"] is None
            label = row["name"] if weights else "activations rounded too"
            colour = COLOURS.get(row["name"], "#555555") if weights else "#d98200"
            axis.plot(
                row["bits_packed"], _height(row, full, what), "o" if weights else "s", ms=6 if weights else 5, color=colour,
                label=None if label in labelled else label, mfc=colour if weights else "none",
            )  # fmt: skip
            labelled.add(label)
        axis.set(xlabel="bits a weight, scales counted", yscale="log")
        axis.set_ylabel(
            "rise of perplexity (%, 0.001 where there is none)"
            if what == "perplexity"
            else "KL to the full model (nats a token)"
        )
        axis.axhline(0.5, lw=0.8, ls=":", color="#444444") if what == "perplexity" else None
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2, which="major")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _height(row: Row, full: Row, what: str) -> float:
    """What the picture shows; a rise that is none stands at the foot of the axis."""
    return max(100 * rise(row, full)[0], 1e-3) if what == "perplexity" else max(row["kl"], 1e-7)


def draw_layers(rows: Sequence[Row], file: Path) -> None:
    """|W x - W^ x^|^2 / |W x|^2 of every layer (down) in every arm (across), by colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [row for row in means(rows) if any(error is not None for error in (row.get("errors") or {}).values())]
    if not arms:
        return
    layers = list(dict.fromkeys(name for row in arms for name in row["errors"]))
    grid = np.array([[row["errors"].get(name) or np.nan for row in arms] for name in layers], dtype=float)
    figure, axis = plt.subplots(figsize=(2.4 + 0.34 * len(arms), 2.2 + 0.17 * len(layers)), layout="constrained")
    image = axis.imshow(np.log10(np.maximum(grid, 1e-8)), aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(arms)), [row["arm"] for row in arms], rotation=90, fontsize=7)
    axis.set_yticks(range(len(layers)), [_short(name) for name in layers], fontsize=6)
    bar = figure.colorbar(image, ax=axis, shrink=0.6)
    bar.set_label("log10 of the share of the output that is lost", fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
