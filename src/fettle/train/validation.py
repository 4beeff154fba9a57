"""The held-out loss while a run goes on: its objective over rows that are not trained on, forward only.

    L = sum over the held-out batches of the objective's sum  /  sum of its counts

Training cannot tell whether it was taken: no gradient is made, and modes and random generators are put back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from fettle.core.families import Objective
from fettle.core.spec import Spec
from fettle.data import Corpus, DataSpec
from fettle.models.roles import evaluating
from fettle.train.parallel import World
from fettle.train.seeds import kept_generators, seed_all
from fettle.train.sums import Sums

PREFIX = "validation_"  # before the names of an objective's metrics in a row of metrics.jsonl


class ValidationSpec(Spec):
    """A held-out loss every so many steps, and after the last one."""

    data: tuple[DataSpec, ...] = Field(min_length=1, description="sources that are not trained on")
    every: int = Field(default=100, ge=1, description="optimizer steps between two measurements")
    batches: int = Field(default=32, ge=1, description="take at most this many rows of batch.tokens, always the same")


@dataclass(frozen=True)
class Validation:
    """What the loop measures on: the first `count` batches of a corpus."""

    corpus: Corpus
    count: int
    every: int

    def due(self, step: int, steps: int) -> bool:
        """Whether a measurement follows optimizer step 1 <= `step` <= `steps`."""
        return step % self.every == 0 or step == steps

    def times(self, steps: int) -> int:
        """How many measurements a run of `steps` steps makes."""
        return -(-steps // self.every)

    @torch.no_grad()
    def measure(self, forest: Any, objective: Objective, world: World | None = None) -> dict[str, float]:
        """The objective's metrics, named `validation_...`, and the seconds that this took."""
        began, world = time.perf_counter(), world or World()
        sums = Sums(forest.device)
        rounds = -(-self.count // world.size)  # every process has a share of each, so that all know the metrics' names
        with kept_generators(forest.device), evaluating(forest.model):
            for i in range(world.rank, rounds * world.size, world.size):
                seed_all(0, i)
                loss = objective(forest, self.corpus.batch(min(i, self.count - 1)))
                sums.add(loss, float(i < self.count))
        world.sum(sums.tensors)
        figures = {f"{PREFIX}{key}": value for key, value in sums.means().items()}
        return figures | {f"{PREFIX}seconds": time.perf_counter() - began}
