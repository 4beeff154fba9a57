"""Lists of words: in order, backwards, counted, their ends, what is in them."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..prose.lists import words
from ..world import World
from .family import Family, Maker, Slots


def _of(answer: Callable[[list[str]], str]) -> Maker:
    """Items that are a list of three to five words, with the answer that `answer(items)` gives."""

    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        items = words(rng, world)
        return {"list": ", ".join(items)}, answer(items)

    return make


def _counted(rng: random.Random, world: World) -> tuple[Slots, str]:
    items = words(rng, world, 2, 8)
    return {"list": ", ".join(items)}, str(len(items))


def _letter(rng: random.Random, world: World) -> tuple[Slots, str]:
    """One word of the list alone begins with the letter."""
    while True:
        items = words(rng, world)
        word = rng.choice(items)
        letter = word[0].lower()
        if sum(item[0].lower() == letter for item in items) == 1:
            return {"list": ", ".join(items), "letter": letter}, word


def _contains(rng: random.Random, world: World) -> tuple[Slots, str]:
    items = words(rng, world, 4, 6)
    inside = rng.random() < 0.5
    word = rng.choice(items[:-1]) if inside else items[-1]
    return {"word": word, "list": ", ".join(items[:-1])}, "yes" if inside else "no"


def _kind(rng: random.Random, world: World) -> tuple[Slots, str]:
    """One word of the list is of the kind asked for, the others of one other kind."""
    groups = {
        "animal": world.animals,
        "food": world.foods,
        "colour": world.colors,
        "job": world.jobs,
        "person": world.people,
        "town": world.towns,
    }
    kind, rest = rng.sample(list(groups), 2)
    word = rng.choice(groups[kind]).en
    items = [entity.en for entity in rng.sample(groups[rest], rng.randint(2, 3))] + [word]
    rng.shuffle(items)
    return {"kind": kind, "list": ", ".join(items)}, word


FAMILIES = (
    Family(
        "sort",
        "lists",
        "en",
        (
            "Sort these words: {list}",
            "Put these words in alphabetical order: {list}",
            "Sort the list {list}.",
            "Write in alphabetical order: {list}",
            "Order these words from a to z: {list}",
            "Arrange by the alphabet: {list}",
            "Give the list {list} in the order of the alphabet.",
            "Bring these words into alphabetical order: {list}",
        ),
        _of(lambda items: ", ".join(sorted(items))),
    ),
    Family(
        "reverse",
        "lists",
        "en",
        (
            "Reverse this list: {list}",
            "Write the list backwards: {list}",
            "Turn the list around: {list}",
            "Give these words in reverse: {list}",
            "Read from the end to the start: {list}",
            "Reverse the words {list}.",
            "What is {list} backwards?",
            "Give the list {list} the other way round.",
        ),
        _of(lambda items: ", ".join(items[::-1])),
    ),
    Family(
        "count",
        "lists",
        "en",
        (
            "How many words are in this list: {list}?",
            "Count the words: {list}",
            "Count the words in the list {list}.",
            "Give the number of words: {list}",
            "How many words are these: {list}?",
            "How long is the list {list}?",
            "Say how many words there are: {list}",
            "What is the number of words in {list}?",
        ),
        _counted,
    ),
    Family(
        "first",
        "lists",
        "en",
        (
            "What is the first word of {list}?",
            "Give the first word: {list}",
            "Which word is first in the list {list}?",
            "Name the first word of the list {list}.",
            "Find the first word: {list}",
            "Write only the first word of {list}.",
            "With which word does {list} begin?",
            "Take the first word from this list: {list}",
        ),
        _of(lambda items: items[0]),
    ),
    Family(
        "last",
        "lists",
        "en",
        (
            "What is the last word of {list}?",
            "Give the last word: {list}",
            "Which word is last in the list {list}?",
            "Name the last word of the list {list}.",
            "Find the last word: {list}",
            "Write only the last word of {list}.",
            "With which word does {list} end?",
            "Take the last word from this list: {list}",
        ),
        _of(lambda items: items[-1]),
    ),
    Family(
        "second",
        "lists",
        "en",
        (
            "What is the second word of {list}?",
            "Give the second word: {list}",
            "Which word is second in the list {list}?",
            "Name the second word of the list {list}.",
            "Find the second word: {list}",
            "Write only the second word of {list}.",
            "Which word comes after the first in {list}?",
            "Take the second word from this list: {list}",
        ),
        _of(lambda items: items[1]),
    ),
    Family(
        "starts_with",
        "lists",
        "en",
        (
            "Which word begins with {letter}: {list}?",
            "Find the word that starts with {letter}: {list}",
            "Give the word with {letter} at the start: {list}",
            "In the list {list}, which word begins with the letter {letter}?",
            "Name the word of {list} that begins with {letter}.",
            "Choose the word that starts with {letter}: {list}",
            "Only one word of {list} begins with {letter}. Which one?",
            "Take the word that begins with the letter {letter}: {list}",
        ),
        _letter,
    ),
    Family(
        "contains",
        "lists",
        "en",
        (
            "Is {word} in the list {list}? Answer yes or no.",
            "Yes or no: {word} is in the list {list}.",
            "Does the list {list} have {word} in it? Answer yes or no.",
            "Say yes or no: is {word} one of {list}?",
            "Answer yes or no: {word} is one of {list}.",
            "Decide with yes or no: is {word} in {list}?",
            "Yes or no, do you find {word} in {list}?",
            "Look for {word} in {list}. Is it there? Reply with yes or no.",
        ),
        _contains,
    ),
    Family(
        "pick_kind",
        "lists",
        "en",
        (
            "Which word is of the kind {kind}: {list}?",
            "Find the {kind} in the list {list}.",
            "Find the {kind}: {list}",
            "Name the {kind} in this list: {list}",
            "Which one is the {kind}: {list}?",
            "Give only the {kind}: {list}",
            "One of {list} is of the kind {kind}. Which one?",
            "Choose the {kind} among {list}.",
        ),
        _kind,
    ),
)
