"""Mixtures: how many examples of each source an epoch holds, and in which order.

An epoch is E examples. Without weights E is the sum over the sources of min(n, cap), and each source gives min(n, cap)
of them: everything once, or by the examples-proportional rule p_i = min(n_i, K) / sum_j min(n_j, K) (arXiv 2109.01652)
where there are caps. With weights E is the sum of all n, and a source gives weight / (sum of weights) of it. Where that is
no whole number an epoch takes what is whole of it, and the examples that are left to take come from the sources that lag
most behind their shares of all epochs so far, one each. A source runs through its own endless sequence of shuffled passes,
each epoch going on where the one before stopped, so at any time its examples were used equally often, give or take one.
The order is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fettle.core.errors import FettleError
from fettle.data.packing import shuffled
from fettle.data.spec import DataSpec

PASS, EPOCH, ROWS = 1, 2, 3  # streams of the random generator


class Mixture:
    """Which examples of each source every epoch takes, and in which order. `sizes` int [n]: the examples that there are."""

    def __init__(self, specs: Sequence[DataSpec], sizes: Sequence[int], seed: int) -> None:
        self.specs, self.sizes, self.seed = specs, sizes, seed
        self.shares = _shares(specs, sizes)
        self.per_epoch = round(self.shares.sum())
        self._taken = [np.zeros(len(sizes), dtype=np.int64)]  # before each epoch, up to the last that was asked for

    def counts(self, epoch: int) -> np.ndarray:
        """int64 [n]: how many examples of each source an epoch holds; their sum is the same for all."""
        return self._before(epoch + 1) - self._before(epoch)

    def order(self, epoch: int) -> np.ndarray:
        """int64 [sum of counts, 2]: (source, example) in the order of this epoch."""
        parts = []
        for source, (size, begin, count) in enumerate(
            zip(self.sizes, self._before(epoch).tolist(), self.counts(epoch).tolist(), strict=True)
        ):
            picked = _draw(size, begin, count, self.seed, source)
            parts.append(np.stack([np.full(count, source, dtype=np.int64), picked], axis=1))
        joined = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)
        return joined[shuffled(len(joined), self.seed, EPOCH, epoch)]

    @property
    def notes(self) -> list[str]:
        """A sentence for each source of which the first epoch holds nothing."""
        return [
            f"{spec.path}: its weight gives it {share:.2g} examples an epoch, and the first epoch holds none of them; raise its "
            "weight, or leave it out"
            for spec, share, count in zip(self.specs, self.shares.tolist(), self.counts(0).tolist(), strict=True)
            if not count
        ]

    def _before(self, epoch: int) -> np.ndarray:
        """int64 [n]: how many examples of each source the epochs before this one take."""
        while len(self._taken) <= epoch:
            counts = self._taken[-1] + np.floor(self.shares).astype(np.int64)
            lag = self.shares * len(self._taken) - counts
            left = self.per_epoch * len(self._taken) - counts.sum()
            counts[np.argsort(-lag, kind="stable")[:left]] += 1
            self._taken.append(counts)
        return self._taken[epoch]


def _shares(specs: Sequence[DataSpec], sizes: Sequence[int]) -> np.ndarray:
    """float64 [n]: the examples of each source in an epoch, on average; their sum is a whole number."""
    weighted = [spec.weight is not None for spec in specs]
    if any(weighted) and not all(weighted):
        lacking = specs[weighted.index(False)].path
        raise FettleError(
            f"data: '{lacking}' has no weight but another source has; give every source a weight, or none"
        )
    if not any(weighted):
        return np.array([min(n, spec.cap or n) for spec, n in zip(specs, sizes, strict=True)], dtype=np.float64)
    weights = np.array([spec.weight for spec in specs], dtype=np.float64)
    return weights / weights.sum() * sum(sizes)


def _draw(size: int, begin: int, count: int, seed: int, source: int) -> np.ndarray:
    """Examples [begin, begin + count) of a source's endless sequence of shuffled passes."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    first, last = begin // size, (begin + count - 1) // size
    passes = [shuffled(size, seed, PASS, source, number) for number in range(first, last + 1)]
    start = begin - first * size
    return np.concatenate(passes)[start : start + count]
