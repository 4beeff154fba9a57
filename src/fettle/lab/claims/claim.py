"""What a claim is, and how its verdicts are reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fettle.evaluate import Evaluation, TaskFile
from fettle.lab.world import World
from fettle.stages.compare import Arms, Outcome

Values = Sequence[float]  # a value a seed
Scores = Mapping[str, Values]  # by arm
CONTROL = "base, untuned"
CHOOSING = 1000  # the seed of the runs that learning rates are chosen by; no arm is measured with it
SHARE, PEAK, LATENCY, MERGED = "share of weights (%)", "peak (MiB)", "latency", "latency, merged"


@dataclass(frozen=True)
class Setting:
    """What a claim is run with; all that it writes lies in `folder`."""

    folder: Path
    world: World
    seeds: int
    each: int  # evaluation items a task family


@dataclass(frozen=True)
class Plan:
    """What is compared, and what it is scored on."""

    arms: Arms
    evaluate: Sequence[TaskFile] = ()
    development: Evaluation | None = None  # for choosing learning rates; shares no item with what is evaluated
    controls: Mapping[str, str] = field(default_factory=lambda: {CONTROL: "fettle/tiny"})  # untuned models by name


@dataclass(frozen=True)
class Found:
    """What the runs came to: every outcome by arm, a seed each, and every figure by what it is, then by arm.

    Figures are the evaluations by their file's name (controls among the arms), SHARE and PEAK, LATENCY and MERGED where the
    claim asks for them, and the claim's own measures.
    """

    outcomes: Mapping[str, Sequence[Outcome]]
    figures: Mapping[str, Scores]

    def __getitem__(self, what: str) -> Scores:
        return self.figures[what]


@dataclass(frozen=True)
class Claim:
    """One claim: `plan` writes the data and says what is compared, `verdict` reads what was found."""

    name: str
    says: str
    paper: str
    plan: Callable[[Setting], Plan]
    verdict: Callable[[Found], list[str]]
    shows: tuple[str, ...]  # figures that the table has as columns; the first is drawn
    settings: tuple[str, ...] = ()  # of the recipe in every arm
    rates: Mapping[str, Values] = field(default_factory=dict)  # by arm: learning rates to choose from
    # By name: a figure of a run's folder; None of an arm that has none.
    measures: Mapping[str, Callable[[Path], float | None]] = field(default_factory=dict)
    latency: bool = False
    each: int = 20
    recipe: str = "quickstart.yaml"  # of those that come with fettle: what arms change
    lower: bool = False  # a lower score is the better one, as a perplexity is


def interval(values: Values, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean over seeds."""
    draws = np.random.default_rng(seed).choice(np.asarray(values), (10_000, len(values))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def holds(better: Values, worse: Values, least: float = 0.0, form: str = "+.3f") -> str:
    """The verdict on better > worse + `least`, paired by seed.

    It holds where every seed agrees, and does not where the mean disagrees. A negative `least` asks that the first is at
    most so much worse.
    """
    gaps = [b - w for b, w in zip(better, worse, strict=True)]
    low, high = interval(gaps)
    said = "holds" if min(gaps) > least else "does not hold here" if np.mean(gaps) <= least else "inconclusive"
    return f"{said} ({np.mean(gaps):{form}}, {low:{form}} to {high:{form}} over {len(gaps)} seeds)"


def gains(arm: Values, best: Values, control: Values) -> list[float]:
    """By seed, the share of the way from the control to the best that an arm goes; 0 where there is no way."""
    return [(a - c) / (b - c) if b > c else 0.0 for a, b, c in zip(arm, best, control, strict=True)]


def spread(values: Values, form: str = ".2f") -> str:
    """The mean over seeds and its interval, as text."""
    low, high = interval(values)
    return f"{np.mean(values):{form}} ({low:{form}} to {high:{form}})"
