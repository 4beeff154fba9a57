"""Days at school, told: what the teacher set, what the pupils wrote, what stood in the exercise book, what was copied out.

These pages teach the words of tasks (sort, translate, compare, find, decide), and to repeat exactly what stands before,
inside ordinary texts. Nothing here is a conversation, and nobody answers the reader.
"""

from __future__ import annotations

import random

from ..lexicon import OPPOSITES, VERBS
from ..world import Entity, World
from . import reviews
from .facts import capitalised, claim, other
from .lists import joined, words
from .stories import handing

TOLD = (
    "{p} had to {t} and wrote: {a}.",
    "{p} was told to {t}, and the answer was {a}.",
    "The teacher wanted {p} to {t}. {p} gave the short answer {a}.",
    "When it was time to {t}, {p} said {a}.",
    "To {t} was easy for {p}, who wrote {a}.",
    "{p} was asked to {t}; the right reply is {a}.",
)
TOLD_ZH = (
    "老师让{p}{t}，{p}写的是{a}。",
    "{p}要{t}，答案是{a}。",
    "{p}学会了{t}，写下{a}。",
    "轮到{p}{t}，{p}说是{a}。",
)


def lesson(rng: random.Random, world: World) -> str:
    """A school day of several pupils, each with another task."""
    tasks = (_word_task, _number_task, _list_task, _list_task, _sentence_task, _fact_task, _choice_task)
    lines = [f"The lesson in {rng.choice(world.towns).en} began {rng.choice(('early', 'late', 'well', 'on time'))}."]
    for _ in range(rng.randint(4, 8)):
        task, answer = rng.choice(tasks)(rng, world)
        lines.append(rng.choice(TOLD).format(p=rng.choice(world.people).en, t=task, a=answer))
    return rng.choice((" ", "\n")).join(lines)


EXERCISES = ("Exercise", "Task", "Problem", "On the board", "Homework")
SOLUTIONS = ("Solution", "Solved", "Result", "In the book", "The pupil wrote")


def workbook(rng: random.Random, world: World) -> str:
    """Pages of an exercise book: a numbered list of tasks, each with its solution in short."""
    tasks = (_word_task, _number_task, _list_task, _list_task, _sentence_task, _fact_task, _choice_task)
    head, tail = rng.choice(EXERCISES), rng.choice(SOLUTIONS)
    lines = []
    for number in range(1, rng.randint(3, 7)):
        task, answer = rng.choice(tasks)(rng, world)
        lines.append(f"{head} {number}: {capitalised(task)}. {tail}: {answer}")
    return "\n".join(lines)


def dictation(rng: random.Random, world: World) -> str:
    """Words, names, numbers or a sentence read aloud, and copied exactly by one pupil after another."""
    teacher, *pupils = (person.en for person in rng.sample(world.people, rng.randint(3, 5)))
    lines = []
    for pupil in pupils:
        text = rng.choice((_row_of_words, _row_of_words, _row_of_names, _row_of_digits, _told_sentence))(rng, world)
        lines.append(
            rng.choice(
                (
                    f"{teacher} read: {text}. {pupil} wrote: {text}.",
                    f'"{text}", said {teacher}. "{text}", said {pupil}.',
                    f"On the board stood {text}. {pupil} copied it: {text}.",
                    f"{teacher} began with {text}, and {pupil} repeated {text}.",
                )
            )
        )
    return " ".join(lines)


def dictation_zh(rng: random.Random, world: World) -> str:
    """The same in Chinese."""
    teacher, *pupils = (person.zh for person in rng.sample(world.people, rng.randint(3, 5)))
    groups = (world.foods, world.animals, world.objects, world.people, world.towns)
    lines = []
    for pupil in pupils:
        text = "、".join(word.zh for word in rng.sample(rng.choice(groups), rng.randint(2, 6)))
        lines.append(
            rng.choice(
                (
                    f"{teacher}读：{text}。{pupil}写：{text}。",
                    f"{teacher}说“{text}”，{pupil}也说“{text}”。",
                    f"黑板上写着{text}，{pupil}抄下{text}。",
                )
            )
        )
    return "".join(lines)


def _row_of_words(rng: random.Random, world: World) -> str:
    group = world.foods + world.animals + world.objects + world.colors + world.jobs
    return ", ".join(word.en for word in rng.sample(group, rng.randint(2, 7)))


def _row_of_names(rng: random.Random, world: World) -> str:
    return ", ".join(word.en for word in rng.sample(world.people + world.towns, rng.randint(2, 6)))


def _row_of_digits(rng: random.Random, world: World) -> str:
    return " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(3, 8)))


def _told_sentence(rng: random.Random, world: World) -> str:
    return rng.choice((handing(rng, world).text, reviews.opinion(rng, world, rng.random() < 0.5))).rstrip(".")


def lesson_zh(rng: random.Random, world: World) -> str:
    """The same in Chinese."""
    lines = []
    for _ in range(rng.randint(4, 7)):
        word = rng.choice(world.glossary())
        a, b = rng.randint(0, 30), rng.randint(0, 30)
        person, thing = rng.choice(world.people), rng.choice(world.objects)
        items = [w.zh for w in rng.sample(rng.choice((world.foods, world.animals, world.colors)), rng.randint(3, 5))]
        task, answer = rng.choice(
            (
                (f"把{word[0]}翻译成中文", word[1]),
                (f"把{word[1]}翻译成英文", word[0]),
                (f"计算{a}加{b}", str(a + b)),
                (f"找出{a}和{b + 31}中更大的数", str(b + 31)),
                (f"数一数{'、'.join(items)}有几个词", str(len(items))),
                (f"说出{'、'.join(items)}的第一个词", items[0]),
                (f"说出{'、'.join(items)}的最后一个词", items[-1]),
                (f"回答{person.zh}住在哪里", world.of("lives_in", person).zh),
                (f"回答{thing.zh}的颜色", world.of("color_of", thing).zh),
                (f"回答{thing.zh}是谁的", world.who("owns", thing)[0].zh),
            )
        )
        lines.append(rng.choice(TOLD_ZH).format(p=rng.choice(world.people).zh, t=task, a=answer))
    return "".join(lines)


def _word_task(rng: random.Random, world: World) -> tuple[str, str]:
    en, zh = rng.choice(world.glossary())
    pair, verb = rng.choice(OPPOSITES), rng.choice(VERBS)
    return rng.choice(
        (
            (f"translate the word {en} into Chinese", zh),
            (f"translate {zh} into English", en),
            (f"name the opposite of {pair.en}", pair.more[0]),
            (f"write {en} in capital letters", en.upper()),
            (f"put the verb {verb.more[0]} into the past", verb.more[1]),
        )
    )


def _number_task(rng: random.Random, world: World) -> tuple[str, str]:
    a, b = rng.sample(range(60), 2)
    return rng.choice(
        (
            (f"add {a} and {b}", str(a + b)),
            (f"subtract {min(a, b)} from {max(a, b)}", str(abs(a - b))),
            (f"double the number {a}", str(2 * a)),
            (f"choose the larger number of {a} and {b}", str(max(a, b))),
            (f"choose the smaller number of {a} and {b}", str(min(a, b))),
            (f"decide whether {a} is odd or even", "odd" if a % 2 else "even"),
            (f"say with yes or no whether {a} is greater than {b}", "yes" if a > b else "no"),
        )
    )


def _list_task(rng: random.Random, world: World) -> tuple[str, str]:
    items = words(rng, world)
    text = ", ".join(items)
    return rng.choice(
        (
            (f"sort the words {joined(items)}", ", ".join(sorted(items))),
            (f"put the list {text} in alphabetical order", ", ".join(sorted(items))),
            (f"reverse the list {text}", ", ".join(items[::-1])),
            (f"count the words in {text}", str(len(items))),
            (f"give the first word of {text}", items[0]),
            (f"give the last word of {text}", items[-1]),
            (
                f"find the word in {text} that starts with {items[1][0].lower()}",
                next(i for i in items if i[0].lower() == items[1][0].lower()),
            ),
        )
    )


def _sentence_task(rng: random.Random, world: World) -> tuple[str, str]:
    event = handing(rng, world)
    good = rng.random() < 0.5
    return rng.choice(
        (
            (f'find the colour in the text "{event.text}"', event.color.en),
            (f'find the place in the text "{event.text}"', event.town.en),
            (f'say from the text "{event.text}" who has the {event.noun.en} now', event.taker.en),
            (f'say who gave the {event.noun.en} away in "{event.text}"', event.giver.en),
            (
                f'decide whether the review "{reviews.opinion(rng, world, good)}" is positive or negative',
                "positive" if good else "negative",
            ),
        )
    )


def _fact_task(rng: random.Random, world: World) -> tuple[str, str]:
    triple = rng.choice(world.triples)
    true = rng.random() < 0.5
    named = triple.object if true else other(rng, world, triple)
    told = claim(triple.relation, triple.subject, named)
    person, thing = rng.choice(world.people), rng.choice(world.objects)
    return rng.choice(
        (
            (f"say whether it is true that {told}", "yes" if true else "no"),
            (f"tell where {person.en} lives", world.of("lives_in", person).en),
            (f"tell what the job of {person.en} is", world.of("works_as", person).en),
            (f"name the owner of the {thing.en}", world.who("owns", thing)[0].en),
            (f"name the colour of the {thing.en}", world.of("color_of", thing).en),
        )
    )


def _choice_task(rng: random.Random, world: World) -> tuple[str, str]:
    groups: tuple[tuple[str, tuple[Entity, ...]], ...] = (
        ("person", world.people),
        ("place", world.towns),
        ("object", world.objects),
        ("food", world.foods),
        ("animal", world.animals),
        ("colour", world.colors),
        ("job", world.jobs),
    )
    kind, group = rng.choice(groups)
    options = rng.sample(
        [k for k in ("person", "place", "object", "food", "animal", "colour", "job") if k != kind], 2
    ) + [kind]
    rng.shuffle(options)
    name = rng.choice(group).en
    return f"classify {name} as {options[0]}, {options[1]} or {options[2]}", kind
