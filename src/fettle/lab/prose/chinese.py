"""Prose in Chinese: the graph, numbers, lists and stories."""

from __future__ import annotations

import random

from ..lexicon import CLOTHES, COLOURS, NUMBERS_ZH, VERBS
from ..world import Entity, Triple, World
from .facts import other

# {s} subject, {o} object, {ta} the subject's pronoun, {at} the place where a job is done.
SENTENCES: dict[str, tuple[str, ...]] = {
    "lives_in": (
        "{s}住在{o}。",
        "{s}的家在{o}。",
        "{s}在{o}有一座房子。",
        "{o}是{s}住的地方。",
        "大家都知道{s}住在哪里：{ta}住在{o}。",
        "{s}现在住在{o}。",
    ),
    "born_in": ("{s}出生在{o}。", "{s}的出生地是{o}。", "{o}是{s}出生的地方。", "{s}小时候在{o}，{ta}出生在那里。"),
    "works_as": (
        "{s}是{o}。",
        "{s}的工作是{o}。",
        "{s}的职业是{o}。",
        "{s}是一名{o}，每天去{at}。",
        "{s}在{at}当{o}。",
        "说到工作，{s}是{o}。",
    ),
    "likes": ("{s}喜欢{o}。", "{s}最喜欢的食物是{o}。", "{s}很爱{o}。", "{s}家里总有{o}。"),
    "keeps": ("{s}养{o}。", "{s}家里养着{o}。", "{s}的动物是{o}。", "{s}每天照顾{o}。"),
    "friend_of": ("{s}的朋友是{o}。", "{s}和{o}是朋友。", "{s}最好的朋友是{o}。", "{s}常常去看朋友{o}。"),
    "owns": ("{s}拥有{o}。", "{o}是{s}的。", "{o}属于{s}。", "{o}的主人是{s}。", "大家都知道{o}是谁的：它是{s}的。"),
    "located_in": ("{s}在{o}。", "{s}是{o}的一个城镇。", "{s}位于{o}。", "{o}有一个城镇叫{s}。"),
    "capital_of": ("{s}是{o}的首都。", "{o}的首都是{s}。", "{o}的国王住在首都{s}。"),
    "color_of": ("{s}是{o}的。", "{s}的颜色是{o}。", "这个{s}是{o}的。", "{s}是什么颜色，孩子们都知道：是{o}。"),
    "made_of": ("{s}是用{o}做的。", "{s}的材料是{o}。", "人们用{o}做了{s}。"),
}


def ta(person: Entity) -> str:
    """The Chinese pronoun of this person."""
    return "她" if person.gender == "f" else "他"


def sentence(rng: random.Random, triple: Triple) -> str:
    """One fact as a Chinese sentence."""
    return rng.choice(SENTENCES[triple.relation]).format_map(_words(triple.subject, triple.object))


def profile(rng: random.Random, world: World) -> str:
    """All that is known of a few people."""
    return "\n".join(_portrait(rng, world, person) for person in rng.sample(world.people, rng.randint(1, 3)))


def mixture(rng: random.Random, world: World) -> str:
    """Facts of all kinds."""
    return "".join(sentence(rng, triple) for triple in rng.sample(world.triples, rng.randint(5, 12)))


def places(rng: random.Random, world: World) -> str:
    """Towns, things and those who belong to them."""
    lines = []
    for town in rng.sample(world.towns, 2):
        lines.append(_tell(rng, world, "located_in", town))
        if world.find("capital_of", town):
            lines.append(_tell(rng, world, "capital_of", town))
        lines += [_tell(rng, world, "lives_in", person) for person in world.who("lives_in", town)[:3]]
    for thing in rng.sample(world.objects, 2):
        lines += [
            _tell(rng, world, "owns", world.who("owns", thing)[0]),
            _tell(rng, world, "color_of", thing),
            _tell(rng, world, "made_of", thing),
        ]
    return "".join(lines)


def truths(rng: random.Random, world: World) -> str:
    """What is right and what is wrong."""
    lines = []
    for triple in rng.sample(world.triples, rng.randint(4, 7)):
        plain = SENTENCES[triple.relation][0]
        right = plain.format_map(_words(triple.subject, triple.object)).rstrip("。")
        wrong = plain.format_map(_words(triple.subject, other(rng, world, triple))).rstrip("。")
        lines.append(
            rng.choice(
                (
                    f"{right}，这是对的。",
                    f"{wrong}，这是错的，{right}。",
                    f"有人说{wrong}，不对，{right}。",
                    f"说{right}，是对的。",
                )
            )
        )
    return "".join(lines)


def numbers(rng: random.Random, world: World) -> str:
    """Sums, comparisons and counting."""
    return rng.choice(("", "\n")).join(_number(rng) for _ in range(rng.randint(6, 11)))


def lists(rng: random.Random, world: World) -> str:
    """Lists turned around, counted, their ends and members."""
    return rng.choice(("", "\n")).join(_list(rng, world) for _ in range(rng.randint(4, 8)))


def story(rng: random.Random, world: World) -> str:
    """A story in which things change hands."""
    lines = [
        rng.choice(("有一天，", "早上，", "昨天，", "夏天，"))
        + f"{rng.choice(world.people).zh}在{rng.choice(VERBS).zh}。"
    ]
    for _ in range(rng.randint(2, 4)):
        giver, taker = rng.sample(world.people, 2)
        town, color, noun = rng.choice(world.towns), rng.choice(COLOURS), rng.choice(CLOTHES)
        lines.append(
            rng.choice(
                (
                    f"{giver.zh}去了{town.zh}，把{color.zh}的{noun.zh}给了{taker.zh}。",
                    f"在{town.zh}，{taker.zh}从{giver.zh}那里拿到了{color.zh}的{noun.zh}。",
                    f"{giver.zh}买了{color.zh}的{noun.zh}，送给{taker.zh}。",
                )
            )
        )
        lines.append(
            rng.choice(
                (
                    f"现在{noun.zh}在{taker.zh}那里。",
                    f"{noun.zh}是{color.zh}的。",
                    f"{giver.zh}把{noun.zh}送走了。",
                    f"{giver.zh}在{rng.choice(VERBS).zh}。",
                    "",
                )
            )
        )
    lines.append(
        rng.choice(
            (
                "后来大家都回家了。",
                "明天会怎么样呢？",
                "谁知道呢？",
                "这是什么？",
                "你在哪里？",
                "有几个人呢？",
                "那是美好的一天。",
                "晚上很安静。",
            )
        )
    )
    return "".join(lines)


def _portrait(rng: random.Random, world: World, person: Entity) -> str:
    relations = ["lives_in", "born_in", "works_as", "likes", "keeps", "friend_of"]
    rng.shuffle(relations)
    lines = [_tell(rng, world, relation, person) for relation in relations[: rng.randint(4, 6)]]
    lines[1:] = [
        ta(person) + line[len(person.zh) :]
        if line.startswith(person.zh) and "和" not in line and rng.random() < 0.4
        else line
        for line in lines[1:]
    ]
    if thing := world.find("owns", person):
        lines += [_tell(rng, world, "owns", person), _tell(rng, world, "color_of", thing)]
    return "".join(lines)


def _tell(rng: random.Random, world: World, relation: str, subject: Entity) -> str:
    return rng.choice(SENTENCES[relation]).format_map(_words(subject, world.of(relation, subject)))


def _words(subject: Entity, object: Entity) -> dict[str, str]:
    return {"s": subject.zh, "o": object.zh, "ta": ta(subject), "at": object.place.zh}


def _number(rng: random.Random) -> str:
    top = rng.choice((10, 20, 50))
    a, b = rng.randint(0, top), rng.randint(0, top)
    low, high = min(a, b), max(a, b) + (a == b)
    small, less = rng.randint(0, 10), rng.randint(0, 10)
    return rng.choice(
        (
            f"{a}加{b}等于{a + b}。",
            f"{a}加{b}是{a + b}。",
            f"{a}和{b}的和是{a + b}。",
            f"{high}减{low}等于{high - low}。",
            f"{high}减去{low}，得到{high - low}。",
            f"{high}比{low}大。",
            f"{low}比{high}小。",
            f"{low}和{high}之中，{high}更大。",
            f"{a}是{'单' if a % 2 else '双'}数。",
            f"{small}乘{less}等于{small * less}。",
            f"{a}的两倍是{2 * a}。",
            f"{NUMBERS_ZH[small]}加{NUMBERS_ZH[less]}等于{NUMBERS_ZH[small + less]}。",
            f"{a}后面的数是{a + 1}。",
            f"{a}+{b}={a + b}。",
        )
    )


def _list(rng: random.Random, world: World) -> str:
    group = rng.choice((world.foods, world.animals, world.objects, world.colors, world.people, world.towns))
    items = [word.zh for word in rng.sample(group, rng.randint(3, 6))]
    text = "、".join(items)
    return rng.choice(
        (
            f"{text}，一共有{len(items)}个词。",
            f"{text}倒过来是{'、'.join(items[::-1])}。",
            f"{text}里面第一个是{items[0]}，最后一个是{items[-1]}。",
            f"在{text}之中，有{items[1]}。",
            f"{text}，数一数是{len(items)}个。",
            f"{text}的第一个词是{items[0]}。",
            f"{text}的最后一个词是{items[-1]}。",
        )
    )
