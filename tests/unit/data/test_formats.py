"""Rows of every format to samples, and every way to fail."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fettle.core import FettleError
from fettle.data import BadRow, DataSpec, detect, to_sample
from fettle.data.formats import in_turns

CALL = '{"name": "weather", "arguments": {"town": "Oslo"}}'


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


def said(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in pairs]


def brief(sample) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in sample.messages]


GOOD = [
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n\n1 2"), ("assistant", "3")]),
    ("alpaca", {"instruction": "hi", "input": None, "output": "ho"}, [("user", "hi"), ("assistant", "ho")]),
    ("alpaca", {"instruction": "hi", "output": "ho"}, [("user", "hi"), ("assistant", "ho")]),
    (
        "alpaca",
        {"instruction": "hi", "output": "ho", "system": "s", "history": [["a", "b"]]},
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "hi"), ("assistant", "ho")],
    ),
    (
        "sharegpt",
        {"conversations": turns(("human", "q"), ("gpt", "a")), "system": "s"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "sharegpt",
        {"conversations": turns(("human", "q"), ("function_call", CALL), ("observation", "rain"), ("gpt", "a"))},
        [("user", "q"), ("assistant", ""), ("tool", "rain"), ("assistant", "a")],
    ),
    (
        "messages",
        {"messages": said(("developer", "s"), ("user", "q"), ("assistant", "a"))},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    (
        "messages",
        {"messages": said(("user", [{"type": "text", "text": "q"}]), ("assistant", "a"))},
        [("user", "q"), ("assistant", "a")],
    ),
    (
        "completion",
        {"prompt": said(("user", "q")), "completion": said(("assistant", "a"))},
        [("user", "q"), ("assistant", "a")],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), GOOD)
def test_good_rows(name: str, row: dict, expected: list) -> None:
    assert brief(to_sample(row, name)) == expected
    assert detect([row], "f") == name


OTHER: dict[str, Any] = {
    "tools": ["hammer, saw", ["hammer"], {"f": {}}, 3, '{"f": 1}', "[1]"], "functions": [3, "calc"], "system": [3, ["Linux"]],
}  # fmt: skip
WORDS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "q", "output": "a"}, "completion": {"prompt": "q", "completion": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "alpaca's preference": {"instruction": "q", "chosen": "a", "rejected": "b"},
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("key", OTHER)
def test_a_column_about_something_else_is_left(words: str, key: str) -> None:
    """It is as if it were not there, but that it is told; and so in a conversation that is made of texts."""
    name = words.split()[-1]
    alone = to_sample(WORDS[words], name)
    for value in OTHER[key]:
        found = to_sample(WORDS[words] | {key: value}, name)
        assert found.unused == (found.answers or (found,))[0].kind
        for one, other in ((found, alone), (in_turns(found), in_turns(alone))):
            assert one.unused and not other.unused
            for mine, bare in zip(one.answers or (one,), other.answers or (other,), strict=True):
                assert mine.beside == {key: value} and replace(mine, beside={}) == bare


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("tools", [[{"x": 1}], '[{"name": "f"}, {"x": 1}]'])
def test_tools_without_names_are_a_bad_row_where_they_are_read(words: str, tools: Any) -> None:
    with pytest.raises(BadRow, match="'tools' holds an object without a name"):
        in_turns(to_sample(WORDS[words] | {"tools": tools}, words.split()[-1]))


@pytest.mark.parametrize("words", ["alpaca", "alpaca's preference"])
@pytest.mark.parametrize("empty", [None, "", " [] ", []])
def test_a_history_of_nothing(words: str, empty: Any) -> None:
    name = words.split()[-1]
    assert to_sample(WORDS[words] | {"history": empty}, name) == to_sample(WORDS[words], name)


def test_texts_and_completions() -> None:
    assert to_sample({"text": " a "}, "text").text == " a "
    for key in ("completion", "response"):
        sample = to_sample({"prompt": "", key: "b"}, detect([{"prompt": "", key: "b"}], "f"))
        assert (sample.prompt, sample.completion, sample.kind) == ("", "b", "completion")
    sample = to_sample(
        {"prompt": said(("user", "q"), ("assistant", "a"), ("user", "r")), "completion": said(("assistant", "b"))},
        "completion",
    )
    assert sample.weights == (0, 0, 0, 1)


def test_calls_and_tools() -> None:
    row = {
        "conversations": turns(
            ("human", "q"), ("function_call", f"[{CALL}, {CALL}]"), ("observation", ""), ("gpt", "a")
        ),
        "tools": '[{"name": "weather"}]',
    }
    sample = to_sample(row, "sharegpt")
    assert [c["function"]["arguments"] for c in sample.messages[1]["tool_calls"]] == [{"town": "Oslo"}] * 2
    assert sample.tools == ({"type": "function", "function": {"name": "weather"}},)
    assert sample.weights == (0, 1, 0, 1)
    call = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    talk = [
        *said(("user", "q")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "x"},
        *said(("assistant", "a")),
    ]
    sample = to_sample({"messages": talk, "tools": [{"type": "function", "function": {"name": "weather"}}]}, "messages")
    assert sample.messages[1]["tool_calls"] == [
        {"id": "x", "type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
    ]
    assert sample.messages[2]["tool_call_id"] == "x"


Q, A = ("user", "q"), ("assistant", "a")
BAD = [
    ("alpaca", {"instruction": "q"}, "the key 'output' is missing"),
    ("alpaca", {"instruction": "q", "output": None}, "'output' is null"),
    ("alpaca", {"instruction": "q", "output": " \n"}, "'output' is empty"),
    ("alpaca", {"instruction": "", "output": "a"}, "'instruction' is empty"),
    ("alpaca", {"instruction": 5, "output": "a"}, "'instruction' must be a text, found a number"),
    ("alpaca", {"instruction": "q", "input": ["x"], "output": "a"}, "'input' must be a text, found a list"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "'history' must be"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", None]]}, "'answer' is null"),
    ("text", {"text": ""}, "'text' is empty"),
    ("text", {"txt": "a"}, "the key 'text' is missing"),
    ("text", {"text": float("nan")}, "'text' must be a text, found a number"),
    ("completion", {"prompt": None, "completion": "a"}, "'prompt' is null"),
    ("completion", {"prompt": "q", "completion": ""}, "'completion' is empty"),
    ("completion", {"prompt": said(Q), "completion": []}, "'completion' is empty"),
    ("messages", {"messages": None}, "'messages' must be a list of turns, found null"),
    ("messages", {"messages": []}, "'messages' is empty"),
    ("messages", {"messages": "q"}, "found a text"),
    ("messages", {}, "the key 'messages' is missing"),
    ("messages", {"messages": [5]}, "turn 1: expected an object, found a number"),
    ("messages", {"messages": [{"role": "user"}, *said(A)]}, "turn 1: the key 'content' is missing"),
    ("messages", {"messages": said(("user", None), A)}, "turn 1: 'content' is null"),
    ("messages", {"messages": said(Q, ("assistant", ""))}, "turn 2: 'content' is empty"),
    ("messages", {"messages": said(Q, ("assistant", None))}, "turn 2: 'content' is null"),
    ("messages", {"messages": said(Q, ("bot", "a"))}, "turn 2: unknown role 'bot'"),
    ("messages", {"messages": said(Q, (None, "a"))}, "turn 2: 'role' is null"),
    ("messages", {"messages": said(Q)}, "no assistant turn"),
    ("messages", {"messages": said(A)}, "begins with the role 'assistant'"),
    ("messages", {"messages": said(Q, A, Q)}, "ends with the role 'user'"),
    ("messages", {"messages": said(Q, Q, A)}, "two user turns in a row"),
    ("messages", {"messages": said(Q, A, ("system", "s"), Q, A)}, "a system turn after"),
    ("messages", {"messages": said(Q, ("tool", "r"), A)}, "follows no call"),
    ("messages", {"messages": said(("user", [{"type": "image_url", "image_url": "x"}]), A)}, "not a text"),
    ("messages", {"messages": [*said(Q), {"role": "assistant", "content": "", "tool_calls": [{}]}]}, "without a name"),
    (
        "messages",
        {"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "x"}]}, *said(A)]},
        "in a turn of the role 'user'",
    ),
    ("messages", {"messages": said(Q, A), "weight": -1}, "finite number, 0 or more"),
    ("messages", {"messages": said(Q, A), "weight": float("inf")}, "finite number"),
    ("messages", {"messages": said(Q, A), "weight": "much"}, "'weight' is not a number"),
    ("messages", {"messages": said(Q, A), "weight": True}, "'weight' must be a number"),
    ("messages", {"messages": said(Q, A), "weight": 0}, "nothing would be learned"),
    ("messages", {"messages": said(Q, A), "tools": "{"}, "'tools' is not valid JSON"),
    ("messages", {"messages": said(Q, A), "tools": [1]}, "'tools' must be a list of objects"),
    (
        "sharegpt",
        {"conversations": turns(("human", "q"), ("function_call", "rain"))},
        "turn 2: the function call is not valid JSON",
    ),
    ("sharegpt", {"conversations": turns(("human", "q"), ("function_call", "[" * 200 + "]" * 200))}, "nested deeper"),
    ("sharegpt", {"conversations": turns(("human", "q"), ("gpt", 5))}, "turn 2: 'value' must be a text"),
]


VALUES = [b"ab", Decimal("1.5"), timedelta(1), datetime(2025, 1, 1), float("nan"), [{"x": (1, 2)}]]  # as of Parquet
BAD += [
    row
    for value in VALUES
    for row in (
        ("messages", {"messages": [*said(Q), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": value}}]}]},
         "turn 2: the call of 'f' holds "),
        ("messages", {"messages": said(Q, A), "tools": [{"name": "f", "parameters": {"x": value}}]}, "'tools' holds "),
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_bad_rows(name: str, row: dict, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_sample(row, name)
    assert reason in str(caught.value)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(["", "a", "user", "assistant", "gpt", "[]", "{"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "name", "function", "arguments", "weight"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
KEYS = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "tools",
    "system",
    "history",
    "weight",
]


@given(
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5),
    st.sampled_from(["alpaca", "sharegpt", "messages", "completion", "text"]),
)
def test_any_row_is_a_sample_or_a_bad_row(row: dict, name: str) -> None:
    try:
        sample = to_sample(row, name)
    except BadRow as problem:
        assert str(problem)
    else:
        assert sample.text or sample.completion or any(m["role"] == "assistant" for m in sample.messages)


def test_detection_refuses() -> None:
    with pytest.raises(FettleError, match="columns found .answer, question."):
        detect([{"question": "q", "answer": "a"}], "f")
    for row in ({"chosen": "a", "rejected": "b", "prompt": "p"}, {"messages": said(Q, A), "label": True}):
        with pytest.raises(FettleError, match="preferences"):
            detect([row], "f")


@pytest.mark.parametrize(
    "keys",
    [
        {"format": "template"}, {"format": "text", "template": "x"}, {"weight": 1.0, "cap": 5}, {"weight": 0.0}, {"weight": float("nan")},
        {"max_bad": 2.0}, {"cap": 0}, {"limit": 0}, {"lenght": 5}, {"format": "json"},
    ],
)  # fmt: skip
def test_specs_refuse(keys: dict) -> None:
    with pytest.raises(ValidationError):
        DataSpec(path="a", **keys)
