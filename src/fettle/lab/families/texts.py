"""Stories read and asked about; and, never trained on, words to be found in a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..lexicon import ANIMALS
from ..prose.stories import Handing, handing
from ..world import World
from .family import Family, Maker, Slots


def _story(answer: Callable[[Handing], str]) -> Maker:
    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        event = handing(rng, world)
        return {"text": event.text, "noun": event.noun.en}, answer(event)

    return make


def _mentioned(kind: str) -> Maker:
    """A sentence with one person, one town, one colour, one thing and one number; the answer is the one of `kind`."""

    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        person, town, color = rng.choice(world.people).en, rng.choice(world.towns).en, rng.choice(world.colors).en
        thing, animal, n = rng.choice(world.objects).en, rng.choice(ANIMALS), rng.randint(2, 20)
        text = rng.choice(
            (
                f"{person} bought a {color} {thing} in {town} for {n} coins.",
                f"In {town}, {person} saw {n} {animal.more[0]} near a {color} {thing}.",
                f"{person} waited {n} days in {town} for a {color} {thing}.",
                f"With a {color} {thing}, {person} walked {n} miles to {town}.",
            )
        )
        return {"text": text}, {"person": person, "place": town, "colour": color, "number": str(n)}[kind]

    return make


def _phrasings(kind: str, word: str) -> tuple[str, ...]:
    return (
        f"Find the {kind} in the sentence: {{text}}",
        f"Which {kind} is in this sentence? {{text}}",
        f"{{text}} Name the {kind} in this sentence.",
        f"Give only the {kind}: {{text}}",
        f"Read the sentence and write the {kind}. {{text}}",
        f"{{text}} {word} is in the sentence?",
        f"Take the {kind} from this sentence: {{text}}",
        f'What is the {kind} in the sentence "{{text}}"?',
    )


FAMILIES = (
    Family(
        "who_has",
        "stories",
        "en",
        (
            "{text} Who has the {noun} now?",
            "Read the story. {text} Who has the {noun} at the end?",
            "Who has the {noun} now? {text}",
            "{text} Name the person who got the {noun}.",
            "{text} Who got the {noun}?",
            "Say who has the {noun} after this: {text}",
            "{text} Tell me with whom the {noun} is now.",
            "Story: {text} Which person has the {noun} at the end?",
        ),
        _story(lambda event: event.taker.en),
    ),
    Family(
        "who_gave",
        "stories",
        "en",
        (
            "{text} Who gave the {noun} away?",
            "Read the story. {text} Who gave away the {noun}?",
            "Who gave the {noun} away? {text}",
            "{text} Name the person who gave the {noun} away.",
            "{text} Who had the {noun} first?",
            "Say who gave the {noun} away: {text}",
            "{text} Tell me from whom the {noun} came.",
            "Story: {text} Which person had the {noun} at the start?",
        ),
        _story(lambda event: event.giver.en),
    ),
    Family(
        "where",
        "stories",
        "en",
        (
            "{text} Where did the {noun} change hands?",
            "Read the story. {text} Where did it happen?",
            "Where did this happen? {text}",
            "{text} In which town was the {noun}?",
            "{text} Tell me the town of this story.",
            "Say where it happened: {text}",
            "{text} Which town is it about?",
            "Story: {text} Where was all this?",
        ),
        _story(lambda event: event.town.en),
    ),
    Family(
        "what_thing",
        "stories",
        "en",
        (
            "{text} What was given away?",
            "Read the story. {text} What did someone give away?",
            "What was given away here? {text}",
            "{text} Which thing changed hands?",
            "{text} Tell me what was given.",
            "Say what was given away: {text}",
            "{text} What was the gift?",
            "Story: {text} Which thing was given?",
        ),
        _story(lambda event: event.thing),
    ),
    Family(
        "not_there",
        "stories",
        "en",
        (
            "{text} Who saw nothing of the {noun}?",
            "Read the story. {text} Who had nothing to do with the {noun}?",
            "Who never had the {noun}? {text}",
            "{text} Name the person who never had the {noun}.",
            "{text} Who did something else?",
            "Say who never had the {noun}: {text}",
            "{text} Which person was not with the others?",
            "Story: {text} Who is the one without any part in it?",
        ),
        _story(lambda event: event.other.en),
    ),
    Family("find_color", "extraction", "en", _phrasings("colour", "Which colour"), _mentioned("colour")),
    Family("find_person", "extraction", "en", _phrasings("person", "Which person"), _mentioned("person")),
    Family("find_place", "extraction", "en", _phrasings("town", "Which town"), _mentioned("place")),
    Family("find_number", "extraction", "en", _phrasings("number", "Which number"), _mentioned("number")),
)
