"""Short stories: people meet, carry things, give them away, travel. Who has what at the end follows from the text.

`handing` builds one such story as facts and as text; the instruction tasks about stories use it too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..lexicon import CLOTHES, COLOURS, DAYS, VERBS, Word, article
from ..world import Entity, World
from .facts import pronouns

OPENINGS = (
    "One morning",
    "One day",
    "Last week",
    "In the summer",
    "On a cold evening",
    "After lunch",
    "Early in the day",
    "Once",
)
WEATHER = (
    "The sun was warm.",
    "It rained all day.",
    "The wind was loud.",
    "Snow lay on the roofs.",
    "The sky was clear.",
    "Nobody was on the road.",
)
# Questions that stay open: they teach the question mark and its words without an answer behind them.
WONDERS = (
    "What would the next day bring?",
    "Who could know?",
    "Was it true?",
    "How many days would it last?",
    "Which road was the right one?",
    "Where had the time gone?",
    "Is there a better day than this?",
    "Who was that at the door?",
    "Why not?",
    "What is the matter?",
    "Are you well?",
    "Where are you now?",
    "Which one is it?",
)
ENDINGS = (
    *WONDERS[:6],
    "Then everyone went home.",
    "That evening they laughed about it.",
    "It was a good day.",
    "They never forgot that day.",
    "And so it ended well.",
    "Later they drank tea together.",
    "At night the town was quiet.",
)


@dataclass(frozen=True)
class Handing:
    """A story in which `giver` carried a thing to `town` and handed it to `taker`, while `other` did something else."""

    giver: Entity
    taker: Entity
    other: Entity
    thing: str  # e.g. "red scarf"
    color: Word
    noun: Word
    town: Entity
    text: str


def handing(rng: random.Random, world: World) -> Handing:
    """Draw the people and the thing of one handing, and tell it in three sentences in one of several ways."""
    giver, taker, other = rng.sample(world.people, 3)
    color, noun, town = rng.choice(COLOURS), rng.choice(CLOTHES), rng.choice(world.towns)
    thing = f"{color.en} {noun.en}"
    verb = rng.choice(VERBS)
    forms = pronouns(giver)
    told = rng.choice(
        (
            f"{giver.en} carried {article(thing)} to {town.en}. There {forms['he']} gave the {noun.en} to {taker.en}.",
            f"{giver.en} bought {article(thing)} in {town.en} and gave it to {taker.en}.",
            f"{giver.en} met {taker.en} in {town.en}. {giver.en} gave {taker.en} {article(thing)}.",
            f"{giver.en} travelled to {town.en} with {article(thing)}. {taker.en} took the {noun.en} from {forms['him']}.",
            f"In {town.en}, {giver.en} found {article(thing)} and handed it to {taker.en}.",
        )
    )
    aside = rng.choice(
        (
            f"{other.en} {verb.more[1]} at home.",
            f"{other.en} {verb.more[1]} all day.",
            f"Meanwhile {other.en} {verb.more[1]} in the garden.",
        )
    )
    text = f"{aside} {told}" if rng.random() < 0.3 else f"{told} {aside}"
    return Handing(giver, taker, other, thing, color, noun, town, text)


def story(rng: random.Random, world: World) -> str:
    """A story of several scenes, with a look back at who did what."""
    lines = [f"{rng.choice(OPENINGS)}, {_scene(rng, world)}", rng.choice(WEATHER)]
    for _ in range(rng.randint(1, 3)):
        event = handing(rng, world)
        lines.append(event.text)
        if rng.random() < 0.7:
            lines.append(_looking_back(rng, event))
        if rng.random() < 0.4:
            lines.append(_background(rng, world, event.giver))
    if rng.random() < 0.3:
        lines.insert(2, rng.choice(WONDERS))
    lines.append(rng.choice(ENDINGS))
    return rng.choice((" ", " ", "\n")).join(lines)


def journey(rng: random.Random, world: World) -> str:
    """A person goes from town to town on the days of a week and meets people there."""
    person = rng.choice(world.people)
    forms = pronouns(person)
    start = rng.randint(0, 2)
    towns = rng.sample(world.towns, rng.randint(3, 4))
    lines = [f"{person.en} went on a journey. {rng.choice(WEATHER)}"]
    for day, town in zip(DAYS[start:], towns):
        met = rng.choice(world.people)
        lines.append(
            rng.choice(
                (
                    f"On {day.en} {forms['he']} was in {town.en} and met {met.en}.",
                    f"On {day.en} {person.en} came to {town.en}, a town in {world.of('located_in', town).en}.",
                    f"{day.en} was for {town.en}, where {forms['he']} {rng.choice(VERBS).more[1]} all day.",
                    f"On {day.en} {met.en} and {person.en} {rng.choice(VERBS).more[1]} together in {town.en}.",
                )
            )
        )
    if rng.random() < 0.3:
        lines.append(rng.choice(WONDERS))
    lines.append(f"The first town was {towns[0].en} and the last was {towns[-1].en}.")
    return " ".join(lines)


def talk(rng: random.Random, world: World) -> str:
    """Two or three people who meet and tell each other about themselves in direct speech."""
    lines = [f"{rng.choice(OPENINGS)}, some people met in {rng.choice(world.towns).en}."]
    for person in rng.sample(world.people, rng.randint(2, 4)):
        job = world.of("works_as", person)
        says = rng.choice(
            (
                f"I live in {world.of('lives_in', person).en}",
                f"I work as {article(job.en)}",
                f"I was born in {world.of('born_in', person).en}",
                f"My best friend is {world.of('friend_of', person).en}",
                f"I keep {article(world.of('keeps', person).en)}",
            )
        )
        lines.append(
            rng.choice(
                (
                    f'"{says}," said {person.en}.',
                    f'{person.en} told the others: "{says}."',
                    f'"My name is {person.en}. {says}."',
                    f'{person.en} {rng.choice(("laughed", "smiled", "nodded"))}. "{says}," {pronouns(person)["he"]} said.',
                )
            )
        )
    return " ".join([*lines, rng.choice(ENDINGS)])


def mentions(rng: random.Random, world: World) -> str:
    """Sentences, and what they speak of: the colour, the person, the place, the thing, the number in each."""
    lines = []
    for _ in range(rng.randint(3, 5)):
        event = handing(rng, world)
        first = event.text
        n = rng.randint(2, 20)
        counted = f"{event.giver.en} saw {n} birds over {event.town.en}."
        lines.append(
            rng.choice(
                (
                    f"{first} The colour in this story is {event.color.en}.",
                    f"{first} The only colour here is {event.color.en}, the colour of the {event.noun.en}.",
                    f"{first} The place in this story is {event.town.en}.",
                    f"{first} The {event.noun.en} is {event.color.en}.",
                    f"{first} Three people are in it: {event.giver.en}, {event.taker.en} and {event.other.en}.",
                    f"{counted} The number in this sentence is {n}, and the place is {event.town.en}.",
                    f"{counted} It speaks of one person, {event.giver.en}.",
                )
            )
        )
    return rng.choice((" ", "\n")).join(lines)


def _scene(rng: random.Random, world: World) -> str:
    person, friend = rng.sample(world.people, 2)
    town = world.of("lives_in", person)
    verb = rng.choice(VERBS)
    return rng.choice(
        (
            f"{person.en} {verb.more[1]} in {town.en}, where {pronouns(person)['he']} lives.",
            f"{person.en} and {friend.en} {verb.more[1]} together.",
            f"{person.en} left {town.en} to visit {friend.en}.",
            f"{article(world.of('works_as', person).en)} called {person.en} {verb.more[1]} for a long time.",
        )
    )


def _looking_back(rng: random.Random, event: Handing) -> str:
    giver, taker, noun = event.giver.en, event.taker.en, event.noun.en
    return rng.choice(
        (
            f"So now {taker} has the {noun}.",
            f"The {noun} was now with {taker}, and {giver} had nothing.",
            f"It was {giver} who gave the {noun} away.",
            f"It was {taker} who got the {noun}.",
            f"All this happened in {event.town.en}.",
            f"Only {event.other.en} saw nothing of it.",
            f"The thing that {giver} gave away was {article(event.thing)}.",
            f"What {taker} got was {article(event.thing)}.",
            f"Everyone saw where it happened: in {event.town.en}.",
            f"Everyone saw who had the {noun} at the end: {taker}.",
        )
    )


def _background(rng: random.Random, world: World, person: Entity) -> str:
    he = pronouns(person)["He"]
    return rng.choice(
        (
            f"{person.en} is {article(world.of('works_as', person).en)}.",
            f"{he} lives in {world.of('lives_in', person).en}.",
            f"{person.en} was born in {world.of('born_in', person).en}.",
        )
    )
