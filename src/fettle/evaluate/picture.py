"""The picture of scores: a row a group, a bar a model, its interval as a whisker."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fettle.core.files import write_bytes
from fettle.evaluate.interval import Score, whisker

COLOURS = ("#8a8f98", "#1f6feb", "#d97706", "#0f9d76")
MOST = 30  # rows of one picture
EMPTY = "Last Resort"  # fonts that have a box for every character
GAP = 0.7  # rows left free above a total


@dataclass(frozen=True)
class Group:
    """One row of the picture: a score for each model that has one. A total stands above the groups it sums up."""

    label: str
    scores: dict[str, Score]
    total: bool = False


def bars(groups: Sequence[Group], models: Sequence[str], file: Path) -> None:
    """Horizontal bars from 0 to 1, first group on top; PNG. Over MOST groups, those that are left out are counted below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left_out, groups = max(0, len(groups) - MOST), groups[:MOST]
    rows, height = _rows(groups)
    figure = Figure(figsize=(8, 1.2 + 0.17 * height * (len(models) + 0.4)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    fonts = legible([*(group.label for group in groups), *models])
    labels, names = ([fonts.show(text) for text in texts] for texts in ([g.label for g in groups], models))
    for number in range(len(models)):
        _of_model(axes, groups, rows, number, models, names[number])
    axes.set_yticks(rows, labels, fontsize=8, fontfamily=fonts.families)
    for text, group in zip(axes.get_yticklabels(), groups, strict=True):
        if group.total and len(fonts.families) == 1:  # a font for another script seldom has a bold face
            text.set_fontweight("bold")
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    more = f"\n{left_out} more groups are in the results' JSON" if left_out else ""
    axes.set_xlabel(f"score, with its 95% interval{more}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(models) > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=len(models),
            prop={"family": fonts.families, "size": 8},
        )  # fmt: skip
    out = io.BytesIO()
    figure.savefig(out, format="png")
    write_bytes(file, out.getvalue())


def _rows(groups: Sequence[Group]) -> tuple[list[float], float]:
    """Where each group stands, from the top, and the height of them all."""
    rows: list[float] = []
    at = 0.0
    for i, group in enumerate(groups):
        at += GAP if group.total and i else 0
        rows.append(at)
        at += 1
    return rows, at


def _of_model(axes: Any, groups: Sequence[Group], rows: Sequence[float], number: int, models: Sequence[str], name: str) -> None:  # fmt: skip
    """The bars of one model, with their whiskers and figures."""
    thick = 0.8 / len(models)
    mine = [(at, score) for group, at in zip(groups, rows, strict=True) if (score := group.scores.get(models[number]))]
    label: str | None = name
    for at, score in mine:
        at += (number - (len(models) - 1) / 2) * thick
        spread = whisker(score.mean, score.low, score.high)
        axes.barh(at, score.mean, thick * 0.9, color=COLOURS[number % len(COLOURS)], label=label)
        axes.errorbar(score.mean, at, xerr=spread, fmt="none", ecolor="#222222", capsize=2, linewidth=1)
        axes.annotate(
            f"{score.mean:.2f}", (score.mean + spread[1][0], at), (5, 0), textcoords="offset points", va="center",
            fontsize=7, color="#333333",
        )  # fmt: skip
        label = None  # one bar names the colour


@dataclass(frozen=True)
class Fonts:
    """The fonts to draw with, in order, and the characters that they have between them."""

    families: list[str]
    characters: frozenset[int]

    def show(self, text: str) -> str:
        r"""The text, or where a character of it cannot be drawn, its ASCII form with \u escapes; never an empty box."""
        fits = all(ord(c) in self.characters for c in text)
        return (text if fits else text.encode("ascii", "backslashreplace").decode()).replace("$", r"\$")


def legible(texts: Iterable[str]) -> Fonts:
    """Matplotlib's own font, and where it lacks characters of the texts, an installed one that has most of the rest."""
    from matplotlib import font_manager

    own = font_manager.FontProperties()
    has = _characters(font_manager.findfont(own))
    missing = {ord(c) for text in texts for c in text} - has
    if missing:
        fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith(EMPTY)]
        found = [(font.name, _characters(font.fname)) for font in fonts] or [("", frozenset())]
        name, characters = max(found, key=lambda font: len(missing & font[1]))
        if missing & characters:
            return Fonts([*own.get_family(), name], has | characters)
    return Fonts(own.get_family(), has)


def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # listed, but gone or not readable
        return frozenset()
