"""Mixtures: how many examples of each source an epoch holds, and in which order.

An epoch is E examples. Without weights E is the sum over the sources of min(n, cap), and each source gives min(n, cap)
of them: everything once, or by the examples-proportional rule p_i = min(n_i, K) / sum_j min(n_j, K) (arXiv 2109.01652)
where there are caps. With weights E is the sum of all n, and a source gives weight / (sum of weights) of it. A source runs
through its own endless sequence of shuffled passes, each epoch going on where the one before stopped, so at any time its
examples were used equally often, give or take one. The order is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fettle.core.errors import FettleError
from fettle.data.packing import shuffled
from fettle.data.spec import DataSpec

PASS, EPOCH, ROWS = 1, 2, 3  # streams of the random generator


def shares(specs: Sequence[DataSpec], sizes: Sequence[int]) -> list[int]:
    """How many examples of each source one epoch holds."""
    weighted = [spec.weight is not None for spec in specs]
    if any(weighted) and not all(weighted):
        lacking = specs[weighted.index(False)].path
        raise FettleError(
            f"data: '{lacking}' has no weight but another source has; give every source a weight, or none"
        )
    if not any(weighted):
        return [min(n, spec.cap or n) for spec, n in zip(specs, sizes, strict=True)]
    weights = np.array([spec.weight for spec in specs], dtype=np.float64)
    exact = weights / weights.sum() * sum(sizes)
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: sum(sizes) - counts.sum()]:  # largest remainders first
        counts[i] += 1
    return [int(c) for c in counts]


def epoch_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """int64 [sum of counts, 2]: (source, example) in the order of this epoch."""
    parts = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        picked = _draw(size, epoch * count, count, seed, source)
        parts.append(np.stack([np.full(count, source, dtype=np.int64), picked], axis=1))
    joined = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)
    return joined[shuffled(len(joined), seed, EPOCH, epoch)]


def _draw(size: int, begin: int, count: int, seed: int, source: int) -> np.ndarray:
    """Examples [begin, begin + count) of a source's endless sequence of shuffled passes."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    first, last = begin // size, (begin + count - 1) // size
    passes = [shuffled(size, seed, PASS, source, number) for number in range(first, last + 1)]
    start = begin - first * size
    return np.concatenate(passes)[start : start + count]
