"""Krippendorff's alpha against the worked examples of his paper, by a second computation, and its laws."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import FettleError
from fettle.feedback.agreement import Level, krippendorff

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability: sections A, B and C; `.` is missing.
BINARY = ["0100000010", "1110010000"]
LETTERS = ["aabbdcccedda", "babbbccceddd"]
FOUR = ["12332 1412...".replace(" ", ""), "1233224125.3", ".33323422 51.".replace(" ", ""), "12332441251."]


def units(rows: list[str]) -> list[list[str]]:
    return [[value for value in column if value != "."] for column in zip(*rows, strict=True)]


def numbers(rows: list[str]) -> list[list[int]]:
    return [[int(value) for value in unit] for unit in units(rows)]


def test_two_observers_two_values() -> None:
    """1 - (2 * 10 - 1) * 4 / (14 * 6): four of ten units disagree, fourteen zeros and six ones."""
    found = krippendorff(numbers(BINARY), "nominal")
    assert found.alpha == pytest.approx(1 - 19 * 4 / (14 * 6), abs=1e-15) and round(found.alpha, 3) == 0.095
    assert (found.units, found.values) == (10, 20)


def test_two_observers_many_values() -> None:
    assert round(krippendorff(units(LETTERS), "nominal").alpha, 3) == 0.692


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_four_observers_with_missing_values(level: Level, published: float) -> None:
    found = krippendorff(numbers(FOUR), level)
    assert round(found.alpha, 3) == published
    assert (found.units, found.values) == (11, 40)  # the unit with one value says nothing of agreement
    assert found.low is not None and found.high is not None and found.low < found.alpha < found.high


def plainly(every: list[list[int]], level: Level) -> float:
    """1 - D_o / D_e over pairs of values, as the definition reads."""
    kept = [unit for unit in every if len(unit) > 1]
    values = [value for unit in kept for value in unit]
    n = len(values)

    def distance(c: int, k: int) -> float:
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return float((c - k) ** 2)
        low, high = min(c, k), max(c, k)
        between = sum(values.count(g) for g in range(low, high + 1))
        return (between - (values.count(c) + values.count(k)) / 2) ** 2

    seen = sum(distance(c, k) / (len(unit) - 1) for unit in kept for c, k in permutations(unit, 2)) / n
    chance = sum(distance(c, k) for c, k in permutations(values, 2)) / (n * (n - 1))
    return 1 - seen / chance if chance else float("nan")


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=8),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_the_definition(every: list[list[int]], level: Level) -> None:
    found = krippendorff(every, level, resamples=0 + 2).alpha
    if not any(len(unit) > 1 for unit in every):
        assert np.isnan(found)
    else:
        np.testing.assert_allclose(found, plainly(every, level), rtol=1e-12, atol=1e-12)


def test_laws() -> None:
    rng = np.random.default_rng(0)
    chance = krippendorff(rng.integers(0, 3, size=(4000, 2)).tolist(), "nominal")
    assert (
        chance.low is not None and chance.high is not None and chance.low < 0 < chance.high and abs(chance.alpha) < 0.05
    )
    assert krippendorff([[1, 1], [2, 2, 2]], "ordinal").alpha == 1
    assert krippendorff([[1, 2], [2, 1]], "nominal").alpha < 0
    assert np.isnan(krippendorff([[1, 1], [1, 1]], "interval").alpha)  # no chance to disagree
    assert krippendorff([[1], []], "nominal").units == 0
    one = krippendorff([[1, 2], [3, 3], [2, 2]], "interval")
    other = krippendorff([[10, 20], [30, 30], [20, 20]], "interval")
    assert one.alpha == pytest.approx(other.alpha, abs=1e-15)  # units of measurement do not matter
    with pytest.raises(FettleError, match="distinct values"):
        krippendorff([[i, i + 0.5] for i in range(1500)], "interval")


def test_intervals_draw_clusters_together() -> None:
    every = [[1, 1], [2, 2], [1, 2], [2, 1]] * 10
    apart, together = (krippendorff(every * 5, "nominal", clusters=c) for c in (None, [i % 4 for i in range(200)]))
    assert (
        apart.alpha == together.alpha
        and apart.low is not None
        and together.low is not None
        and together.low < apart.low
    )
