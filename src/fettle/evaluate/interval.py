"""Bootstrap intervals (Efron 1979): what the score might have been with other examples of the same kind.

Percentile intervals over 10,000 resamples, seeded, by example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CELLS = 4_000_000  # numbers held at a time


@dataclass(frozen=True)
class Score:
    """A mean over `n` examples with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES) -> Score:
    """The mean of `values` and its interval. Differences of pairs make it a paired interval."""
    array = np.asarray(values, dtype=np.float64)
    return ratio_interval(array, np.ones_like(array), seed, level, resamples)


def ratio_interval(
    sums: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Score:
    """sum(sums) / sum(counts) and its interval, resampling the pairs.

    Drawing n examples with replacement draws a multinomial count of each distinct one, so examples that
    score the same are drawn together: exact, and quick where scores are 0 or 1.
    """
    pairs = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], 1)
    n = len(pairs)
    if not n:
        raise ValueError("an interval needs at least one example")
    distinct, times = np.unique(pairs, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // len(distinct))
    totals = np.concatenate(
        [rng.multinomial(n, times / n, size=min(step, resamples - i)) @ distinct for i in range(0, resamples, step)]
    )
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Score(float(pairs[:, 0].sum() / pairs[:, 1].sum()), float(low), float(high), n)
