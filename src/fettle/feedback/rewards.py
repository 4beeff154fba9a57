"""Rewards: of a function, a pattern, a verifier of numbers, the length, a model, a judge, rules, and weighted sums of them.

reward:
  kind: sum
  terms:
    - {weight: 1.0, reward: {kind: number}}                      # 1 where the last number is the row's answer
    - {weight: 0.5, reward: {kind: length, most: 80, per: 40}}   # -1 for every 40 words over 80
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from fettle.core.spec import Spec, one_of
from fettle.evaluate.metrics import WORD, best, last_number, numbers, plain
from fettle.feedback.functions import call
from fettle.feedback.functions import reward_function as reward_function
from fettle.feedback.judge import JudgeReward as JudgeReward
from fettle.feedback.model import ModelReward as ModelReward
from fettle.feedback.reward import Asked, Scores, lacks, short
from fettle.feedback.reward import Means as Means
from fettle.feedback.reward import Reward as Reward
from fettle.feedback.rules import RulesReward as RulesReward
from fettle.feedback.rules import compiled

# A number that is part of an expression: a fraction, a power, a root, a number of another base.
PART = re.compile(r"(?:[/^\u221a\u2044]|sqrt\W?)\s*[-+.]?\d|\d\s*[\u00b2\u00b3\u00b9\u2070-\u208e]")
# What may stand between a right answer and itself once more: "18\nThe answer is: 18", "7 (7.0)", "x = 4 = 4.0".
AGAIN = re.compile(r"[\n=\uff1d\uff08]|\s\(")


class FunctionReward(Reward):
    """What a function says: a registered name, `package.module:function`, or `file.py:function`.

    It is called as `f(prompts, answers, **columns)` with lists and gives a number for each answer.
    """

    kind: Literal["function"] = "function"
    name: str

    @property
    def title(self) -> str:
        """The function's name."""
        return self.name

    def rate(self, asked: Asked) -> Sequence[float]:
        """One call for all answers."""
        return call(self.name, asked.prompts, asked.answers, asked.facts)


class RegexReward(Reward):
    """`found` where a pattern is found in the answer, `absent` where it is not."""

    kind: Literal["regex"] = "regex"
    pattern: str
    found: float = Field(default=1.0, allow_inf_nan=False)
    absent: float = Field(default=0.0, allow_inf_nan=False)

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return compiled(pattern)

    def rate(self, asked: Asked) -> Sequence[float]:
        """By search, as the pattern is."""
        return [self.found if re.search(self.pattern, answer) else self.absent for answer in asked.answers]


class MetricReward(Reward):
    """A metric of evaluation against the row's answer (or answers: the one that fits best), in [0, 1]."""

    kind: Literal["metric"] = "metric"
    metric: Literal["exact", "contains", "rouge"] = "exact"
    column: str = Field(default="answer", description="the column of the data that holds the right answer")

    def rate(self, asked: Asked) -> Sequence[float]:
        """The best over the row's answers."""
        wanted = map(_references, asked.facts[self.column])
        return [best(self.metric, answer, right) for answer, right in zip(asked.answers, wanted, strict=True)]

    def lack(self, row: Mapping[str, Any]) -> str | None:
        """A row needs a right answer."""
        return lacks(self.title, row, self.column)


class NumberReward(Reward):
    """The verifier of arithmetic: 1 where the last number of the answer is that of the row's answer, else 0.

    "1,250.50", "-3", "6e2" and full-width digits are numbers; two are the same within one part in a million. A row's answer is one
    number, with words around it or not; a worked solution gives it behind "####".
    """

    kind: Literal["number"] = "number"
    column: str = Field(default="answer", description="the column of the data that holds the right number")

    def rate(self, asked: Asked) -> Sequence[float]:
        """1 or 0."""
        wanted = map(_references, asked.facts[self.column])
        return [best("number", answer, right) for answer, right in zip(asked.answers, wanted, strict=True)]

    def lack(self, row: Mapping[str, Any]) -> str | None:
        """A row needs a number."""
        if why := lacks(self.title, row, self.column):
            return why
        for text in _references(row[self.column]):
            if last_number(text) is None:
                return f"reward '{self.title}': '{self.column}' has no number in {text!r:.60}"
            if not _one_number(text):
                return (
                    f"reward '{self.title}': '{self.column}' is not one plain number in {short(text)!r}, and an answer that ends "
                    "with its last one would count as right; give the number alone, or behind ####"
                )
        return None


def _one_number(text: str) -> bool:
    """Whether a right answer, from its last #### on, has a single number, said once or again, that is no part of an expression."""
    final = text.rpartition("####")[2]
    said = [numbers(part) for part in AGAIN.split(final)]
    alone = all(len(found) <= 1 for found in said) and len({value for found in said for value in found}) == 1
    return alone and not PART.search(plain(final))


def _references(value: Any) -> list[str]:
    """The right answers of a row, as texts."""
    return [str(one) for one in (value if isinstance(value, list | tuple) else [value])]


class LengthReward(Reward):
    """0 within `least` to `most` words, and -1 for every `per` words outside. A Han character is a word."""

    kind: Literal["length"] = "length"
    least: int = Field(default=1, ge=0)
    most: int | None = Field(default=None, ge=0)
    per: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="words that cost 1")

    @model_validator(mode="after")
    def _possible(self) -> LengthReward:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"no length is at least {self.least} and at most {self.most}")
        return self

    def rate(self, asked: Asked) -> Sequence[float]:
        """Minus the distance to the nearest allowed length."""
        counts = [len(WORD.findall(answer)) for answer in asked.answers]
        most = math.inf if self.most is None else self.most
        return [-max(self.least - n, n - most, 0) / self.per for n in counts]


class Term(Spec):
    """One part of a sum."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    reward: AnyReward


class SumReward(Reward):
    """sum_i weight_i reward_i"""

    kind: Literal["sum"] = "sum"
    terms: tuple[Term, ...] = Field(min_length=1)

    def rated(self, asked: Asked) -> Scores:
        """The weighted sum, and the parts of all terms."""
        total = [0.0] * len(asked.answers)
        parts: dict[str, list[float]] = {}
        for term in self.terms:
            scores = term.reward.rated(asked)
            total = [t + term.weight * s for t, s in zip(total, scores.total, strict=True)]
            for name, values in scores.parts.items():
                parts[_unused(name, parts)] = values
        return Scores(total, parts)

    def lack(self, row: Mapping[str, Any]) -> str | None:
        """What the first term lacks that lacks something."""
        return next((why for term in self.terms if (why := term.reward.lack(row))), None)

    def models(self) -> tuple[str, ...]:
        """Those of its terms, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.reward.models()))

    def engines(self) -> tuple[str, ...]:
        """Those of its terms, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.reward.engines()))


def _unused(name: str, taken: dict[str, Any]) -> str:
    """The name, with a number where it is taken."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


if TYPE_CHECKING:
    AnyReward = Reward
else:
    AnyReward = one_of(Reward)  # the type of a key `reward:`
Term.model_rebuild()
SumReward.model_rebuild()
