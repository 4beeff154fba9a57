"""Packing, windows and mixtures: nothing lost, nothing twice, rows full, order by the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import FettleError
from fettle.data import DataSpec
from fettle.data.mix import Mixture
from fettle.data.packing import plan, shuffled


@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 200), st.booleans(), st.integers(0, 5))
def test_every_example_lies_in_one_row_that_holds_it(
    lengths: list[int], capacity: int, packing: bool, seed: int
) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    found = plan(sizes, capacity, packing, seed)
    assert sorted(found.order.tolist()) == list(range(len(sizes)))
    for i in range(len(found)):
        row = found.row(i)
        assert len(row) and sizes[row].sum() <= capacity
    if packing:
        again = plan(sizes, capacity, packing, seed)
        assert np.array_equal(found.order, again.order) and np.array_equal(found.starts, again.starts)
        full = sizes.sum() / capacity
        assert len(found) <= max(1, np.ceil(2 * full)), "any two rows but one together fill a row"


def test_rows_are_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.8, 300_000), 8, 2048).astype(np.int64)
    found = plan(lengths, 2048, True, 0)
    assert lengths.sum() / (len(found) * 2048) > 0.99


def test_a_row_is_a_fair_sample_of_lengths() -> None:
    """Short and long examples, half of each: a row of one kind only would make the kinds take turns in training."""
    lengths = np.random.default_rng(0).choice([10, 30], 20_000).astype(np.int64)
    found = plan(lengths, 2048, True, 0)
    short = np.array([(lengths[found.row(i)] == 10).mean() for i in range(len(found))])
    assert abs(short.mean() - 0.5) < 0.01
    assert short.std() < 2 * 0.5 / np.sqrt(2048 / 20), "as scattered as drawing by chance, and not more than twice"


def test_shuffles_are_fixed_for_ever() -> None:
    assert shuffled(10, 1, 2, 3).tolist() == shuffled(10, 1, 2, 3).tolist()
    assert shuffled(8, 0).tolist() == FIXED
    assert len({tuple(shuffled(50, seed, 0).tolist()) for seed in range(20)}) == 20


FIXED = [0, 3, 7, 5, 1, 2, 6, 4]


def spec(**keys) -> DataSpec:
    return DataSpec(path="a", **keys)


def test_shares() -> None:
    def counts(specs: list[DataSpec], sizes: list[int]) -> list[int]:
        return Mixture(specs, sizes, 0).counts(0).tolist()

    assert counts([spec(), spec()], [30, 999]) == [30, 999]
    assert counts([spec(cap=100), spec(cap=100)], [30, 999]) == [30, 100]
    assert counts([spec(weight=1.0), spec(weight=9.0)], [30, 970]) == [100, 900]
    assert counts([spec(weight=1.0)] * 3, [10, 10, 12]) == [11, 11, 10]
    with pytest.raises(FettleError, match="give every source a weight"):
        counts([spec(weight=1.0), spec()], [1, 2])


def test_examples_proportional_is_the_rule_of_flan() -> None:
    sizes, cap = [50, 500, 50_000], 3000
    counts = Mixture([spec(cap=cap)] * 3, sizes, 0).counts(0)
    limited = np.minimum(sizes, cap)
    assert np.allclose(counts / counts.sum(), limited / limited.sum())


WEIGHTED = st.tuples(st.integers(1, 40), st.floats(0.001, 1.0))


@given(st.lists(WEIGHTED, min_size=1, max_size=3), st.integers(0, 3))
def test_over_epochs_every_example_is_used_equally_often(sources: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    specs = [spec(weight=weight) for weight in weights]
    mixture, again = Mixture(specs, sizes, seed), Mixture(specs, sizes, seed)
    again.order(4)  # of another epoch first
    exact = np.array(weights) / sum(weights) * sum(sizes)
    used = [np.zeros(n, dtype=int) for n in sizes]
    for epoch in range(5):
        order = mixture.order(epoch)
        assert np.bincount(order[:, 0], minlength=len(sizes)).tolist() == mixture.counts(epoch).tolist()
        assert len(order) == mixture.per_epoch == sum(sizes)
        assert np.array_equal(order, again.order(epoch))
        for source, example in order:
            used[source][example] += 1
        for seen in used:
            assert seen.max() - seen.min() <= 1
        assert np.abs([seen.sum() for seen in used] - exact * (epoch + 1)).max() < 1


def test_a_share_of_less_than_an_example_is_drawn_over_the_epochs() -> None:
    mixture = Mixture([spec(weight=0.999), DataSpec(path="rare", weight=0.001)], [300, 40], 0)
    drawn = [int((mixture.order(epoch)[:, 0] == 1).sum()) for epoch in range(1000)]
    assert drawn[:6] == [0, 1, 0, 0, 1, 0] and sum(drawn) == 340
    (note,) = mixture.notes
    assert note.startswith("rare: its weight gives it 0.34 examples an epoch, and the first epoch holds none")
    assert not Mixture([spec(weight=0.9), spec(weight=0.1)], [300, 40], 0).notes


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [Mixture([spec()], [100], seed).order(epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({str(o) for o in orders}) == 9
    assert orders[0] != [[0, i] for i in range(100)]
