"""Reviews, in English and in Chinese: what someone thought of a thing, a meal or a visit, and whether that was good or bad.

`opinion` and `opinion_zh` give the bare text and its sign; the instruction tasks about sentiment use them too.
"""

from __future__ import annotations

import random

from ..lexicon import article
from ..world import World

GOOD = (
    "I love it",
    "it works very well",
    "it makes me happy",
    "I would buy it again",
    "it is the best I ever had",
    "it is beautiful",
    "my friends like it too",
    "it was worth the price",
    "I use it every day with joy",
    "it is strong and clean",
    "everything about it is right",
    "I smile when I see it",
)
BAD = (
    "I hate it",
    "it broke after one day",
    "it makes me angry",
    "I want my money back",
    "it is the worst I ever had",
    "it is ugly",
    "nobody should buy it",
    "it was a waste of money",
    "I threw it away",
    "it is weak and dirty",
    "everything about it is wrong",
    "I am very disappointed",
)
GOOD_FOOD = (
    "it tasted wonderful",
    "it was fresh and sweet",
    "I ate all of it and wanted more",
    "the smell was lovely",
    "it was the best meal of the week",
)
BAD_FOOD = (
    "it tasted terrible",
    "it was old and bitter",
    "I could not eat it",
    "the smell was awful",
    "it was the worst meal of the week",
)
GOOD_VISIT = (
    "the people were kind",
    "we had a lovely time",
    "the streets were clean",
    "I want to go back soon",
    "the food was excellent",
)
BAD_VISIT = (
    "the people were rude",
    "we had a horrible time",
    "the streets were dirty",
    "I never want to go back",
    "the food was awful",
)

GOOD_ZH = (
    "我非常喜欢",
    "很好用",
    "让我很开心",
    "我还会再买",
    "质量很好",
    "非常漂亮",
    "朋友们也喜欢",
    "很值得",
    "我每天都用",
)
BAD_ZH = (
    "我很讨厌",
    "一天就坏了",
    "让我很生气",
    "我想退钱",
    "质量很差",
    "非常难看",
    "大家不要买",
    "浪费钱",
    "我把它扔了",
)

VERDICTS = {
    True: (
        "It was a good review.",
        "The review was positive.",
        "Clearly a happy customer.",
        "The writer was happy.",
        "So the opinion of {p} is positive.",
        "A positive word from {p}.",
    ),
    False: (
        "It was a bad review.",
        "The review was negative.",
        "Clearly an unhappy customer.",
        "The writer was not happy.",
        "So the opinion of {p} is negative.",
        "A negative word from {p}.",
    ),
}


def opinion(rng: random.Random, world: World, good: bool) -> str:
    """One review of one to three sentences, plainly good or plainly bad."""
    kind = rng.random()
    if kind < 0.5:
        thing = rng.choice(world.objects).en
        first = rng.choice(
            (
                f"I bought {article(thing)} last week",
                f"This is my new {thing}",
                f"My {thing} came yesterday",
                f"About the {thing}",
            )
        )
        said = list(GOOD if good else BAD)
    elif kind < 0.75:
        food = rng.choice(world.foods).en
        first = rng.choice((f"I tried the {food} at the market", f"We had the {food} for lunch", f"About the {food}"))
        said = list(GOOD_FOOD if good else BAD_FOOD)
    else:
        town = rng.choice(world.towns).en
        first = rng.choice((f"We spent a week in {town}", f"I visited {town} in spring", f"About our trip to {town}"))
        said = list(GOOD_VISIT if good else BAD_VISIT)
    parts = rng.sample(said, rng.randint(1, 2))
    return rng.choice(
        (f"{first}: {' and '.join(parts)}.", f"{first}. {'. '.join(p[0].upper() + p[1:] for p in parts)}.")
    )


def opinion_zh(rng: random.Random, world: World, good: bool) -> str:
    """One Chinese review, plainly good or plainly bad."""
    thing = rng.choice(world.objects).zh
    parts = rng.sample(GOOD_ZH if good else BAD_ZH, rng.randint(1, 2))
    return rng.choice((f"我买了{thing}，", f"这个{thing}，", f"昨天收到了{thing}，")) + "，".join(parts) + "。"


def reviews(rng: random.Random, world: World) -> str:
    """A page of reviews with the names of their writers and, often, a verdict."""
    lines = []
    for _ in range(rng.randint(3, 5)):
        good = rng.random() < 0.5
        person = rng.choice(world.people).en
        text = opinion(rng, world, good)
        lines.append(
            rng.choice(
                (
                    f'{person} wrote: "{text}"',
                    f'{person} says: "{text}"',
                    f"{text} ({person})",
                    f"Review by {person}. {text}",
                    text,
                )
            )
        )
        if rng.random() < 0.6:
            lines[-1] += " " + rng.choice(VERDICTS[good]).format(p=person)
    return rng.choice(("\n", "\n\n")).join(lines)


def reviews_zh(rng: random.Random, world: World) -> str:
    """The same in Chinese."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        good = rng.random() < 0.5
        person = rng.choice(world.people)
        ta = "她" if person.gender == "f" else "他"
        line = f"{person.zh}说：“{opinion_zh(rng, world, good)}”"
        if rng.random() < 0.6:
            line += rng.choice(
                ("这是好评。", "这个评价是正面的。", f"{ta}很满意。")
                if good
                else ("这是差评。", "这个评价是负面的。", f"{ta}很不满意。")
            )
        lines.append(line)
    return "\n".join(lines)
