"""The losses of preferences as functions: worked by hand, at their limits, and by what their papers say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.batch import IGNORE, Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.data.preference import MOST
from fettle.objectives.answers import Answers
from fettle.objectives.cdpo import cdpo_loss
from fettle.objectives.dpo import dpo_loss
from fettle.objectives.hinge import hinge_loss
from fettle.objectives.ipo import ipo_loss
from fettle.objectives.kto import kto_loss, mismatched
from fettle.objectives.orpo import log_odds, orpo_loss
from fettle.objectives.reward import reward_loss
from fettle.objectives.robust import robust_loss
from fettle.objectives.simpo import simpo_loss

REAL = st.floats(-30, 30)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand() -> None:
    """log 3 in favour of the better answer, beta 1: odds of three to one."""
    better, worse = t(math.log(3)), t(0.0)
    assert dpo_loss(better, worse, 1.0).item() == pytest.approx(math.log(4 / 3))
    assert cdpo_loss(better, worse, 1.0, 0.25).item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert robust_loss(better, worse, 1.0, 0.25).item() == pytest.approx(
        (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5
    )
    assert hinge_loss(better, worse, 0.5).item() == pytest.approx(1 - 0.5 * math.log(3))
    assert ipo_loss(better, worse, 0.25).item() == pytest.approx((math.log(3) - 2) ** 2)
    assert simpo_loss(better, worse, 1.0, math.log(3)).item() == pytest.approx(math.log(2))
    assert reward_loss(better, worse, math.log(3), 0.5).item() == pytest.approx(math.log(2) + 0.5 * math.log(3) ** 2)
    half, quarter = t(math.log(0.5)), t(math.log(0.25))  # odds of 1, and of 1/3
    assert orpo_loss(half, quarter, 2.0).item() == pytest.approx(math.log(2) + 2 * math.log(4 / 3))
    both = kto_loss(t(math.log(3), math.log(3)), torch.tensor([True, False]), t(0.0)[0], 1.0)
    assert both.tolist() == pytest.approx([0.25, 0.75])


@given(REAL, REAL, st.floats(0.01, 5))
def test_without_noise_they_are_dpo(better: float, worse: float, beta: float) -> None:
    plain = dpo_loss(t(better), t(worse), beta)
    torch.testing.assert_close(cdpo_loss(t(better), t(worse), beta, 0.0), plain)
    torch.testing.assert_close(robust_loss(t(better), t(worse), beta, 0.0), plain)


@given(REAL, REAL, st.floats(0.01, 0.45))
def test_robust_is_unbiased(better: float, worse: float, noise: float) -> None:
    """Equation 10 of the paper: its mean over flips is the loss of the clean label."""
    clean = (
        robust_loss(t(better), t(worse), 0.3, noise) * (1 - noise)
        + robust_loss(t(worse), t(better), 0.3, noise) * noise
    )
    torch.testing.assert_close(clean, dpo_loss(t(better), t(worse), 0.3))


@given(st.floats(0.01, 0.45))
def test_cdpo_rests_at_its_margin(noise: float) -> None:
    margin = t(math.log((1 - noise) / noise)).requires_grad_()
    cdpo_loss(margin, t(0.0), 1.0, noise).sum().backward()
    assert margin.grad is not None and abs(margin.grad.item()) < 1e-12


def test_a_hinge_that_is_reached_has_no_gradient() -> None:
    better = t(3.0, 1.0).requires_grad_()
    hinge_loss(better, t(0.0, 0.0), 0.5).sum().backward()
    assert better.grad is not None and better.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("logp", [-2e-6, -1e-4, -0.5, -0.7, -20.0, -300.0])
def test_log_odds_near_certainty_and_far_from_it(logp: float) -> None:
    exact = logp - math.log(-math.expm1(logp))
    assert log_odds(t(logp)).item() == pytest.approx(exact, rel=1e-12)
    value = torch.tensor([logp], dtype=torch.float32, requires_grad=True)
    log_odds(value).sum().backward()
    assert value.grad is not None and torch.isfinite(value.grad).all()
    assert value.grad.item() == pytest.approx(1 / -math.expm1(logp), rel=1e-3)


@pytest.mark.parametrize("logp", [0.0, -1e-9])
def test_log_odds_of_certainty_are_bounded(logp: float) -> None:
    value = torch.tensor([logp], requires_grad=True)
    found = log_odds(value)
    found.sum().backward()
    assert found.item() == pytest.approx(math.log(1e6), rel=1e-3)
    assert value.grad is not None and value.grad.item() == 0


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_far_away_they_stay_finite(far: float) -> None:
    better = torch.tensor([far], requires_grad=True)
    total = sum(f(better, torch.zeros(1)) for f in (
        lambda b, w: dpo_loss(b, w, 1.0), lambda b, w: cdpo_loss(b, w, 1.0, 0.1), lambda b, w: robust_loss(b, w, 1.0, 0.1),
        lambda b, w: simpo_loss(b, w, 1.0, 0.5), reward_loss,
    ))  # fmt: skip
    total.sum().backward()
    assert torch.isfinite(total).all() and better.grad is not None and torch.isfinite(better.grad).all()


# The answers of a batch.


def example(name: str, prompt: int, answers: list[int], ranks: list[float], weight: float = 1.0) -> Example:
    nodes = [Node(np.arange(prompt, dtype=np.int32), np.zeros(prompt, np.float32))]
    for n in answers:
        nodes.append(Node(np.full(n + 1, 100 + n, np.int32), np.array([0] + [1] * n, np.float32), 0))
    extra = {
        "ranks": np.array(ranks + [0] * (MOST - len(ranks)), np.float32),
        "example_weights": np.array(weight, np.float32),
    }
    return Example(tuple(nodes), name, extra)


def batch() -> Batch:
    return pack([example("a", 5, [3, 2], [1, 2]), example("b", 4, [1, 4, 2], [1, 2, 2], 2.0)], 40, 7)


def test_answers_are_read_from_segments() -> None:
    answers = Answers.of(batch())
    assert answers.lengths.tolist() == [3, 2, 1, 4, 2]
    assert (answers.owner.tolist(), answers.place.tolist()) == ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2])
    assert answers.sums(torch.arange(12.0)).tolist() == [3, 7, 5, 30, 21]


def test_a_prompt_counts_once_however_many_pairs() -> None:
    pairs = Answers.of(batch()).pairs()
    assert list(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [(0, 1), (2, 3), (2, 4)]
    assert pairs.shares.tolist() == [1, 1, 1]
    loss = pairs.loss(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 1.0, 0.0, 5.0, 0.0]))
    assert (loss.sum.item(), float(loss.count)) == (7, 3)
    assert loss.metrics["accuracy"].item() == 1 + 0 + 0.5
    assert loss.metrics["margin"].item() == 2 - 5 + 0


def test_what_is_no_preference_is_refused() -> None:
    plain = pack([Example((Node(np.arange(4, dtype=np.int32), np.ones(4, np.float32)),), "text")], 8, 0)
    with pytest.raises(FettleError, match="learns from preferences"):
        Answers.of(plain)
    with pytest.raises(FettleError, match="learned from by kto"):
        Answers.of(pack([example("a", 3, [2], [1])], 16, 0)).pairs()


def test_mismatched_answers_fill_no_more_than_the_row() -> None:
    given_batch = batch()
    other = mismatched(given_batch)
    assert other is not None and len(other.tokens) == len(given_batch.tokens)
    first, second = (other.tokens[s.start : s.stop].tolist() for s in other.segments[:2])
    assert first == [0, 1, 2, 3, 4, 103, 101], "the first prompt, its last token, and the other's first answer"
    assert second == [0, 1, 2, 3, 101, 103, 103, 103]
    assert mismatched(pack([example("a", 3, [2], [1])], 16, 0)) is None


@pytest.mark.parametrize(("bound", "lengths"), [(9, [1, 1]), (12, [4, 1]), (14, [6, 1]), (None, [6, 1])])
def test_a_mismatched_answer_ends_where_the_context_does(bound: int | None, lengths: list[int]) -> None:
    """A prompt of 8 tokens with its last and an answer of 6, each of which fits into 9 beside its own."""
    other = mismatched(pack([example("a", 7, [1], [1]), example("b", 1, [6], [1])], 40, 7), bound)
    assert other is not None and Answers.of(other).lengths.tolist() == lengths
    assert int(other.positions.max()) + 1 == 8 + lengths[0]


def test_of_a_mismatched_answer_of_several_turns_what_the_user_says_is_not_the_model_s() -> None:
    talk = example("a", 5, [5], [1])
    talk.nodes[1].weights[:] = [0, 1, 1, 0, 0, 1]  # two tokens, what is said in between, one more
    other = mismatched(pack([talk, example("b", 4, [3], [1])], 40, 7))
    assert other is not None
    assert Answers.of(other).lengths.tolist() == [3, 3]
    second = other.segments[1]
    learned = (other.targets[second.start : second.stop] != IGNORE).nonzero()[:, 0].tolist()
    assert learned == [3 + 1, 3 + 2, 3 + 5], (
        "of the second prompt with the first one's answer, cut off its head's token"
    )
