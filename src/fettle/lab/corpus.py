"""The pre-training corpus: endless documents about the small world, each a pure function of (world, seed, index).

About three quarters are English, one quarter Chinese. The skills of the instruction tasks are in
it as prose ("The list pear, fig in alphabetical order is fig, pear."), as told lessons and as pages of an exercise book;
chat turns are not, so that a model of this corpus is fluent in its world and unable to follow instructions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import accumulate, count, islice
from pathlib import Path

from .prose import chinese, facts, language, lists, numbers, reviews, school, stories
from .rows import write_rows
from .world import World

Kind = Callable[[random.Random, World], str]

# How often each kind is drawn.
KINDS: dict[Kind, float] = {
    facts.profile: 10,
    facts.place: 5,
    facts.things: 5,
    facts.trades: 2,
    facts.mixture: 9,
    facts.truths: 5,
    facts.kinds: 4,
    facts.letter: 2,
    numbers.sums: 8,
    numbers.comparisons: 4,
    numbers.sequences: 2,
    numbers.problems: 3,
    lists.lists: 12,
    reviews.reviews: 5,
    stories.story: 8,
    stories.journey: 2,
    stories.talk: 2,
    stories.mentions: 4,
    language.grammar: 6,
    language.glossary: 6,
    language.names: 2,
    language.parallel: 5,
    school.lesson: 9,
    school.workbook: 9,
    school.dictation: 10,
    chinese.profile: 9,
    chinese.mixture: 8,
    chinese.places: 5,
    chinese.truths: 3,
    chinese.numbers: 4,
    chinese.lists: 5,
    chinese.story: 5,
    reviews.reviews_zh: 4,
    school.lesson_zh: 5,
    school.dictation_zh: 4,
}
_KINDS, _WEIGHTS = tuple(KINDS), tuple(accumulate(KINDS.values()))
_PASSAGES = {False: (1, 1, 2, 2, 3, 4), True: (2, 3, 3, 4, 5)}  # of a document in English, in Chinese
_CHINESE = frozenset(kind for kind in KINDS if kind.__module__.endswith("chinese") or kind.__name__.endswith("_zh"))


def document(world: World, seed: int, index: int) -> str:
    """Document `index` of the corpus of `seed`: one to five passages of one kind, 30 to 400 words in all."""
    rng = random.Random(f"document/{seed}/{index}")
    kind = rng.choices(_KINDS, cum_weights=_WEIGHTS)[0]
    return "\n\n".join(kind(rng, world) for _ in range(rng.choice(_PASSAGES[kind in _CHINESE])))


def documents(world: World, seed: int, start: int = 0) -> Iterator[str]:
    """All documents from `start` on, without end."""
    return (document(world, seed, index) for index in count(start))


def write_corpus(path: str | Path, world: World, seed: int = 0, size: int = 1000) -> int:
    """Write the first `size` documents as JSONL rows ``{"text": ...}``, whole or not at all; return the number of rows."""
    return write_rows(path, ({"text": text} for text in islice(documents(world, seed), size)))
