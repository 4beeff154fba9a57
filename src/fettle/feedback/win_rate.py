"""Win rate of one model's answers over another's on the same prompts, by a reward or by a judge in both orders.

win rate = mean over prompts of 1 (better), 1/2 (tie), 0 (worse)

Where each prompt has n answers of both models, those to one prompt beside each other, the first meets the first and so on, and a
prompt counts with its mean: intervals are by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fettle.core.errors import FettleError
from fettle.evaluate.interval import SCORES, Score, grouped_interval, mean_interval
from fettle.evaluate.metrics import WORD
from fettle.feedback.judge import Compared, Judge, compare
from fettle.feedback.reward import Means, Reward

if TYPE_CHECKING:
    from fettle.generate.protocol import Engine, Prompt


@dataclass(frozen=True)
class WinRate:
    """`rate` is over prompts, a half where neither model is better, with its 95% interval; `wins`, `ties`, `losses` are over answers.

    `flips`: ties that are a judge's verdict that changed with the order. `longer`: how often the longer answer wins, of those where
    one wins and they differ in length; far from a half, the verdicts may be about length. `words`: mean lengths, ours first.
    """

    rate: Score
    wins: int
    ties: int
    losses: int
    flips: int
    longer: Score | None
    words: tuple[float, float]
    scores: tuple[float, ...]  # by prompt

    def __str__(self) -> str:
        return f"{self.rate}, {self.wins} won, {self.ties} tied, {self.losses} lost"


def by_reward(
    reward: Reward, prompts: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str], means: Means | None = None,
    **facts: Sequence[Any],
) -> WinRate:  # fmt: skip
    """The answer with the greater reward wins; equal rewards tie. Each prompt has one answer of both models."""
    _same_count(prompts, ours, theirs)
    a, b = (reward.score(prompts, answers, means, **facts) for answers in (ours, theirs))
    return of_rewards(a, b, ours, theirs)


def of_rewards(
    a: Sequence[float], b: Sequence[float], ours: Sequence[str], theirs: Sequence[str], n: int = 1
) -> WinRate:
    """The same of answers whose rewards are known, n to each prompt: `a` those of `ours`, `b` those of `theirs`."""
    _same_count(a, ours, theirs)
    return _summed([Compared(0.5 + 0.5 * ((x > y) - (x < y))) for x, y in zip(a, b, strict=True)], ours, theirs, n)


def by_judge(
    judge: Judge, engine: Engine, prompts: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str], n: int = 1
) -> WinRate:
    """The judge compares every two answers in both orders; a verdict that flips is a tie. A prompt stands n times, once an answer."""
    _same_count(prompts, ours, theirs)
    return _summed(compare(judge, engine, prompts, ours, theirs), ours, theirs, n)


def _same_count(prompts: Sequence[Any], ours: Sequence[str], theirs: Sequence[str]) -> None:
    if not prompts or not len(prompts) == len(ours) == len(theirs):
        raise FettleError(
            f"win rate: {len(prompts)} prompts, {len(ours)} and {len(theirs)} answers; each prompt needs one of both models"
        )


def _summed(found: Sequence[Compared], ours: Sequence[str], theirs: Sequence[str], n: int) -> WinRate:
    each, firsts = [c.score for c in found], range(0, len(found), n)
    a, b = ([len(WORD.findall(answer)) for answer in answers] for answers in (ours, theirs))
    rows = list(zip(each, a, b, strict=True))
    decided = [[float((x > y) == (s > 0.5)) for s, x, y in rows[i : i + n] if s != 0.5 and x != y] for i in firsts]
    longer, scores = [some for some in decided if some], tuple(float(np.mean(each[i : i + n])) for i in firsts)
    return WinRate(
        rate=mean_interval(scores, bounds=SCORES), wins=each.count(1.0), ties=each.count(0.5), losses=each.count(0.0),
        flips=sum(c.flipped for c in found), longer=grouped_interval(longer, bounds=SCORES) if longer else None,
        words=(sum(a) / len(a), sum(b) / len(b)), scores=scores,
    )  # fmt: skip
