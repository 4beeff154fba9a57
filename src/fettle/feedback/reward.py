"""What every reward is: a number for each answer, checked before anybody learns from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fettle.core.errors import FettleError
from fettle.core.spec import Spec, nearest
from fettle.data.tools import spelled_out

if TYPE_CHECKING:
    from fettle.generate.protocol import Engine, Prompt
    from fettle.models.forest import Forest

Tools = Sequence[dict[str, Any]]  # of one prompt, as templates take them


@dataclass(frozen=True)
class Means:
    """What a reward cannot hold itself: opened models and engines, by the names that the recipe has for them, and tools.

    `offered` are the tools of each prompt; none where it is empty. They are no argument, which a column could be called, too.
    """

    forests: Mapping[str, Forest] = field(default_factory=dict)
    engines: Mapping[str, Engine] = field(default_factory=dict)
    offered: Sequence[Tools] = ()


@dataclass(frozen=True)
class Asked:
    """N answers to be rewarded, each with its prompt, and the facts of its row (`answer`: the right one)."""

    prompts: Sequence[Prompt]
    answers: Sequence[str]
    means: Means
    facts: Mapping[str, Sequence[Any]]

    @property
    def offered(self) -> Sequence[Tools]:
        """The tools of each prompt."""
        return self.means.offered or [()] * len(self.prompts)

    @property
    def spelled(self) -> list[Prompt]:
        """The prompts with tools and calls in their texts: for a judge, whose own template knows nothing of them."""
        return [spelled(prompt, tools) for prompt, tools in zip(self.prompts, self.offered, strict=True)]

    def quoted(self, i: int) -> str:
        """Answer i as an error names it: the prompt it is for, and the answer."""
        prompt = self.prompts[i]
        said = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return f"the answer {short(self.answers[i])!r} to {short(said)!r}"


def spelled(prompt: Prompt, tools: Tools) -> Prompt:
    """A prompt with its tools and their calls written into its texts."""
    return prompt if isinstance(prompt, str) else spelled_out([dict(turn) for turn in prompt], tools, "")[0]


def short(text: str, most: int = 60) -> str:
    """A text in one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


@dataclass(frozen=True)
class Scores:
    """Rewards of N answers, and of each part that they are made of (by name, before its weight), for the log."""

    total: list[float]
    parts: dict[str, list[float]]


class Reward(Spec):
    """A number for each answer; more is better."""

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[str], means: Means | None = None,
        **facts: Sequence[Any],
    ) -> list[float]:  # fmt: skip
        """One finite number an answer. `facts` are columns of the data, one value an answer.

        FettleError where a column is missing, the count is wrong, or a number is not finite.
        """
        return self.scores(prompts, answers, means, **facts).total

    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], means: Means | None = None,
        **facts: Sequence[Any],
    ) -> Scores:  # fmt: skip
        """As `score`, with the parts of a sum."""
        asked = Asked(prompts, answers, means or Means(), facts)
        for name, column in (("prompts", prompts), ("tools", asked.offered), *facts.items()):
            if len(column) != len(answers):
                raise FettleError(f"reward '{self.title}': {len(column)} {name} for {len(answers)} answers")
        for i in range(len(answers)):
            if why := self.lack({name: column[i] for name, column in facts.items()}):
                raise FettleError(f"{why}, for {asked.quoted(i)}")
        return self.rated(asked) if answers else Scores([], {})

    @property
    def title(self) -> str:
        """What it is called in logs and errors."""
        return str(self.kind)  # type: ignore[attr-defined]

    def rated(self, asked: Asked) -> Scores:
        """The scores of one answer or more, checked."""
        found = checked(self.rate(asked), asked, self.title)
        return Scores(found, {self.title: found})

    def rate(self, asked: Asked) -> Sequence[float]:
        """The numbers themselves; what each kind of reward is."""
        raise NotImplementedError(f"{type(self).__name__}.rate")

    def lack(self, row: Mapping[str, Any]) -> str | None:
        """Why answers to this row of the data cannot be rewarded; None where they can."""
        return None

    def models(self) -> tuple[str, ...]:
        """The models that `Means.forests` must have."""
        return ()

    def engines(self) -> tuple[str, ...]:
        """The engines that `Means.engines` must have."""
        return ()


def lacks(reward: str, row: Mapping[str, Any], column: str) -> str | None:
    """Why a reward finds nothing in a column of a row; None where there is something."""
    if column not in row:
        return f"reward '{reward}': needs the column '{column}' of the data" + (
            f": {nearest(column, row)}" if row else ", which has no columns but the prompt"
        )
    return f"reward '{reward}': the row has no '{column}'" if row[column] is None or row[column] == [] else None


def checked(found: Any, asked: Asked, title: str) -> list[float]:
    """Rewards as floats; FettleError unless they are finite numbers, one an answer."""
    try:
        numbers = [float(number) for number in found]
    except (TypeError, ValueError):
        raise FettleError(f"reward '{title}': expected a number for each answer, found {found!r:.120}") from None
    if len(numbers) != len(asked.answers):
        raise FettleError(f"reward '{title}': {len(numbers)} rewards for {len(asked.answers)} answers")
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise FettleError(f"reward '{title}': the reward is {number} for {asked.quoted(i)}")
    return numbers
