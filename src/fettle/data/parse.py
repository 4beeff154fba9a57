"""One JSON object from bytes, or the reason why it is not one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import orjson

KEY = re.compile(rb'"\s*:')
DEEPEST = 100  # levels of nesting


class BadRow(ValueError):
    """Why a row is set aside: half a sentence that stands after 'file:line: '."""


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object; BadRow where it is none, repeats a key, or holds what text should not (NUL, lone surrogates)."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRow(_why(data, error)) from None
    if not isinstance(value, dict):
        raise BadRow(f"expected a JSON object, found {kind_of(value)}")
    # Every key ends in '":', and text may too: only where the counts differ can a key stand twice.
    if len(KEY.findall(data)) != measure(value):
        _no_repeats(data)
    if b"\\u0000" in data and any("\x00" in text for text in strings(value)):
        raise BadRow("the text holds a NUL character")
    return value


def kind_of(value: Any) -> str:
    """A JSON value's type in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item


def measure(value: Any) -> int:
    """The number of keys in a JSON value, at any depth; BadRow where it is nested deeper than DEEPEST."""
    count, level, depth = 0, [value], 0
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                count += len(item)
                inner += [v for v in item.values() if isinstance(v, dict | list)]
            elif isinstance(item, list):
                inner += [v for v in item if isinstance(v, dict | list)]
        level, depth = inner, depth + 1
        if depth > DEEPEST:
            raise BadRow(f"nested deeper than {DEEPEST} levels")
    return count


def require_json(value: Any, what: str) -> None:
    """BadRow where a value, of a table as Parquet's, holds something at any depth that JSON has no form for."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif not (item is None or isinstance(item, str | int) or isinstance(item, float) and math.isfinite(item)):
            found = item if isinstance(item, float) else f"a value of the kind {type(item).__name__}"
            raise BadRow(f"{what} holds {found}, which JSON has no form for; write it as a text or a number")


def _no_repeats(data: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, item in pairs:
            if key in seen:
                raise BadRow(f"the key '{key}' stands twice in one object")
            seen[key] = item
        return seen

    json.loads(data, object_pairs_hook=check)


def _why(data: bytes, error: orjson.JSONDecodeError) -> str:
    text = str(error).split(": line ")[0]
    if not data.strip():
        return "the row is empty"
    if b"\x00" in data:
        return f"not valid JSON: a NUL byte at byte {data.index(0) + 1}"
    try:
        data.decode()
    except UnicodeDecodeError as bad:
        return f"invalid UTF-8 at byte {bad.start + 1} of the row"
    if "surrogate" in text:
        return "the text holds half of a surrogate pair, which is no character"
    if "depth" in text or "recursion" in text.lower():
        return f"nested deeper than {DEEPEST} levels"
    if "infinity" in text:
        return "a number too large to read"
    found = re.search(rb"(?<![\w\"])(-?Infinity|NaN)(?![\w\"])", data[max(0, error.pos - 4) : error.pos + 12])
    if found:
        return f"{found.group().decode()} is not a JSON value"
    if data.startswith(b"\xef\xbb\xbf"):
        return "not valid JSON: a byte order mark in the middle of the file"
    return f"not valid JSON: {text}, at character {error.pos + 1} of the row"
