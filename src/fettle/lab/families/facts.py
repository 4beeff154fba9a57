"""Facts of the graph, asked forward and backward. Answers are whole sentences, as the corpus says them."""

from __future__ import annotations

import random

from ..lexicon import article, liked
from ..world import Entity, World
from .family import Family, Maker, Slots


def _asking(group: str, relation: str, answer: str) -> Maker:
    """Items about one entity of `group`; `answer` is a sentence with {s}, {o}, {ao} and {ol}."""

    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        subject: Entity = rng.choice(getattr(world, group))
        object = world.of(relation, subject)
        text = answer.format(s=subject.en, o=object.en, ao=article(object.en), ol=liked(object.en))
        return {"s": subject.en}, text

    return make


def _owner(rng: random.Random, world: World) -> tuple[Slots, str]:
    thing = rng.choice(world.objects)
    return {"s": thing.en}, f"{world.who('owns', thing)[0].en} owns the {thing.en}."


def _capital(rng: random.Random, world: World) -> tuple[Slots, str]:
    country = rng.choice(world.countries)
    return {"s": country.en}, f"The capital of {country.en} is {world.who('capital_of', country)[0].en}."


FAMILIES = (
    Family(
        "lives_in",
        "facts",
        "en",
        (
            "Where does {s} live?",
            "In which town does {s} live?",
            "Tell me where {s} lives.",
            "Name the town where {s} lives.",
            "What is the home town of {s}?",
            "I want to visit {s}. Where is the house?",
            "Which town is the home of {s}?",
            "Say where {s} has a house.",
        ),
        _asking("people", "lives_in", "{s} lives in {o}."),
    ),
    Family(
        "born_in",
        "facts",
        "en",
        (
            "Where was {s} born?",
            "In which town was {s} born?",
            "Tell me where {s} was born.",
            "Name the birthplace of {s}.",
            "What is the birthplace of {s}?",
            "Say where {s} came into the world.",
            "Which town saw the birth of {s}?",
            "Give the town where {s} was born.",
        ),
        _asking("people", "born_in", "{s} was born in {o}."),
    ),
    Family(
        "works_as",
        "facts",
        "en",
        (
            "What is the job of {s}?",
            "What does {s} do for work?",
            "Tell me the job of {s}.",
            "What work does {s} do?",
            "Say what {s} works as.",
            "How does {s} earn a living?",
            "Name the trade of {s}.",
            "Which job does {s} have?",
        ),
        _asking("people", "works_as", "{s} works as {ao}."),
    ),
    Family(
        "likes",
        "facts",
        "en",
        (
            "What does {s} like to eat or drink?",
            "What is the favourite food of {s}?",
            "Tell me what {s} likes.",
            "Which food does {s} love?",
            "Name the favourite food of {s}.",
            "I will cook for {s}. What does {s} like?",
            "Say which food {s} likes most.",
            "What food makes {s} happy?",
        ),
        _asking("people", "likes", "{s} likes {ol}."),
    ),
    Family(
        "keeps",
        "facts",
        "en",
        (
            "Which animal does {s} keep?",
            "What animal does {s} have at home?",
            "Tell me which animal {s} keeps.",
            "Name the animal of {s}.",
            "What animal lives with {s}?",
            "Say what animal {s} looks after.",
            "Which animal follows {s} everywhere?",
            "What kind of animal is at the home of {s}?",
        ),
        _asking("people", "keeps", "{s} keeps {ao}."),
    ),
    Family(
        "friend_of",
        "facts",
        "en",
        (
            "Who is the best friend of {s}?",
            "Who is a friend of {s}?",
            "Tell me who the friend of {s} is.",
            "Name the best friend of {s}.",
            "Whom does {s} trust?",
            "Say who is friends with {s}.",
            "Which person is the friend of {s}?",
            "Give the name of the friend of {s}.",
        ),
        _asking("people", "friend_of", "The best friend of {s} is {o}."),
    ),
    Family(
        "owner_of",
        "facts",
        "en",
        (
            "Who owns the {s}?",
            "Who is the owner of the {s}?",
            "Tell me who owns the {s}.",
            "To whom does the {s} belong?",
            "Name the owner of the {s}.",
            "Whose is the {s}?",
            "Say which person owns the {s}.",
            "Who has the {s} at home?",
        ),
        _owner,
    ),
    Family(
        "color_of",
        "facts",
        "en",
        (
            "What colour is the {s}?",
            "Which colour does the {s} have?",
            "Tell me the colour of the {s}.",
            "Name the colour of the {s}.",
            "What is the colour of the {s}?",
            "Say what colour the {s} is.",
            "The {s} has a colour. Which one?",
            "How is the {s} painted?",
        ),
        _asking("objects", "color_of", "The {s} is {o}."),
    ),
    Family(
        "made_of",
        "facts",
        "en",
        (
            "What is the {s} made of?",
            "Of which material is the {s}?",
            "Tell me what the {s} is made of.",
            "Name the material of the {s}.",
            "What is the material of the {s}?",
            "Say what the {s} is made of.",
            "Out of what did someone make the {s}?",
            "Which material is in the {s}?",
        ),
        _asking("objects", "made_of", "The {s} is made of {o}."),
    ),
    Family(
        "located_in",
        "facts",
        "en",
        (
            "In which country is {s}?",
            "Where is the town of {s}?",
            "Tell me the country of {s}.",
            "Name the country where {s} lies.",
            "Which country does {s} belong to?",
            "Say in which country {s} is.",
            "What is the country around {s}?",
            "{s} is a town of which country?",
        ),
        _asking("towns", "located_in", "{s} is a town in {o}."),
    ),
    Family(
        "capital_of",
        "facts",
        "en",
        (
            "What is the capital of {s}?",
            "Which town is the capital of {s}?",
            "Tell me the capital of {s}.",
            "Name the capital of {s}.",
            "Where does the king of {s} live?",
            "Say which town is the capital of {s}.",
            "{s} has a capital. Which town is it?",
            "Give the name of the capital city of {s}.",
        ),
        _capital,
    ),
)
