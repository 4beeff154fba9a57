"""Intervals: what a score might have been with other examples of the same kind.

Percentile bootstrap (Efron 1979) over 10,000 resamples, seeded, by example. Where all examples score the same, every
resample is the sample and that interval has no width, however few the examples; for values known to lie within [a, b] it is

    [c - u (c - a), c + u (b - c)],   u = z^2 / (n + z^2)

c the common value, n examples, z the normal quantile: a share of at most u of the population may score otherwise, anything
within the bounds. For scores of 0 or 1 that is the score interval of Wilson 1927 (Probable inference, the law of succession,
and statistical inference; JASA 22) for 0 of n and n of n, recommended for small n by Brown, Cai & DasGupta 2001.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
CELLS = 4_000_000  # numbers held at a time
SCORES, CHANGES = (0.0, 1.0), (-1.0, 1.0)  # the bounds of a task's score, and of the difference of two


@dataclass(frozen=True)
class Score:
    """A mean over `n` examples with its 95% interval; one example without bounds has none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.interval(', ')}]"

    def interval(self, between: str = " to ", form: str = ".3f") -> str:
        """From low to high as text."""
        return "n/a" if self.low is None else f"{self.low:{form}}{between}{self.high:{form}}"


def whisker(mean: float, low: float | None, high: float | None) -> list[list[float]]:
    """What matplotlib's errorbar takes: lengths below and above, 0 without bounds, never below 0 by a rounding."""
    ends = (mean if low is None else low, mean if high is None else high)
    return [[max(0.0, mean - ends[0])], [max(0.0, ends[1] - mean)]]


def mean_interval(
    values: Sequence[float],
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] | None = None,
) -> Score:
    """The mean of `values` and its interval. Differences of pairs make it a paired interval.

    `bounds` are those of one value, where it has any; without them values that are all the same give no width.
    """
    array = np.asarray(values, dtype=np.float64)
    if bounds is not None and len(array) and (array == array[0]).all():
        return constant_interval(float(array[0]), len(array), bounds, level)
    return ratio_interval(array, np.ones_like(array), seed, level, resamples)


def grouped_interval(
    groups: Sequence[Sequence[float]], seed: int = 0, bounds: tuple[float, float] | None = None
) -> Score:
    """The mean of all values and its interval, where those of a group, as the answers to one prompt, depend on each other.

    `n` counts the groups, none of which is empty; `bounds` as in `mean_interval`.
    """
    sums, counts = [float(np.sum(group)) for group in groups], [len(group) for group in groups]
    means = {total / count for total, count in zip(sums, counts, strict=True)}
    if bounds is not None and len(means) == 1:
        return constant_interval(means.pop(), len(groups), bounds)
    return ratio_interval(sums, counts, seed)


def constant_interval(value: float, n: int, bounds: tuple[float, float], level: float = 0.95) -> Score:
    """The interval of a mean where all `n` examples have the same value, within `bounds`."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    other = z**2 / (n + z**2)
    return Score(value, value - other * (value - bounds[0]), value + other * (bounds[1] - value), n)


def ratio_interval(
    sums: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Score:
    """sum(sums) / sum(counts) and its interval, resampling the pairs; a single pair says nothing of others.

    Drawing n examples with replacement draws a multinomial count of each distinct one, so examples that
    score the same are drawn together: exact, and quick where scores are 0 or 1.
    """
    pairs = np.stack([np.asarray(sums, np.float64), np.asarray(counts, np.float64)], 1)
    n = len(pairs)
    if not n:
        raise ValueError("an interval needs at least one example")
    if n == 1:
        return Score(float(pairs[0, 0] / pairs[0, 1]), None, None, 1)
    distinct, times = np.unique(pairs, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // len(distinct))
    totals = np.concatenate(
        [rng.multinomial(n, times / n, size=min(step, resamples - i)) @ distinct for i in range(0, resamples, step)]
    )
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Score(float(pairs[:, 0].sum() / pairs[:, 1].sum()), float(low), float(high), n)
