"""Prose about lists, in English: in order, backwards, counted, filtered, their first and last, what is and is not in them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..lexicon import CLOTHES, COUNTED, NUMBERS, Word, plural
from ..world import Entity, World
from .facts import capitalised


def lists(rng: random.Random, world: World) -> str:
    """Several small paragraphs, each about one list."""
    makers = (_ordered, _ordered, _turned, _ends, _counted, _filtered, _members, _kinds, _shelf)
    return rng.choice(("\n", "\n\n", " ")).join(rng.choice(makers)(rng, world) for _ in range(rng.randint(4, 8)))


def words(rng: random.Random, world: World, low: int = 3, high: int = 5) -> list[str]:
    """A list of distinct English words of one kind or of several."""
    groups: tuple[Sequence[Entity | Word], ...] = (
        world.foods,
        world.animals,
        world.objects,
        world.colors,
        world.jobs,
        CLOTHES,
        world.foods + world.animals,
        world.objects + world.foods,
        world.people,
        world.towns,
    )
    return [word.en for word in rng.sample(rng.choice(groups), rng.randint(low, high))]


def joined(items: list[str]) -> str:
    """The items as English writes them: ``a, b and c``."""
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def _ordered(rng: random.Random, world: World) -> str:
    items = words(rng, world)
    if rng.random() < 0.25:
        items = [str(n) for n in rng.sample(range(100), rng.randint(3, 5))]
        up = ", ".join(sorted(items, key=int))
        return rng.choice(
            (f"The numbers {', '.join(items)} from small to large are {up}.", f"{joined(items)}, put in order: {up}.")
        )
    text, done = ", ".join(items), ", ".join(sorted(items))
    return rng.choice(
        (
            f"The list {text} in alphabetical order is {done}.",
            f"In the order of the alphabet, {text} become {done}.",
            f"Sorted by their letters, the words {joined(items)} stand like this: {done}.",
            f"{capitalised(done)}: that is {text}, put in order.",
            f"Alphabetical order: {done}.",
            f"{capitalised(sorted(items)[0])} comes before {sorted(items)[1]} in the alphabet.",
        )
    )


def _turned(rng: random.Random, world: World) -> str:
    items = words(rng, world)
    text, back = ", ".join(items), ", ".join(items[::-1])
    return rng.choice(
        (
            f"The list {text} backwards is {back}.",
            f"Read from the end, {text} is {back}.",
            f"Turned around, {joined(items)} are {back}.",
            f"{capitalised(text)}. The other way round: {back}.",
        )
    )


def _ends(rng: random.Random, world: World) -> str:
    items = words(rng, world)
    text = ", ".join(items)
    return rng.choice(
        (
            f"The first word of {text} is {items[0]}.",
            f"The last word of {text} is {items[-1]}.",
            f"In the list {text}, the second word is {items[1]}.",
            f"The list {text} begins with {items[0]} and ends with {items[-1]}.",
            f"{capitalised(items[0])} is the first of {joined(items)}, and {items[-1]} is the last.",
            f"The longest word of {text} has {max(map(len, items))} letters.",
        )
    )


def _counted(rng: random.Random, world: World) -> str:
    items = words(rng, world, 2, 8)
    n = len(items)
    return rng.choice(
        (
            f"There are {n} words in the list {', '.join(items)}.",
            f"The list {', '.join(items)} has {n} words.",
            f"{capitalised(joined(items))}: that makes {NUMBERS[n]}.",
            f"Counting {', '.join(items)} gives {n}.",
            f"The word {items[0]} has {len(items[0])} letters.",
        )
    )


def _filtered(rng: random.Random, world: World) -> str:
    items = words(rng, world, 3, 6)
    letter = rng.choice(items)[0].lower()
    kept = [item for item in items if item[0].lower() == letter]
    verb, noun = ("begins", "word") if len(kept) == 1 else ("begin", "words")
    return rng.choice(
        (
            f"Of {joined(items)}, only {joined(kept)} {verb} with the letter {letter}.",
            f"In {', '.join(items)}, the {noun} with {letter} at the start: {', '.join(kept)}.",
            f"{capitalised(kept[0])} begins with the letter {letter}.",
            f"Without {items[-1]}, the list {', '.join(items)} is {', '.join(items[:-1])}.",
        )
    )


def _members(rng: random.Random, world: World) -> str:
    items = words(rng, world, 4, 6)
    out, items = items[-1], items[:-1]
    inside = rng.choice(items)
    return rng.choice(
        (
            f"The list {', '.join(items)} has {inside} in it, but not {out}.",
            f"{capitalised(inside)} is in the list {', '.join(items)}. {capitalised(out)} is not in it.",
            f"In {joined(items)} there is no {out}.",
        )
    )


def _kinds(rng: random.Random, world: World) -> str:
    named = {
        "animal": world.animals,
        "food": world.foods,
        "colour": world.colors,
        "job": world.jobs,
        "person": world.people,
        "town": world.towns,
    }
    one, rest = rng.sample(list(named), 2)
    word = rng.choice(named[one]).en
    others = [w.en for w in rng.sample(named[rest], 3)]
    mixed = [*others, word]
    rng.shuffle(mixed)
    return rng.choice(
        (
            f"In the list {', '.join(mixed)}, the only {one} is {word}.",
            f"Among {joined(mixed)}, the {one} is {word}.",
            f"{capitalised(word)} does not belong with {joined(others)}, for {word} is of the kind {one}.",
            f"The words {joined(others)} are of one kind: {rest}.",
            f"The {one} in {', '.join(mixed)} is {word}.",
        )
    )


def _shelf(rng: random.Random, world: World) -> str:
    person = rng.choice(world.people).en
    things = rng.sample([word.en for word in world.objects] + sorted(COUNTED), 3)
    counts = [(rng.randint(2, 9), plural(thing)) for thing in things]
    text = joined([f"{n} {name}" for n, name in counts])
    return rng.choice(
        (
            f"On the shelf of {person} there are {text}. That makes {sum(n for n, _ in counts)} things in all.",
            f"{person} bought {text}.",
            f"{person} wrote a list: {text}. Of {counts[1][1]} there are {counts[1][0]}.",
        )
    )
