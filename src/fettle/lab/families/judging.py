"""Never trained on: is it true, and what kind of word is this."""

from __future__ import annotations

import random

from ..prose.facts import claim, other
from ..world import World
from .family import Family, Maker, Slots


def _claim(*relations: str) -> Maker:
    """A statement of the graph, true or false with equal chance."""

    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        triples = [triple for triple in world.triples if triple.relation in relations]
        triple = rng.choice(triples)
        true = rng.random() < 0.5
        named = triple.object if true else other(rng, world, triple)
        return {"claim": claim(triple.relation, triple.subject, named)}, "yes" if true else "no"

    return make


def _sum(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    true = rng.random() < 0.5
    wrong = max(0, a + b + rng.choice((-3, -2, -1, 1, 2, 3)))
    shown = a + b if true or wrong == a + b else wrong
    return {"claim": f"{a} + {b} = {shown}"}, "yes" if shown == a + b else "no"


def _kind(*kinds: str) -> Maker:
    """A name of one of these kinds, each with equal chance."""

    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        groups = {
            "person": world.people,
            "place": world.towns,
            "object": world.objects,
            "food": world.foods,
            "animal": world.animals,
            "colour": world.colors,
            "job": world.jobs,
        }
        kind = rng.choice(kinds)
        return {"name": rng.choice(groups[kind]).en}, kind

    return make


def _language(rng: random.Random, world: World) -> tuple[Slots, str]:
    en, zh = rng.choice(world.glossary())
    chinese = rng.random() < 0.5
    return {"name": zh if chinese else en}, "Chinese" if chinese else "English"


TRUE = (
    "Is it true that {claim}? Answer yes or no.",
    "Yes or no: {claim}.",
    "Say yes or no: {claim}.",
    "Answer yes or no: is it true that {claim}?",
    "Decide with yes or no whether {claim}.",
    "Someone says that {claim}. Is this true? Answer yes or no.",
    "True, yes or no: {claim}.",
    "Reply with yes or no: is it right that {claim}?",
)


def _kinds(options: str) -> tuple[str, ...]:
    return (
        f"Is {{name}} {options}?",
        f"Classify {{name}}: {options}?",
        f"Decide whether {{name}} is {options}.",
        f"Say whether {{name}} is {options}.",
        f"What is {{name}}: {options}?",
        f"Choose for {{name}}: {options}.",
        f"Tell me if {{name}} is {options}.",
        f"The word {{name}}: is it {options}?",
    )


FAMILIES = (
    Family(
        "true_person",
        "verification",
        "en",
        TRUE,
        _claim("lives_in", "born_in", "works_as", "likes", "keeps", "friend_of"),
    ),
    Family("true_thing", "verification", "en", TRUE, _claim("owns", "color_of", "made_of")),
    Family("true_place", "verification", "en", TRUE, _claim("located_in")),
    Family("true_sum", "verification", "en", TRUE, _sum),
    Family(
        "kind_of_name", "classification", "en", _kinds("person, place or object"), _kind("person", "place", "object")
    ),
    Family("kind_of_word", "classification", "en", _kinds("food or animal"), _kind("food", "animal")),
    Family("kind_of_noun", "classification", "en", _kinds("colour, job or food"), _kind("colour", "job", "food")),
    Family("language", "classification", "en", _kinds("English or Chinese"), _language),
)
