"""Elo: updates worked by hand, and how far the order decides."""

from __future__ import annotations

import pytest

from fettle.core.errors import FettleError
from fettle.feedback.bradley_terry import Comparison
from fettle.feedback.elo import elo


def test_three_updates_by_hand() -> None:
    found = {
        e.name: e.rating
        for e in elo([Comparison("p", "a", "b", 1), Comparison("p", "c", "a", 0.5), Comparison("p", "b", "c", 0)])
    }
    a, b, c = 1008.0, 992.0, 1000.0  # even chances: half of K = 16
    tie = 16 * (0.5 - 1 / (1 + 10 ** ((a - c) / 400)))
    a, c = a - tie, c + tie
    last = 16 * (0 - 1 / (1 + 10 ** ((c - b) / 400)))
    b, c = b + last, c - last
    assert found == pytest.approx({"a": a, "b": b, "c": c}, abs=1e-9) and tie > 0 > last
    assert sum(found.values()) == pytest.approx(3000)


def test_the_order_matters_and_its_range_is_told() -> None:
    games = [Comparison("p", "a", "b", 1)] * 10 + [Comparison("p", "a", "b", 0)] * 10
    late, early = ({e.name: e for e in elo(way)}["a"] for way in (games, games[::-1]))
    assert late.rating < 1000 < early.rating  # what came last weighs most
    assert late.low == early.low or abs(late.low - early.low) < 15
    assert late.low < 1000 < late.high and late.rating < late.low  # an order that hardly any shuffle comes near


def test_k_is_the_most_that_one_comparison_moves() -> None:
    (best, worst) = elo([Comparison("p", "a", "b", 1)], k=32)
    assert (best.rating, worst.rating, best.low, best.high) == (1016, 984, 1016, 1016)
    with pytest.raises(FettleError, match="no comparisons"):
        elo([])
