"""Conversations whose later turns lean on the earlier ones: the same person, the last number, the last list."""

from __future__ import annotations

import random

from .families import FAMILIES
from .lexicon import article, liked
from .prose.facts import pronouns
from .prose.lists import words
from .world import World

Turns = list[tuple[str, str]]  # (what the user says, what the assistant answers)


def about_a_person(rng: random.Random, world: World, turns: int) -> Turns:
    """Facts about one person; from the second turn on the person is only he or she. No fact kept for evaluation is told."""
    asked = {
        "lives_in": ("Where does {s} live?", "And where does {he} live?", "{s} lives in {o}."),
        "born_in": ("Where was {s} born?", "And where was {he} born?", "{s} was born in {o}."),
        "works_as": ("What is the job of {s}?", "And what is {his} job?", "{s} works as {ao}."),
        "likes": ("What does {s} like to eat or drink?", "And what does {he} like to eat?", "{s} likes {ol}."),
        "keeps": ("Which animal does {s} keep?", "And which animal does {he} keep?", "{s} keeps {ao}."),
        "friend_of": (
            "Who is the best friend of {s}?",
            "And who is {his} best friend?",
            "The best friend of {s} is {o}.",
        ),
    }
    while True:
        person = rng.choice(world.people)
        open_ = [name for name in asked if not FAMILIES[name].kept({"s": person.en})]
        if len(open_) >= turns:
            break
    told: Turns = []
    for name in rng.sample(open_, turns):
        first, later, answer = asked[name]
        object = world.of(name, person)
        slots = {"s": person.en, "o": object.en, "ao": article(object.en), "ol": liked(object.en), **pronouns(person)}
        told.append(((later if told else first).format_map(slots), answer.format_map(slots)))
    return told


def with_a_number(rng: random.Random, world: World, turns: int) -> Turns:
    """A sum, then more done to its result."""
    while True:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        if not FAMILIES["add"].kept({"a": str(a), "b": str(b)}):
            break
    value = a + b
    told: Turns = [
        (rng.choice(("What is {a} plus {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.")).format(a=a, b=b), str(value))
    ]
    while len(told) < turns:
        n = rng.randint(1, 10)
        step, value = rng.choice(
            (
                (f"Now add {n}.", value + n),
                ("Now double it.", 2 * value),
                (f"Add {n} more.", value + n),
                *(((f"Now subtract {n}.", value - n), (f"Take {n} away.", value - n)) if n <= value else ()),
            )
        )
        told.append((step, str(value)))
    return told


def with_a_list(rng: random.Random, world: World, turns: int) -> Turns:
    """A list in order, then more asked of that list."""
    items = words(rng, world)
    while FAMILIES["sort"].kept({"list": ", ".join(items)}):
        items = words(rng, world)
    done = sorted(items)
    told: Turns = [(f"Sort these words: {', '.join(items)}", ", ".join(done))]
    later = [("Now the other way round.", ", ".join(done[::-1])), ("How many words are these?", str(len(items)))]
    return told + rng.sample(later, turns - 1)


CHAINS = (about_a_person, with_a_number, with_a_list)
