"""Krippendorff's alpha: how far labelers agree beyond chance, whoever labelled what.

    alpha = 1 - D_o / D_e = 1 - (n - 1) sum_ck o_ck d(c, k) / sum_ck n_c n_k d(c, k)

    o_ck    pairs of values c and k within units, each unit's weighed by 1 / (values of the unit - 1)
    n_c     sum_k o_ck, and n the sum of those: the values of units that have two or more
    d       nominal   c != k
            ordinal   (n_c / 2 + sum of n between them + n_k / 2)^2
            interval  (c - k)^2

    Krippendorff 2011, Computing Krippendorff's Alpha-Reliability; Content Analysis, chapter 12

1 is full agreement, 0 that of chance, below 0 less than chance. Krippendorff relies on 0.8 and above, and draws tentative
conclusions from 0.667.

Shapes: U units, V distinct values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fettle.core.errors import FettleError
from fettle.feedback.bradley_terry import RESAMPLES, resampled

Level = Literal["nominal", "ordinal", "interval"]
MOST = 2000  # distinct values of which a table of pairs is made


@dataclass(frozen=True)
class Alpha:
    """Agreement beyond chance with its 95% interval over resampled clusters; NaN where all values are the same, which has no chance."""

    alpha: float
    low: float | None
    high: float | None
    units: int  # that two labelers or more have labelled
    values: int  # in those


def krippendorff(
    units: Iterable[Sequence[Any]], level: Level, clusters: Sequence[Any] | None = None, seed: int = 0,
    resamples: int = RESAMPLES,
) -> Alpha:  # fmt: skip
    """Alpha of units, each the values that labelers gave to it, missing ones left out; their order does not matter.

    Values are compared as numbers where `level` is not nominal. `clusters` says which units are drawn together for the interval
    (a prompt's); each by itself where it is left out.
    """
    every = list(units)
    names = list(range(len(every))) if clusters is None else list(clusters)
    kept = [(unit, name) for unit, name in zip(every, names, strict=True) if len(unit) > 1]
    values = sorted({value for unit, _ in kept for value in unit}, key=str if level == "nominal" else None)
    total = sum(len(unit) for unit, _ in kept)
    if not kept:
        return Alpha(float("nan"), None, None, 0, 0)
    if len(values) > MOST:
        raise FettleError(f"agreement: {len(values)} distinct values; round them to {MOST} at most")
    where, weight, owner = _pairs([unit for unit, _ in kept], {v: i for i, v in enumerate(values)})
    size = len(values) ** 2
    points = np.arange(len(values), dtype=float) if level == "nominal" else np.array(values, float)
    point = _alpha(np.bincount(where, weights=weight, minlength=size)[None], points, level)[0]
    places = {name: i for i, name in enumerate(dict.fromkeys(name for _, name in kept))}
    low = high = None
    if len(places) > 1:
        drawn = np.array([places[name] for _, name in kept])[owner]
        found = np.concatenate(
            [_alpha(table, points, level) for table in resampled(drawn, where, weight, size, seed, resamples)]
        )
        if len(found := found[np.isfinite(found)]):  # a resample of equal values has no alpha
            low, high = (float(edge) for edge in np.quantile(found, [0.025, 0.975]))
    return Alpha(float(point), low, high, len(kept), total)


def _pairs(units: Sequence[Sequence[Any]], index: dict[Any, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The coincidences of all units as cells of the table [V, V], their weights, and the unit that each comes from."""
    where, weight, owner = [], [], []
    for number, unit in enumerate(units):
        counts = np.unique([index[value] for value in unit], return_counts=True)
        for c, n_c in zip(*counts, strict=True):
            for k, n_k in zip(*counts, strict=True):
                if (pairs := n_c * (n_k - (c == k))) > 0:
                    where.append(c * len(index) + k)
                    weight.append(pairs / (len(unit) - 1))
                    owner.append(number)
    return np.array(where), np.array(weight, float), np.array(owner)


def _alpha(tables: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    """float64 [B] of coincidences [B, V * V]; NaN where chance gives no disagreement."""
    count = len(values)
    table = tables.reshape(-1, count, count)
    margin = table.sum(2)
    match level:
        case "nominal":
            distance = np.broadcast_to(1.0 - np.eye(count), table.shape)
        case "ordinal":
            middle = margin.cumsum(1) - margin / 2  # half of a value's own, and all below
            distance = (middle[:, :, None] - middle[:, None, :]) ** 2
        case "interval":
            distance = np.broadcast_to((values[:, None] - values[None, :]) ** 2, table.shape)
    seen = (table * distance).sum((1, 2))
    chance = (margin[:, :, None] * margin[:, None, :] * distance).sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance > 0, 1 - (margin.sum(1) - 1) * seen / chance, np.nan)
