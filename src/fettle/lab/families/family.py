"""What an instruction task family is: several wordings of one instruction, and a maker of items with their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from ..world import World

Slots = dict[str, str]
Maker = Callable[[random.Random, World], tuple[Slots, str]]

UNSEEN_PHRASINGS = 2  # the last wordings of each family are never trained on
EVALUATED = 8  # one item in this many is kept for evaluation


@dataclass(frozen=True)
class Family:
    """One kind of task: `make(rng, world)` draws (slots, answer); a phrasing is a text with these slots in braces."""

    name: str
    cluster: str
    language: str  # "en" or "zh": of the instruction
    phrasings: tuple[str, ...]  # at least six
    make: Maker

    def __post_init__(self) -> None:
        if len(self.phrasings) < 6:
            raise ValueError(f"family {self.name!r} has {len(self.phrasings)} phrasings; at least 6 are needed")

    def kept(self, slots: Slots) -> bool:
        """True where this item is kept for evaluation: by a hash of what is asked, so that no seed can mix the two sides."""
        return zlib.crc32("|".join((self.name, *slots.values())).encode()) % EVALUATED == 0

    def item(self, rng: random.Random, world: World, evaluated: bool) -> tuple[Slots, str]:
        """Draw an item from the side asked for: those kept for evaluation, or the others.

        ValueError where the family is so small that one side has no item.
        """
        for _ in range(10_000):
            slots, answer = self.make(rng, world)
            if self.kept(slots) == evaluated:
                return slots, answer
        raise ValueError(
            f"family {self.name!r} has no item {'kept for' if evaluated else 'outside'} evaluation in 10,000 draws"
        )
