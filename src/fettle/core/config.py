"""YAML to Spec: every error names the file, the line and the key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from fettle.core.errors import FettleError
from fettle.core.spec import fields_at, nearest

T = TypeVar("T")
Where = tuple[str | int, ...]  # a path of keys into a document


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


def override(data: Any, assignments: Sequence[str]) -> Any:
    """Apply `a.b.0.c=value` to a document, each value read as YAML; new keys are checked later like any other."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise FettleError(f"override '{assignment}': expected key=value, as in optim.lr=1e-4")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except MarkedYAMLError as error:
            raise FettleError(f"override '{assignment}': the value is not valid YAML ({error.problem})") from None
        data = _assign(data, key.split("."), value, assignment)
    return data


def _assign(data: Any, path: list[str], value: Any, assignment: str) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise FettleError(f"override '{assignment}': '{head}' is not an index into a list of {len(data)}")
        return [_assign(v, rest, value, assignment) if i == int(head) else v for i, v in enumerate(data)]
    if data is not None and not isinstance(data, dict):
        raise FettleError(f"override '{assignment}': '{head}' lies inside a plain value")
    data = data or {}
    return {**data, head: _assign(data.get(head), rest, value, assignment)}


def validate(kind: Any, data: Any, source: str, lines: dict[Where, int] | None = None) -> Any:
    """`data` (plain JSON types) as a strictly typed `kind`; FettleError lists every problem with its line and key."""
    try:
        return TypeAdapter(kind).validate_json(orjson.dumps(data), strict=True)
    except ValidationError as error:
        problems = [_sentence(e, kind, data, source, lines or {}) for e in error.errors()]
        raise FettleError("\n".join(dict.fromkeys(problems))) from None


def _sentence(error: Any, kind: Any, data: Any, source: str, lines: dict[Where, int]) -> str:
    where = _locate(error["loc"], data)
    line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), None)
    place = f"{source}:{line}" if line else source
    name = ".".join(map(str, where))
    last = str(error["loc"][-1]) if error["loc"] else ""
    match error["type"]:
        case "extra_forbidden":
            return f"{place}: unknown key '{name}': {nearest(last, fields_at(kind, error['loc'][:-1]))}"
        case "missing":
            return f"{place}: the key '{last}' is missing{f' in {name}' if name else ''}"
        case "union_tag_invalid":
            tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
            what = f"unknown kind '{tag}'" if tag else "the key 'kind' is missing"
            return f"{place}: {name}: {what}: {nearest(tag, known)}"
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
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        raise FettleError(f"{path}: expected a mapping of keys at the top, found {type(data).__name__}")
    return validate(kind, override(data, overrides), str(path), lines)
