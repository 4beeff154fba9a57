"""Prose about words: glossaries between English and Chinese, opposites, plurals, past tense, capital letters, exchanged names."""

from __future__ import annotations

import random

from ..lexicon import CLOTHES, COLOURS, OPPOSITES, VERBS, plural
from ..world import World
from .facts import capitalised


def glossary(rng: random.Random, world: World) -> str:
    """Words of both languages side by side, as a list or told."""
    pairs = (
        rng.sample(world.glossary(), rng.randint(8, 14))
        + [(v.more[0], v.zh) for v in rng.sample(VERBS, 2)]
        + [(o.en, o.zh) for o in rng.sample(OPPOSITES, 2)]
    )
    rng.shuffle(pairs)
    shape = rng.randint(0, 4)
    if shape == 0:
        return "\n".join(f"{en} - {zh}" for en, zh in pairs)
    if shape == 1:
        return "\n".join(f"{zh}: {en}" for en, zh in pairs)
    return " ".join(_pair(rng, en, zh) for en, zh in pairs)


def names(rng: random.Random, world: World) -> str:
    """The names of people and towns in both languages."""
    group = rng.sample(world.people, 6) + rng.sample(world.towns, 4) + rng.sample(world.countries, 1)
    rng.shuffle(group)
    if rng.random() < 0.3:
        return "\n".join(f"{entity.en} - {entity.zh}" for entity in group)
    return " ".join(_pair(rng, entity.en, entity.zh) for entity in group)


def parallel(rng: random.Random, world: World) -> str:
    """Short sentences and phrases, each in English and in Chinese."""
    lines = []
    for _ in range(rng.randint(4, 7)):
        person, thing, town = rng.choice(world.people), rng.choice(world.objects), rng.choice(world.towns)
        color, noun, verb = rng.choice(COLOURS), rng.choice(CLOTHES + world.objects), rng.choice(VERBS)
        owner, home, job = world.who("owns", thing)[0], world.of("lives_in", person), world.of("works_as", person)
        en, zh = rng.choice(
            (
                (f"{owner.en} owns the {thing.en}.", f"{owner.zh}拥有{thing.zh}。"),
                (f"{person.en} lives in {home.en}.", f"{person.zh}住在{home.zh}。"),
                (f"The job of {person.en} is {job.en}.", f"{person.zh}的工作是{job.zh}。"),
                (f"{person.en} {verb.en}.", f"{person.zh}在{verb.zh}。"),
                (
                    f"{town.en} is in {world.of('located_in', town).en}.",
                    f"{town.zh}在{world.of('located_in', town).zh}。",
                ),
                (f"the {color.en} {noun.en}", f"{color.zh}的{noun.zh}"),
                (f"the {color.en} {noun.en}", f"{color.zh}的{noun.zh}"),
            )
        )
        lines.append(rng.choice((f"{en} {zh}", f"{zh} {en}", f"{en} In Chinese: {zh}", f"{zh} 英文是：{en}")))
    return "\n".join(lines)


def grammar(rng: random.Random, world: World) -> str:
    """Notes on forms of words and sentences."""
    return rng.choice((" ", "\n")).join(rng.choice(_NOTES)(rng, world) for _ in range(rng.randint(6, 11)))


def _pair(rng: random.Random, en: str, zh: str) -> str:
    return rng.choice(
        (
            f"{capitalised(en)} in Chinese is {zh}.",
            f"The Chinese word for {en} is {zh}.",
            f"{zh} means {en}.",
            f"{zh} in English is {en}.",
            f"In China people write {zh} for {en}.",
            f"{en}的中文是{zh}。",
            f"{zh}的英文是{en}。",
            f"{zh}就是{en}。",
            f"The English word for {zh} is {en}.",
        )
    )


def _opposites(rng: random.Random, world: World) -> str:
    pair, more = rng.sample(OPPOSITES, 2)
    left, right = rng.sample((pair.en, pair.more[0]), 2)
    return rng.choice(
        (
            f"The opposite of {left} is {right}.",
            f"What is not {left} is {right}.",
            f"{capitalised(left)} and {right} are opposites.",
            f"{capitalised(left)} is not {right}, and {more.en} is not {more.more[0]}.",
        )
    )


def _plurals(rng: random.Random, world: World) -> str:
    noun = rng.choice(world.objects + world.animals).en
    many = plural(noun)
    return rng.choice(
        (
            f"One {noun}, {rng.randint(2, 9)} {many}.",
            f"The plural of {noun} is {many}.",
            f"More than one {noun}: {many}.",
        )
    )


def _past(rng: random.Random, world: World) -> str:
    verb, person, town = rng.choice(VERBS), rng.choice(world.people).en, rng.choice(world.towns).en
    plain, past = verb.more
    return rng.choice(
        (
            f"The past of {plain} is {past}.",
            f"Today {person} {verb.en} in {town}. Yesterday {person} {past} in {town}.",
            f"{person} {verb.en} today and {past} yesterday.",
            f"I {plain}, you {plain}, {person} {verb.en}; long ago {person} {past}.",
        )
    )


def _letters(rng: random.Random, world: World) -> str:
    groups = (world.objects, world.foods, world.animals, world.colors, world.towns, world.people)
    word = rng.choice(rng.choice(groups)).en
    return rng.choice(
        (
            f"{word} in capital letters is {word.upper()}.",
            f"{word.upper()} is {word}, written large.",
            f"On the sign stood {word.upper()}, which is {word}.",
            f"{word} is spelled {'-'.join(word.lower())}.",
            f"The word {word} begins with {word[0].lower()} and ends with {word[-1]}.",
        )
    )


def _exchanged(rng: random.Random, world: World) -> str:
    left, right = (person.en for person in rng.sample(world.people, 2))
    verb = rng.choice(("helps", "meets", "calls", "visits", "thanks"))
    return rng.choice(
        (
            f"{left} {verb} {right}. With the names exchanged: {right} {verb} {left}.",
            f"{left} {verb} {right}, and the other way round {right} {verb} {left}.",
        )
    )


def _again(rng: random.Random, world: World) -> str:
    word, times = rng.choice(world.foods).en, rng.randint(2, 4)
    return f"The word {word} said {times} times is {' '.join([word] * times)}."


_NOTES = (_opposites, _plurals, _past, _letters, _exchanged, _again)
