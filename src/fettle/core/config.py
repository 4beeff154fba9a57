"""YAML to Spec: every error names the file and the line, or the override, and the key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from fettle.core.errors import FettleError
from fettle.core.spec import Where, fields_at, nearest, plain_at

SMALLEST, LARGEST = -(1 << 63), (1 << 64) - 1  # the integers that fit into 64 bits


@dataclass(frozen=True)
class Document:
    """What a configuration says, and who says it: a line of a file, or an override of the command line."""

    data: Any
    source: str
    lines: dict[Where, int] = field(default_factory=dict)
    overrides: tuple[tuple[Where, str], ...] = ()

    def override(self, kind: Any, assignments: Sequence[str]) -> Document:
        """With `key=value` each applied. `kind` is what the document will be, which tells where a string may be opened."""
        data, said = self.data, list(self.overrides)
        for assignment in assignments:
            where, value = _parsed(assignment)
            data = _assign(data, where, value, _Assignment(assignment, kind, where))
            said.append((_keys(where), assignment))
        return replace(self, data=data, overrides=tuple(said))

    def validate(self, kind: Any) -> Any:
        """As a strictly typed `kind`; FettleError lists every problem with its place and key."""
        if problems := [f"{self.place(where)}: {what}" for where, what in _unfit(self.data, ())]:
            raise FettleError("\n".join(problems))
        try:
            return TypeAdapter(kind).validate_json(orjson.dumps(self.data), strict=True)
        except ValidationError as error:
            found = _roots(error.errors())
            raise FettleError("\n".join(dict.fromkeys(_sentence(e, kind, self) for e in found))) from None

    def place(self, where: Where) -> str:
        """Who says what stands at `where`: an override, or the file, at the line of the nearest key around it."""
        for key, assignment in reversed(self.overrides):
            if where[: len(key)] == key:
                return f"override '{assignment}'"
        line = next((self.lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self.lines), None)
        inside = [f"'{assignment}'" for key, assignment in self.overrides if where and key[: len(where)] == where]
        return self.source + (f":{line}" if line else "") + (f" with {', '.join(inside)}" if inside else "")

    def placed(self, sentence: str, above: Where = ()) -> str:
        """A sentence about a part of the document ('edits.0.targets: ...', below `above`) with the place of that part."""
        where = _locate((*above, *_keys(sentence.partition(":")[0].split("."))), self.data)
        return f"{self.place(where)}: {sentence}" if len(where) > len(above) else sentence


def read(path: Path) -> Document:
    """A YAML file whose top is a mapping."""
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise FettleError(f"{path}: expected a mapping of keys at the top, found {type(data).__name__}")
    return Document(data, str(path), lines)


def validate(kind: Any, data: Any, source: str) -> Any:
    """`data` (plain JSON types) as a strictly typed `kind`; FettleError lists every problem with its key."""
    return Document(data, source).validate(kind)


def read_yaml(path: Path) -> tuple[Any, dict[Where, int]]:
    """A YAML 1.2 document as plain objects, and the line of every key in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FettleError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FettleError(f"{path}: cannot be read ({error})") from None
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
        data = yaml.load(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FettleError(f"{path}{line}: not valid YAML: {(error.problem or str(error)).splitlines()[0]}") from None
    except YAMLError as error:  # a character that YAML does not allow
        raise FettleError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return data, dict(_lines(node, ()))


def _lines(node: Node | None, where: Where) -> Any:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield (*where, key.value), key.start_mark.line + 1
            yield from _lines(value, (*where, key.value))
    elif isinstance(node, SequenceNode):
        for i, value in enumerate(node.value):
            yield (*where, i), value.start_mark.line + 1
            yield from _lines(value, (*where, i))


def _keys(words: Sequence[str]) -> Where:
    return tuple(int(word) if _is_index(word) else word for word in words)


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdecimal()


@dataclass(frozen=True)
class _Assignment:
    """An override on its way to its place."""

    text: str
    kind: Any
    where: list[str]


def _parsed(assignment: str) -> tuple[list[str], Any]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise FettleError(f"override '{assignment}': expected key=value, as in optim.lr=1e-4")
    try:
        return key.split("."), YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise FettleError(f"override '{assignment}': the value is not valid YAML ({error.problem})") from None
    except YAMLError as error:
        raise FettleError(
            f"override '{assignment}': the value is not valid YAML ({' '.join(str(error).split())})"
        ) from None


def _assign(data: Any, path: list[str], value: Any, whole: _Assignment) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(data, list):
        if not _is_index(head) or int(head) >= len(data):
            raise FettleError(f"override '{whole.text}': '{head}' is not an index into a list of {len(data)}")
        return [_assign(v, rest, value, whole) if i == int(head) else v for i, v in enumerate(data)]
    if isinstance(data, str):  # where a string stands for a mapping, as in model: fettle/tiny, it becomes that
        keys = plain_at(whole.kind, whole.where[: -len(path)])
        data = {keys[0]: data} if keys else data
    if data is not None and not isinstance(data, dict):
        raise FettleError(f"override '{whole.text}': '{head}' lies inside a plain value")
    data = data or {}
    return {**data, head: _assign(data.get(head), rest, value, whole)}


def _unfit(data: Any, where: Where) -> Iterator[tuple[Where, str]]:
    """What YAML can say and no part of a recipe can hold: (place, sentence)."""
    name = ".".join(map(str, where))
    match data:
        case dict():
            for key, value in data.items():
                if not isinstance(key, str):
                    yield where, f"{name}: the key {key!r} is not text; put it in quotes".removeprefix(": ")
                else:
                    yield from _unfit(value, (*where, key))
        case list() | tuple():
            for i, value in enumerate(data):
                yield from _unfit(value, (*where, i))
        case float() if not math.isfinite(data):
            yield where, f"{name}: expected a finite number, found {data}"
        case int() if not SMALLEST <= data <= LARGEST:
            yield where, f"{name}: expected an integer of at most 64 bits, found {data}"
        case None | bool() | int() | float() | str():
            pass
        case _:
            found = f"{data!s:.60} ({type(data).__name__})"
            yield where, f"{name}: expected text, a number or true/false, found {found}; put it in quotes"


def _roots(errors: Sequence[Any]) -> list[Any]:
    """Without those about a whole (too few items) of which a part has an error of its own."""
    places = [e["loc"] for e in errors]
    return [e for e in errors if not any(p[: len(e["loc"])] == e["loc"] and len(p) > len(e["loc"]) for p in places)]


def _sentence(error: Any, kind: Any, document: Document) -> str:
    where = _locate(error["loc"], document.data)
    name = ".".join(map(str, where))
    last = str(error["loc"][-1]) if error["loc"] else ""
    place = document.place(where)
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key '{name}': {nearest(last, fields_at(kind, error['loc'][:-1]))}"
        case "missing":
            return f"{place}: the key '{last}' is missing{f' in {name}' if name else ''}"
        case "union_tag_invalid":
            tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
            what = f"unknown kind '{tag}'" if tag else "the key 'kind' is missing"
            place = document.place((*where, "kind")) if tag else place
            return f"{place}: {f'{name}: ' if name else ''}{what}: {nearest(tag, known)}"
        case "value_error":
            return f"{place}: {f'{name}: ' if name else ''}{error['msg'].removeprefix('Value error, ')}"
    found = orjson.dumps(error["input"], default=str).decode()[:60]
    return f"{place}: {name}: {error['msg'][0].lower()}{error['msg'][1:]}; found {found}"


def _locate(loc: Sequence[str | int], data: Any) -> Where:
    """The part of a pydantic location that exists in the document (union tags do not)."""
    where: list[str | int] = []
    for step in loc:
        if (
            isinstance(data, dict)
            and step in data
            or isinstance(data, list)
            and isinstance(step, int)
            and step < len(data)
        ):
            data = data[step]  # type: ignore[index]
            where.append(step)
    return tuple(where)


def load(kind: Any, path: Path, overrides: Sequence[str] = ()) -> Any:
    """Read, override and validate a YAML file as `kind`."""
    return read(path).override(kind, overrides).validate(kind)
