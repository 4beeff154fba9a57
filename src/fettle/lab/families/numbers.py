"""Arithmetic with small numbers."""

from __future__ import annotations

import random

from ..world import World
from .family import Family, Slots


def _pair(rng: random.Random) -> tuple[int, int]:
    top = rng.choice((10, 20, 50))
    return rng.randint(0, top), rng.randint(0, top)


def _add(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = _pair(rng)
    return {"a": str(a), "b": str(b)}, str(a + b)


def _subtract(rng: random.Random, world: World) -> tuple[Slots, str]:
    b, c = _pair(rng)
    return {"a": str(b + c), "b": str(b)}, str(c)


def _double(rng: random.Random, world: World) -> tuple[Slots, str]:
    a = rng.randint(0, 50)
    return {"a": str(a)}, str(2 * a)


def _times(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return {"a": str(a), "b": str(b)}, str(a * b)


def _larger(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = rng.sample(range(100), 2)
    return {"a": str(a), "b": str(b)}, str(max(a, b))


def _smaller(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = rng.sample(range(100), 2)
    return {"a": str(a), "b": str(b)}, str(min(a, b))


def _greater(rng: random.Random, world: World) -> tuple[Slots, str]:
    a, b = rng.sample(range(100), 2)
    return {"a": str(a), "b": str(b)}, "yes" if a > b else "no"


def _parity(rng: random.Random, world: World) -> tuple[Slots, str]:
    a = rng.randint(0, 99)
    return {"a": str(a)}, "odd" if a % 2 else "even"


def _next(rng: random.Random, world: World) -> tuple[Slots, str]:
    start, step = rng.randint(0, 40), rng.choice((1, 2, 3, 5, 10))
    row = [start + step * i for i in range(5)]
    return {"row": ", ".join(map(str, row[:4]))}, str(row[4])


FAMILIES = (
    Family(
        "add",
        "numbers",
        "en",
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "Calculate {a} + {b}.",
            "Give the sum of {a} and {b}.",
            "How much is {a} + {b}?",
            "{a} + {b} = ?",
            "If I add {b} to {a}, what do I get?",
            "How much are {a} and {b} together?",
        ),
        _add,
    ),
    Family(
        "subtract",
        "numbers",
        "en",
        (
            "What is {a} minus {b}?",
            "Subtract {b} from {a}.",
            "Calculate {a} - {b}.",
            "Give the difference of {a} and {b}.",
            "How much is {a} - {b}?",
            "{a} - {b} = ?",
            "If I take {b} away from {a}, what is left?",
            "What number is {b} less than {a}?",
        ),
        _subtract,
    ),
    Family(
        "double",
        "numbers",
        "en",
        (
            "Double the number {a}.",
            "What is the double of {a}?",
            "What is twice {a}?",
            "Give two times {a}.",
            "Calculate the double of {a}.",
            "How much is twice {a}?",
            "If I double {a}, what do I get?",
            "Which number is twice as large as {a}?",
        ),
        _double,
    ),
    Family(
        "times",
        "numbers",
        "en",
        (
            "What is {a} times {b}?",
            "Calculate {a} x {b}.",
            "Give the product of {a} and {b}.",
            "How much is {a} x {b}?",
            "{a} x {b} = ?",
            "Multiply {a} by {b}.",
            "If I take {a} times {b}, what do I get?",
            "How much is {a} times {b}?",
        ),
        _times,
    ),
    Family(
        "larger",
        "numbers",
        "en",
        (
            "Which number is larger, {a} or {b}?",
            "Choose the larger number: {a} or {b}.",
            "Give the larger of {a} and {b}.",
            "Of {a} and {b}, which is the larger?",
            "Find the larger number: {a}, {b}.",
            "Is {a} or {b} the larger number?",
            "Name the bigger one of {a} and {b}.",
            "What is the bigger number, {a} or {b}?",
        ),
        _larger,
    ),
    Family(
        "smaller",
        "numbers",
        "en",
        (
            "Which number is smaller, {a} or {b}?",
            "Choose the smaller number: {a} or {b}.",
            "Give the smaller of {a} and {b}.",
            "Of {a} and {b}, which is the smaller?",
            "Find the smaller number: {a}, {b}.",
            "Is {a} or {b} the smaller number?",
            "Name the smaller one of {a} and {b}.",
            "Between {a} and {b}, which is smaller?",
        ),
        _smaller,
    ),
    Family(
        "greater",
        "numbers",
        "en",
        (
            "Is {a} larger than {b}? Answer yes or no.",
            "Is {a} greater than {b}? Yes or no?",
            "Yes or no: {a} is larger than {b}.",
            "Say yes or no: {a} is greater than {b}.",
            "Decide with yes or no: is {a} more than {b}?",
            "Answer yes or no: {a} > {b}.",
            "Yes or no, is {a} larger than {b}?",
            "Is the number {a} bigger than {b}? Reply with yes or no.",
        ),
        _greater,
    ),
    Family(
        "parity",
        "numbers",
        "en",
        (
            "Is {a} odd or even?",
            "Decide whether {a} is odd or even.",
            "Odd or even: {a}.",
            "Classify the number {a} as odd or even.",
            "Say whether the number {a} is odd or even.",
            "Choose odd or even for {a}.",
            "Tell me if {a} is even or odd.",
            "The number {a}: is it odd or even?",
        ),
        _parity,
    ),
    Family(
        "next_number",
        "numbers",
        "en",
        (
            "Which number comes next: {row}?",
            "Continue with one number: {row}",
            "What comes after {row}?",
            "Give the next number of {row}.",
            "Find the next number: {row}",
            "Count on by one number: {row}",
            "Say the number that follows {row}.",
            "How does it go on: {row}?",
        ),
        _next,
    ),
)
