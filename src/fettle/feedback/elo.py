"""Elo ratings: one update a comparison, in the order in which they were made.

    E = 1 / (1 + 10^((R_j - R_i) / 400))        R_i += K (S - E)        R_j -= K (S - E)        S = 1, 1/2 or 0

    Elo 1978, The Rating of Chessplayers

The result depends on the order, which means nothing where models do not change, so Bradley-Terry is the first choice. How much
it depends is told beside it: the range over shuffled orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fettle.core.errors import FettleError
from fettle.feedback.bradley_terry import MEAN, Comparison

ORDERS = 100


@dataclass(frozen=True)
class Elo:
    """A model's rating in the order given, and the range in which 95% of shuffled orders put it."""

    name: str
    rating: float
    low: float
    high: float


def elo(played: Sequence[Comparison], k: float = 16.0, orders: int = ORDERS, seed: int = 0) -> list[Elo]:
    """Every model's Elo rating, the best first; all begin at 1000. `k` is the most that one comparison moves."""
    if not played:
        raise FettleError("elo: no comparisons; name the models of the answers ('source') in what is labelled")
    names = sorted({name for c in played for name in (c.first, c.second)})
    index = {name: i for i, name in enumerate(names)}
    first, second = (np.array([index[getattr(c, side)] for c in played]) for side in ("first", "second"))
    score = np.array([c.score for c in played])
    rng = np.random.default_rng(seed)
    ways = np.stack([np.arange(len(played)), *(rng.permutation(len(played)) for _ in range(orders))])
    ratings, rows = np.full((len(ways), len(names)), MEAN), np.arange(len(ways))
    for step in ways.T:  # one comparison of every order at a time
        i, j = first[step], second[step]
        expected = 1 / (1 + 10 ** ((ratings[rows, j] - ratings[rows, i]) / 400))
        change = k * (score[step] - expected)
        ratings[rows, i] += change
        ratings[rows, j] -= change
    low, high = np.quantile(ratings[1:] if orders else ratings, [0.025, 0.975], axis=0)
    found = [Elo(name, float(ratings[0, i]), float(low[i]), float(high[i])) for i, name in enumerate(names)]
    return sorted(found, key=lambda e: -e.rating)
