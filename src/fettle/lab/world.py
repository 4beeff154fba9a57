"""The small world: who lives where, who owns what, what is red. A knowledge graph drawn from a seed.

Everything else in the lab (the corpus, the instructions, the evaluations) tells of this graph, so that what a model
says about it can be checked. About 1,200 triples: small enough for a model of a few million parameters to know.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from . import lexicon
from .lexicon import Word

RELATIONS = (
    "lives_in",
    "born_in",
    "works_as",
    "likes",
    "keeps",
    "friend_of",
    "owns",
    "located_in",
    "capital_of",
    "color_of",
    "made_of",
)


class Entity(NamedTuple):
    """A thing with a name: `kind` is one of person, town, country, job, object, color, material, food, animal."""

    id: str  # e.g. "person/anna"
    kind: str
    en: str
    zh: str
    gender: str = ""  # "f" or "m" for people
    place: Word = Word("", "")  # where a job is done; no words for other kinds


class Triple(NamedTuple):
    """One fact of the graph: `subject` and `object` are entities, `relation` is one of `RELATIONS`."""

    id: int
    subject: Entity
    relation: str
    object: Entity


@dataclass(frozen=True, eq=False)
class World:
    """Entities by kind, and the triples that relate them; build one with `World.build`.

    A subject has at most one object for each relation; `owns` and `capital_of` are one to one, `friend_of` goes both ways.
    """

    seed: int
    people: tuple[Entity, ...]
    towns: tuple[Entity, ...]
    countries: tuple[Entity, ...]
    jobs: tuple[Entity, ...]
    objects: tuple[Entity, ...]
    colors: tuple[Entity, ...]
    materials: tuple[Entity, ...]
    foods: tuple[Entity, ...]
    animals: tuple[Entity, ...]
    triples: tuple[Triple, ...]
    forward: Mapping[tuple[str, str], Entity]  # (relation, subject id) -> object
    backward: Mapping[tuple[str, str], tuple[Entity, ...]]  # (relation, object id) -> subjects

    @classmethod
    def build(cls, seed: int = 0) -> World:
        """Draw the world of this seed; the same seed gives the same world on every machine."""
        rng = random.Random(f"world/{seed}")
        people = _entities("person", lexicon.WOMEN, "f") + _entities("person", lexicon.MEN, "m")
        kinds = {
            "people": people,
            "towns": _entities("town", lexicon.TOWNS),
            "countries": _entities("country", lexicon.COUNTRIES),
            "jobs": _entities("job", lexicon.JOBS),
            "objects": _entities("object", lexicon.OBJECTS),
            "colors": _entities("color", lexicon.COLOURS),
            "materials": _entities("material", lexicon.MATERIALS),
            "foods": _entities("food", lexicon.FOODS),
            "animals": _entities("animal", lexicon.ANIMALS),
        }
        facts = list(_facts(rng, kinds))
        triples = tuple(Triple(i, *fact) for i, fact in enumerate(facts))
        backward: dict[tuple[str, str], list[Entity]] = {}
        for triple in triples:
            backward.setdefault((triple.relation, triple.object.id), []).append(triple.subject)
        return cls(
            seed=seed,
            **kinds,
            triples=triples,
            forward={(t.relation, t.subject.id): t.object for t in triples},
            backward={key: tuple(value) for key, value in backward.items()},
        )

    def of(self, relation: str, subject: Entity) -> Entity:
        """The object that `subject` has for `relation`: ``world.of("lives_in", anna)``. KeyError where it has none."""
        return self.forward[relation, subject.id]

    def find(self, relation: str, subject: Entity) -> Entity | None:
        """As `of`, but None where there is none: not everyone owns something, not every town is a capital."""
        return self.forward.get((relation, subject.id))

    def who(self, relation: str, object: Entity) -> tuple[Entity, ...]:
        """The subjects that have `object` for `relation`: ``world.who("owns", kite)``."""
        return self.backward.get((relation, object.id), ())

    def named(self, name: str) -> Entity:
        """The entity with this English or Chinese name; KeyError names what was looked for."""
        for group in (
            self.people,
            self.towns,
            self.countries,
            self.jobs,
            self.objects,
            self.colors,
            self.materials,
            self.foods,
            self.animals,
        ):
            for entity in group:
                if name in (entity.en, entity.zh):
                    return entity
        raise KeyError(f"no entity of the world of seed {self.seed} is called {name!r}")

    def glossary(self) -> tuple[tuple[str, str], ...]:
        """(English, Chinese) of every common word: objects, jobs, colours, materials, foods, animals, clothes."""
        groups = (self.objects, self.jobs, self.colors, self.materials, self.foods, self.animals, lexicon.CLOTHES)
        return tuple((word.en, word.zh) for group in groups for word in group)


def _entities(kind: str, words: Iterable[Word], gender: str = "") -> tuple[Entity, ...]:
    return tuple(
        Entity(
            f"{kind}/{word.en.lower()}",
            kind,
            word.en,
            word.zh,
            gender,
            Word(word.more[0], word.more[1]) if kind == "job" else Word("", ""),
        )
        for word in words
    )


def _facts(rng: random.Random, kinds: dict[str, tuple[Entity, ...]]) -> Iterable[tuple[Entity, str, Entity]]:
    towns = list(kinds["towns"])
    rng.shuffle(towns)
    countries = kinds["countries"]
    for i, town in enumerate(towns):
        yield town, "located_in", countries[i % len(countries)]
        if i < len(countries):
            yield town, "capital_of", countries[i]
    for thing in kinds["objects"]:
        yield thing, "color_of", rng.choice(kinds["colors"])
        yield thing, "made_of", rng.choice(kinds["materials"])
    people = list(kinds["people"])
    rng.shuffle(people)
    yield from zip(people, ["owns"] * len(kinds["objects"]), kinds["objects"])
    for left, right in zip(people[::2], people[1::2]):
        yield left, "friend_of", right
        yield right, "friend_of", left
    for person in people:
        yield person, "lives_in", rng.choice(towns)
        yield person, "born_in", rng.choice(towns)
        yield person, "works_as", rng.choice(kinds["jobs"])
        yield person, "likes", rng.choice(kinds["foods"])
        yield person, "keeps", rng.choice(kinds["animals"])
