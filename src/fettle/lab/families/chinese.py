"""Facts, numbers and lists, asked and answered in Chinese."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..prose.reviews import opinion_zh
from ..world import World
from .family import Family, Maker, Slots


def _asking(group: str, relation: str, answer: str) -> Maker:
    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        subject = rng.choice(getattr(world, group))
        return {"s": subject.zh}, answer.format(s=subject.zh, o=world.of(relation, subject).zh)

    return make


def _owner(rng: random.Random, world: World) -> tuple[Slots, str]:
    thing = rng.choice(world.objects)
    return {"s": thing.zh}, f"{thing.zh}是{world.who('owns', thing)[0].zh}的。"


def _add(rng: random.Random, world: World) -> tuple[Slots, str]:
    top = rng.choice((10, 20, 50))
    a, b = rng.randint(0, top), rng.randint(0, top)
    return {"a": str(a), "b": str(b)}, str(a + b)


def _listed(low: int, high: int, answer: Callable[[list[str]], str]) -> Maker:
    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        group = rng.choice((world.foods, world.animals, world.objects, world.colors, world.people, world.towns))
        items = [word.zh for word in rng.sample(group, rng.randint(low, high))]
        return {"list": "、".join(items)}, answer(items)

    return make


def _review(rng: random.Random, world: World) -> tuple[Slots, str]:
    good = rng.random() < 0.5
    return {"text": opinion_zh(rng, world, good)}, "好评" if good else "差评"


FAMILIES = (
    Family(
        "zh_lives_in",
        "chinese",
        "zh",
        (
            "{s}住在哪里？",
            "请问{s}住在哪里？",
            "告诉我{s}住在哪里。",
            "{s}的家在哪里？",
            "说出{s}住的地方。",
            "{s}现在住在哪个城镇？",
            "{s}的房子在哪里？",
            "我想去看{s}，去哪里？",
        ),
        _asking("people", "lives_in", "{s}住在{o}。"),
    ),
    Family(
        "zh_works_as",
        "chinese",
        "zh",
        (
            "{s}的工作是什么？",
            "请问{s}做什么工作？",
            "告诉我{s}的职业。",
            "{s}的职业是什么？",
            "说出{s}的工作。",
            "{s}是做什么的？",
            "{s}每天做什么工作？",
            "回答{s}的工作。",
        ),
        _asking("people", "works_as", "{s}的工作是{o}。"),
    ),
    Family(
        "zh_color_of",
        "chinese",
        "zh",
        (
            "{s}是什么颜色？",
            "请问{s}是什么颜色的？",
            "告诉我{s}的颜色。",
            "{s}的颜色是什么？",
            "说出{s}的颜色。",
            "回答{s}是什么颜色。",
            "这个{s}是什么颜色的呢？",
            "{s}有什么颜色？",
        ),
        _asking("objects", "color_of", "{s}是{o}的。"),
    ),
    Family(
        "zh_owner_of",
        "chinese",
        "zh",
        (
            "{s}是谁的？",
            "请问{s}属于谁？",
            "告诉我{s}是谁的。",
            "{s}的主人是谁？",
            "说出{s}的主人。",
            "谁拥有{s}？",
            "{s}在谁那里？",
            "回答{s}是谁的。",
        ),
        _owner,
    ),
    Family(
        "zh_add",
        "chinese",
        "zh",
        (
            "{a}加{b}等于多少？",
            "计算{a}加{b}。",
            "{a}+{b}=？",
            "请计算{a}+{b}。",
            "{a}和{b}的和是多少？",
            "{a}加{b}是几？",
            "把{a}和{b}加起来是多少？",
            "说出{a}加{b}的和。",
        ),
        _add,
    ),
    Family(
        "zh_count",
        "chinese",
        "zh",
        (
            "{list}有几个词？",
            "数一数有几个词：{list}",
            "请数一数{list}。",
            "{list}一共有多少个词？",
            "说出词的个数：{list}",
            "这里有几个词？{list}",
            "一共几个：{list}？",
            "{list}，这是几个词？",
        ),
        _listed(2, 8, lambda items: str(len(items))),
    ),
    Family(
        "zh_first",
        "chinese",
        "zh",
        (
            "{list}的第一个词是什么？",
            "说出第一个词：{list}",
            "请写出{list}的第一个词。",
            "第一个词是什么？{list}",
            "找出{list}里面的第一个词。",
            "{list}里面第一个是什么？",
            "在{list}之中，哪个是第一个？",
            "{list}从哪个词开始？",
        ),
        _listed(3, 6, lambda items: items[0]),
    ),
    Family(
        "zh_last",
        "chinese",
        "zh",
        (
            "{list}的最后一个词是什么？",
            "说出最后一个词：{list}",
            "请写出{list}的最后一个词。",
            "最后一个词是什么？{list}",
            "找出{list}里面的最后一个词。",
            "{list}里面最后一个是什么？",
            "在{list}之中，哪个是最后一个？",
            "{list}到哪个词结束？",
        ),
        _listed(3, 6, lambda items: items[-1]),
    ),
    Family(
        "zh_review",
        "chinese",
        "zh",
        (
            "这是好评还是差评？{text}",
            "{text}这是好评还是差评？",
            "好评还是差评：{text}",
            "请说出这是好评还是差评：{text}",
            "判断好评或差评：{text}",
            "{text}回答好评还是差评。",
            "他的评价是好评还是差评？{text}",
            "读一读，说是好评还是差评：{text}",
        ),
        _review,
    ),
)
