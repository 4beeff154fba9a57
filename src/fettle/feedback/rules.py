"""Rules as a reward: what share of them, by weight, an answer keeps.

    reward = 1 - sum_i w_i v_i / sum_i w_i        v_i = 1 violated, 1/2 unsure, 0 not

    Glaese et al. 2022, Sparrow, arXiv 2209.14375 (rules, each judged by itself)

A rule that a pattern can check is checked by it; the others are put to a judge, one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fettle.core.spec import Spec
from fettle.feedback.judge import Judge, violations
from fettle.feedback.reward import Asked, Reward


class Rule(Spec):
    """A rule in the words that labelers and judges read, and where they are there the patterns that tell."""

    says: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    forbids: str | None = Field(default=None, description="a pattern; the rule is violated where the answer has it")
    requires: str | None = Field(default=None, description="a pattern; the rule is violated where the answer lacks it")

    @field_validator("forbids", "requires")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        return None if pattern is None else compiled(pattern)

    @property
    def checkable(self) -> bool:
        """Whether patterns tell."""
        return self.forbids is not None or self.requires is not None

    def violated(self, answer: str) -> bool:
        """Whether an answer has what the rule forbids, or lacks what it requires."""
        return (self.forbids is not None and re.search(self.forbids, answer) is not None) or (
            self.requires is not None and re.search(self.requires, answer) is None
        )


class RulesReward(Reward):
    """The share of the rules' weight that is kept, from 0 to 1."""

    kind: Literal["rules"] = "rules"
    rules: tuple[Rule, ...] = Field(min_length=1)
    judge: Judge | None = Field(default=None, description="who judges the rules that have no pattern")

    @model_validator(mode="after")
    def _judged(self) -> RulesReward:
        bare = next((rule for rule in self.rules if not rule.checkable), None)
        if bare is not None and self.judge is None:
            raise ValueError(f"the rule '{bare.says}' has no pattern (forbids, requires), so a 'judge' is needed")
        return self

    def rate(self, asked: Asked) -> Sequence[float]:
        """Patterns for all answers, then every rule without one for every answer in one call of the judge."""
        broken = [[float(rule.checkable and rule.violated(answer)) for rule in self.rules] for answer in asked.answers]
        open_ = [(i, j) for i in range(len(broken)) for j, rule in enumerate(self.rules) if not rule.checkable]
        if self.judge is not None and open_:
            prompts = asked.spelled
            found = violations(
                self.judge, self.judge.find(asked.means), [self.rules[j].says for _, j in open_],
                [prompts[i] for i, _ in open_], [asked.answers[i] for i, _ in open_],
            )  # fmt: skip
            for (i, j), value in zip(open_, found, strict=True):
                broken[i][j] = value
        weights = [rule.weight for rule in self.rules]
        return [1 - sum(w * v for w, v in zip(weights, row, strict=True)) / sum(weights) for row in broken]

    def engines(self) -> tuple[str, ...]:
        """The judge's, where a rule needs one."""
        needed = self.judge is not None and not all(rule.checkable for rule in self.rules)
        return (self.judge.engine,) if needed and self.judge else ()


def compiled(pattern: str) -> str:
    """The pattern, which is a regular expression; ValueError where it is none."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"'{pattern}' is not a regular expression ({error})") from None
    return pattern
