"""Keys to answers, without a terminal."""

from __future__ import annotations

from itertools import product

import pytest

from fettle.feedback.answering import Placing, choices, typed
from fettle.feedback.items import Item, Task
from fettle.feedback.records import Answer, Ask


def press(count: int, keys: str) -> Placing:
    placing = Placing(count)
    for key in keys:
        after = placing.press(key)
        assert after is not None, key
        placing = after
    return placing


@pytest.mark.parametrize(("count", "keys", "ranks"), [
    (2, "1", (1, 2)), (2, "2", (2, 1)), (2, "t", (1, 1)), (2, "=", (1, 1)),
    (3, "23", (3, 1, 2)), (3, "2t", (2, 1, 2)), (3, "2=3", (2, 1, 1)), (3, "2=1", (1, 1, 2)), (3, "=", (1, 1, 1)),
    (4, "1=2t", (1, 1, 2, 2)), (4, "4\x7f31", (2, None, 1, None)), (9, "98765432", tuple(range(9, 0, -1))),
    (3, "2=\x7f1", (2, 1, 3)),
])  # fmt: skip
def test_an_order_by_keys(count: int, keys: str, ranks: tuple[int | None, ...]) -> None:
    placing = press(count, keys)
    if None in ranks:  # not complete yet
        assert placing.ranks is None and placing.left == [i for i, r in enumerate(ranks) if r is None]
    else:
        assert placing.ranks == ranks


def test_keys_that_mean_nothing() -> None:
    assert [Placing(3).press(key) for key in ("4", "0", "x", "\n", "²")] == [None] * 5
    assert press(3, "2").press("2") is None


def test_every_order_of_three_with_ties_can_be_said() -> None:
    found = set()
    for length in range(1, 5):
        for keys in product("123=t", repeat=length):
            placing: Placing | None = Placing(3)
            for key in keys:
                placing = placing.press(key) if placing is not None and placing.ranks is None else None
            if placing is not None and placing.ranks is not None:
                found.add(placing.ranks)
    assert len(found) == 13  # the weak orders of three things


def test_what_is_shown_on_the_way() -> None:
    assert [str(press(4, keys)) for keys in ("", "2", "2=", "2=3")] == ["", "2 > ", "2 = ", "2 = 3 > "]
    assert str(press(2, "2")) == "2 > 1"


def task(about: Ask | str) -> Task:
    return Task(Item(prompt="x", answers=(Answer(text="a"),), rules=("r",)), 0, about)


def test_single_keys_of_questions_and_rules() -> None:
    def values(about: Ask | str) -> dict | None:
        found = choices(task(about))
        return found and {key: value for key, (value, _) in found.items()}

    assert values("No insults.") == {"v": "violated", "n": "not", "?": "unsure"}
    assert values(Ask(ask="?")) == {"y": True, "n": False}
    assert values(Ask(ask="?", type="choice", options=("red", "blue"))) == {"1": "red", "2": "blue"}
    assert values(Ask(ask="?", type="scale", high=3)) == {"1": 1, "2": 2, "3": 3}
    for line in (Ask(ask="?", type="scale", high=100), Ask(ask="?", type="number"), Ask(ask="?", type="text")):
        assert values(line) is None


def test_typed_lines() -> None:
    assert typed(Ask(ask="?", type="scale", high=100), " 42 ") == (42, "")
    assert typed(Ask(ask="?", type="number"), "-2.5") == (-2.5, "")
    assert typed(Ask(ask="?", type="text"), " so ") == ("so", "")
    assert typed(Ask(ask="?", type="scale", high=100), "4.2") == (None, "expected a number, found '4.2'")
    assert typed(Ask(ask="?", type="scale", high=100), "101")[0] is None
    assert typed(Ask(ask="?", type="number"), "nan")[0] is None
    assert typed(Ask(ask="?", type="text"), "  ")[0] is None
