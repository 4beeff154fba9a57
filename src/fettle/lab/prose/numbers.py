"""Prose about numbers, in English: sums worked step by step, tables, comparisons, sequences, small word problems."""

from __future__ import annotations

import random

from ..lexicon import NUMBERS, plural
from ..world import World
from .facts import capitalised


def sums(rng: random.Random, world: World) -> str:
    """Additions and subtractions, stated in many ways and sometimes worked digit by digit."""
    return rng.choice(("\n", " ", " ")).join(
        rng.choice((addition, addition, subtraction, multiple))(rng) for _ in range(rng.randint(6, 12))
    )


def addition(rng: random.Random) -> str:
    """One sum of two numbers up to 99, in one of many wordings."""
    a, b = _pair(rng)
    c = a + b
    if a <= 10 and b <= 10 and rng.random() < 0.2:
        return capitalised(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[c]}.")
    if a > 10 and b > 10 and rng.random() < 0.5:
        return _worked(a, b)
    return rng.choice(
        (
            f"{a} + {b} = {c}.",
            f"{a} plus {b} is {c}.",
            f"{a} plus {b} makes {c}.",
            f"The sum of {a} and {b} is {c}.",
            f"Adding {b} to {a} gives {c}.",
            f"{a} and {b} together are {c}.",
            f"If you add {a} and {b}, you get {c}.",
            f"{b} more than {a} is {c}.",
            f"Take {a}, add {b}, and the result is {c}.",
            f"{a} + {b} = {c}.",
        )
    )


def subtraction(rng: random.Random) -> str:
    """One difference that is not negative."""
    b, c = _pair(rng)
    a = b + c
    return rng.choice(
        (
            f"{a} - {b} = {c}.",
            f"{a} minus {b} is {c}.",
            f"Taking {b} away from {a} leaves {c}.",
            f"The difference of {a} and {b} is {c}.",
            f"{b} less than {a} is {c}.",
            f"If you subtract {b} from {a}, you get {c}.",
            f"{a} less {b} makes {c}.",
            f"{a} - {b} = {c}.",
        )
    )


def multiple(rng: random.Random) -> str:
    """A product of small numbers, a double or a half."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    n = rng.randint(1, 50)
    return rng.choice(
        (
            f"{a} x {b} = {a * b}.",
            f"{a} times {b} is {a * b}.",
            f"The product of {a} and {b} is {a * b}.",
            f"The double of {n} is {2 * n}.",
            f"Twice {n} is {2 * n}.",
            f"Two times {n} is {2 * n}.",
            f"{n} doubled is {2 * n}.",
            f"Half of {2 * n} is {n}.",
            f"{2 * n} cut in half is {n}.",
        )
    )


def comparisons(rng: random.Random, world: World) -> str:
    """Which number is larger, which is between, which is even."""
    lines = []
    for _ in range(rng.randint(6, 11)):
        low, middle, high = sorted(rng.sample(range(100), 3))
        n = rng.randint(0, 99)
        first, second = (high, low) if rng.random() < 0.5 else (low, high)
        lines.append(
            rng.choice(
                (
                    f"{high} is larger than {low}.",
                    f"{low} is smaller than {high}.",
                    f"{high} > {low}.",
                    f"{low} < {high}.",
                    f"Of {first} and {second}, the larger is {high}.",
                    f"Of {first} and {second}, the smaller is {low}.",
                    f"The larger of the numbers {first} and {second} is {high}.",
                    f"{middle} is between {low} and {high}.",
                    f"Between {first} and {second}, {high} is the bigger number.",
                    f"{n} is {'odd' if n % 2 else 'even'}.",
                    f"The number {n} is {'odd' if n % 2 else 'even'}, because it ends in {n % 10}.",
                    f"It is {'true' if first > second else 'false'} that {first} is larger than {second}.",
                    f"The largest of {middle}, {low} and {high} is {high}.",
                    f"The smallest of {middle}, {high} and {low} is {low}.",
                )
            )
        )
    return " ".join(lines)


def sequences(rng: random.Random, world: World) -> str:
    """Counting up and down by steps, and what comes before and after a number."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        step, start, n = rng.choice((1, 1, 2, 3, 5, 10)), rng.randint(0, 40), rng.randint(1, 98)
        row = [start + step * i for i in range(rng.randint(4, 8))]
        text = ", ".join(map(str, row))
        lines.append(
            rng.choice(
                (
                    f"Counting by {step} from {start}: {text}.",
                    f"{text} and so on.",
                    f"{text}. The next number is {row[-1] + step}.",
                    f"Backwards: {', '.join(map(str, row[::-1]))}.",
                    f"After {n} comes {n + 1}.",
                    f"Before {n} comes {n - 1}.",
                    f"The number after {n} is {n + 1}, and the number before it is {n - 1}.",
                )
            )
        )
    return rng.choice((" ", "\n")).join(lines)


def problems(rng: random.Random, world: World) -> str:
    """Word problems told as little stories, with their result at the end."""
    return "\n\n".join(_problem(rng, world) for _ in range(rng.randint(2, 4)))


def _problem(rng: random.Random, world: World) -> str:
    giver, taker = rng.sample(world.people, 2)
    thing = plural(rng.choice(world.objects + world.animals).en)
    b, c = rng.randint(1, 12), rng.randint(1, 20)
    a = b + c
    he = "she" if giver.gender == "f" else "he"
    return rng.choice(
        (
            f"{giver.en} had {c} {thing}. {taker.en} brought {b} more. Then {giver.en} had {a} {thing}, because {c} + {b} = {a}.",
            f"{giver.en} had {a} {thing} and gave {b} of them to {taker.en}. Now {he} has {c}, for {a} - {b} = {c}.",
            f"There were {a} {thing} in the yard. {b} went away, so {c} were left.",
            f"{giver.en} counted {c} {thing} and {taker.en} counted {b}. Together they counted {a} {thing}.",
            f"{giver.en} bought {b} boxes with {min(c, 10)} {thing} in each. That makes {b} x {min(c, 10)} = {b * min(c, 10)} {thing}.",
            f"{giver.en} has {c} {thing}. {taker.en} has twice as many, which is {2 * c}.",
            f"{giver.en} is {a + 10} years old and {taker.en} is {c + 10}. {giver.en} is {b} years older.",
        )
    )


def _pair(rng: random.Random) -> tuple[int, int]:
    top = rng.choice((10, 10, 20, 50))
    return rng.randint(0, top), rng.randint(0, top)


def _worked(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry = f", write {ones % 10} and carry 1" if ones > 9 else ""
    tens = a // 10 + b // 10
    return (
        f"{a} + {b}: the ones are {a % 10} + {b % 10} = {ones}{carry}; the tens are {a // 10} + {b // 10}"
        f"{' + 1' if carry else ''} = {tens + bool(carry)}; so {a} + {b} = {a + b}."
    )
