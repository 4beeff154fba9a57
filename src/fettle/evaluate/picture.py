"""The picture of scores: a row a group, a bar a model, its interval as a whisker."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from fettle.core.files import write_bytes
from fettle.evaluate.interval import Score

COLOURS = ("#8a8f98", "#1f6feb", "#d97706", "#0f9d76")


def bars(groups: dict[str, dict[str, Score]], models: Sequence[str], file: Path) -> None:
    """`groups[label][model]` as horizontal bars from 0 to 1, first group on top; PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    thick = 0.8 / len(models)
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(groups) * (len(models) + 0.6)), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for m, model in enumerate(models):
        first = next(
            (g for g, scores in enumerate(groups.values()) if model in scores), 0
        )  # the bar that names its colour
        for g, scores in enumerate(groups.values()):
            if score := scores.get(model):
                at = g + (m - (len(models) - 1) / 2) * thick
                whisker = [[max(0.0, score.mean - score.low)], [max(0.0, score.high - score.mean)]]
                axes.barh(
                    at, score.mean, thick * 0.9, color=COLOURS[m % len(COLOURS)], label=model if g == first else None
                )
                axes.errorbar(score.mean, at, xerr=whisker, fmt="none", ecolor="#222222", capsize=2, linewidth=1)
                axes.annotate(f"{score.mean:.2f}", (max(score.high, score.mean), at), (5, 0), textcoords="offset points",
                              va="center", fontsize=7, color="#333333")  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("score, with 95% bootstrap interval", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(models) > 1:
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(models))
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_bytes(file, out.getvalue())
