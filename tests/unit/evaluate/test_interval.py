"""Bootstrap intervals: seeded, equal to resampling one by one, and as wide as they say."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.evaluate.interval import CHANGES, SCORES, grouped_interval, mean_interval, ratio_interval


def test_equals_plain_resampling() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=80)
    plain = [rng.choice(values, 80).mean() for _ in range(10_000)]
    found = mean_interval(values.tolist())
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.01)


def test_coverage() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        found = mean_interval((rng.random(60) < 0.3).astype(float).tolist(), seed=i, resamples=1000)
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_seeded_and_degenerate() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert mean_interval(values, 3) == mean_interval(values, 3) != mean_interval(values, 4, resamples=9)
    same = mean_interval([1.0] * 7)
    assert (same.mean, same.low, same.high, same.n) == (1, 1, 1, 7)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_ratio() -> None:
    found = ratio_interval([2.0, 9.0], [1.0, 3.0])
    assert found.mean == 11 / 4
    assert (found.low, found.high) == (2, 3)


@pytest.mark.parametrize("right", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 7, 200])
def test_all_right_or_all_wrong_is_wilsons_interval(n: int, right: float) -> None:
    found, z = mean_interval([right] * n, bounds=SCORES), 1.959963984540054
    centre, half = (right + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * (z**2 / (4 * n**2)) ** 0.5
    assert (found.mean, found.n) == (right, n)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


def test_differences_that_are_all_the_same() -> None:
    none = mean_interval([0.0] * 20, bounds=CHANGES)
    assert none.mean == 0 and none.high == -none.low == pytest.approx(3.8415 / 23.8415, abs=1e-4)
    gained = mean_interval([1.0] * 20, bounds=CHANGES)
    assert gained.high == 1 and gained.low == pytest.approx(1 - 2 * none.high)
    assert mean_interval([0.0, 1.0] * 9, bounds=SCORES) == mean_interval([0.0, 1.0] * 9)


def test_coverage_near_the_edge() -> None:
    """At 19 of 20 right on average, a third of all samples have nothing wrong in them: without bounds they all miss."""
    rng = np.random.default_rng(2)
    samples = [(rng.random(20) < 0.95).astype(float).tolist() for _ in range(200)]
    found = {bounds: [mean_interval(s, resamples=1000, bounds=bounds) for s in samples] for bounds in (None, SCORES)}
    hits = {bounds: np.mean([f.low <= 0.95 <= f.high for f in each]) for bounds, each in found.items()}
    assert hits[None] < 0.75 and hits[SCORES] > 0.9


def test_values_that_depend_on_each_other_say_no_more_than_one() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.0]
    for times in (1, 16):
        assert grouped_interval([[v] * times for v in values], 3, SCORES) == mean_interval(values, 3, bounds=SCORES)
    uneven = grouped_interval([[1.0], [0.0, 0.0, 0.0]])
    assert (uneven.mean, uneven.low, uneven.high, uneven.n) == (0.25, 0, 1, 2)
    assert grouped_interval([[0.0, 1.0]] * 8, bounds=SCORES) == mean_interval([0.5] * 8, bounds=SCORES)
