"""Ratings: a published table, closed forms, the conditions of a maximum, what comparisons cannot say, intervals by prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import FettleError
from fettle.feedback.bradley_terry import MEAN, SCALE, Comparison, comparisons, filled, groups, rate, rated, strengths
from fettle.feedback.expand import orders
from unit.feedback.makers import ranking, records

# The American League's eastern division of 1987, row over column, and estimates with Baltimore at 0: Agresti, Categorical Data
# Analysis, table 10.10 (also the example of the R package BradleyTerry2).
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
WON = [
    [0, 7, 9, 7, 7, 9, 11], [6, 0, 7, 5, 11, 9, 9], [4, 6, 0, 7, 7, 8, 12], [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12], [4, 4, 5, 6, 6, 0, 6], [2, 4, 1, 3, 1, 7, 0],
]  # fmt: skip
PUBLISHED = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]


def played(a: str, b: str, scores: list[float], prompt: str = "p") -> list[Comparison]:
    return [Comparison(f"{prompt}{i}", a, b, score) for i, score in enumerate(scores)]


def test_a_published_table() -> None:
    theta = strengths(np.array(WON, float))
    np.testing.assert_allclose(theta - theta[-1], PUBLISHED, atol=5.1e-5)  # four decimals are published
    assert abs(theta.mean()) < 1e-15


def test_two_models_have_a_closed_form() -> None:
    for wins, losses in ((1, 1), (8, 2), (1e6, 1), (0.5, 7.5)):
        theta = strengths(np.array([[0, wins], [losses, 0]]))
        curve = wins * losses / (wins + losses)  # the slope is a difference of sums as large as all wins
        exact = 8 * np.finfo(float).eps * (wins + losses) / curve
        assert abs(theta[0] - theta[1] - math.log(wins / losses)) <= exact


@given(st.lists(st.integers(0, 50), min_size=20, max_size=20))
def test_expected_wins_are_the_wins(counts: list[int]) -> None:
    wins = np.zeros((5, 5))
    wins[~np.eye(5, dtype=bool)] = counts
    if not rated(wins):
        with pytest.raises(FettleError, match="no maximum"):
            strengths(wins)
        return
    theta = strengths(wins)
    chance = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    np.testing.assert_allclose(((wins + wins.T) * chance * (1 - np.eye(5))).sum(1), wins.sum(1), rtol=1e-9, atol=1e-9)


def test_many_tables_at_a_time_are_those_one_by_one() -> None:
    rng = np.random.default_rng(0)
    tables = rng.integers(1, 30, size=(3, 4, 6, 6)) * (1 - np.eye(6))
    np.testing.assert_array_equal(rated(tables), np.ones((3, 4), bool))
    each = np.stack([[strengths(t) for t in row] for row in tables])
    np.testing.assert_allclose(strengths(tables), each, atol=1e-12)


def test_odds_that_lie_far_apart() -> None:
    theta = strengths(np.array([[0, 1e6, 0], [1, 0, 1e6], [0, 1, 0]]))
    np.testing.assert_allclose(np.diff(theta), [-math.log(1e6)] * 2, rtol=1e-9)


def test_a_tie_is_half_a_win_for_each() -> None:
    tied = rate(played("a", "b", [1, 0.5, 0.5, 0.5, 0.5, 0]))
    assert [r.rating for r in tied.rows] == [MEAN, MEAN] and [r.points for r in tied.rows] == [3, 3]
    assert {r.games for r in tied.rows} == {6} and tied.notes == ()


def test_the_scale_is_elos() -> None:
    (best, worst) = rate(played("a", "b", [1] * 10 + [0])).rows
    assert math.isclose(best.rating - worst.rating, 400) and best.name == "a"  # odds of ten to one
    assert math.isclose((best.rating + worst.rating) / 2, MEAN)


def test_groups_that_nothing_connects_are_told_and_rated_apart() -> None:
    found = rate(played("a", "b", [1, 1, 0]) + played("c", "d", [1, 0, 0], "q") + played("d", "e", [1, 0], "r"))
    assert [(r.name, r.group) for r in found.rows] == [("d", 0), ("e", 0), ("c", 0), ("a", 1), ("b", 1)]
    (note,) = found.notes
    assert note.startswith("No comparison connects these 2 groups") and "c, d, e; a, b" in note
    for group in (0, 1):
        assert math.isclose(np.mean([r.rating for r in found.rows if r.group == group]), MEAN)


def test_who_never_lost_is_told_and_gets_a_finite_rating() -> None:
    found = rate(played("a", "b", [1, 1, 1]) + played("b", "c", [1, 0], "q"))
    assert found.rows[0].name == "a" and "a never lost" in found.notes[0] and "b never lost" not in found.notes[0]
    wins = np.array([[0, 3, 0], [0, 0, 1], [0, 1, 0.0]])
    with_half = wins + 0.5 * ((wins + wins.T) > 0)
    np.testing.assert_allclose(
        [SCALE * t + MEAN for t in strengths(with_half)], [r.rating for r in sorted(found.rows, key=lambda r: r.name)]
    )
    np.testing.assert_array_equal(
        filled(np.array(WON, float), np.array(WON, float)), WON
    )  # nothing added where there is a maximum


def test_groups_of_models() -> None:
    wins = np.zeros((5, 5))
    wins[3, 1] = wins[1, 4] = 1
    wins[0, 2] = 0.5
    assert groups(wins) == [[1, 3, 4], [0, 2]]


def test_intervals_resample_prompts_and_not_comparisons() -> None:
    rng = np.random.default_rng(1)
    wins = rng.random(40) < 0.7
    once = [Comparison(str(i), "a", "b", float(w)) for i, w in enumerate(wins)]
    often = [c for c in once for _ in range(25)]  # the same said 25 times of each prompt is no more evidence
    one, many = (rate(games).rows[0] for games in (once, often))
    assert (
        one.rating == pytest.approx(many.rating)
        and one.low is not None
        and many.low is not None
        and one.high is not None
    )
    assert many.low == pytest.approx(one.low, abs=1e-6) and one.low < one.rating < one.high
    alone = rate([Comparison(str(i), "a", "b", float(w)) for i, w in enumerate(np.repeat(wins, 25))]).rows[0]
    assert alone.low is not None and one.rating - one.low > 3 * (alone.rating - alone.low)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    true = np.array([0.5, 0.0, -0.5])
    hits = 0
    for trial in range(60):
        games = [
            Comparison(f"{trial}/{k}", "abc"[i], "abc"[j], float(rng.random() < 1 / (1 + math.exp(true[j] - true[i]))))
            for k in range(60) for i, j in ((0, 1), (1, 2), (0, 2))
        ]  # fmt: skip
        found = {r.name: r for r in rate(games, resamples=200).rows}["a"]
        assert found.low is not None and found.high is not None
        hits += found.low <= MEAN + SCALE * 0.5 <= found.high
    assert hits >= 51  # of 60 at 95%: fewer has a chance below one in a thousand


def test_nothing_to_vary_has_no_interval() -> None:
    assert rate([Comparison("p", "a", "b", 1.0), Comparison("p", "a", "b", 0.0)]).rows[0].low is None
    assert rate(played("a", "b", [0.5] * 5)).rows[0].low is None
    with pytest.raises(FettleError, match="name the models of the answers"):
        rate([])


def test_comparisons_of_rankings() -> None:
    same = {"answers": [{"text": "x", "source": "A"}, {"text": "y", "source": "A"}, {"text": "z"}]}
    found = comparisons(orders(records(ranking([2, 1, 2]), ranking([1, 2, 3], "p2", **same))))
    assert [(c.first, c.second, c.score) for c in found] == [("A", "B", 0.0), ("A", "C", 0.5), ("B", "C", 1.0)]
