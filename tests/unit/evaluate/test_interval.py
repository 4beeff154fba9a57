"""Bootstrap intervals: seeded, equal to resampling one by one, and as wide as they say."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.evaluate.interval import mean_interval, ratio_interval


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
