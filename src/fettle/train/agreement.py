"""What a run was begun with and what it is resumed with must be the same: the recipe, the data's content, the parent.

{"recipe": {...}, "data": [[path, hash], ...], "parent": hash, or the hashes of a base and its tokenizer}     nothing else decides a run
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from fettle.core.errors import FettleError

NOTHING = "not given"


def require_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """FettleError naming what differs between a run in `folder` as it was begun and as it is asked for now."""
    before, after = (_flat(orjson.loads(orjson.dumps(made, default=str))) for made in (then, now))
    for key in dict.fromkeys([*after, *before]):
        old, new = before.get(key, NOTHING), after.get(key, NOTHING)
        if old != new:
            raise FettleError(f"{folder}: {_sentence(key, old, new, before, after)}")


def _sentence(key: str, old: Any, new: Any, before: dict[str, Any], after: dict[str, Any]) -> str:
    part, _, rest = key.partition(".")
    if part == "data":
        place = f"data.{rest.partition('.')[0]}.0"
        name = after.get(place, before.get(place))
        return (
            f"was written with other data ('{name}' has changed since); put it back, or start afresh in another output"
        )
    if part == "parent":
        return (
            "was written on another parent (the artifact of the stage before, or the base's weights or tokenizer, have changed "
            "since); put them back, or start afresh in another output"
        )
    return (
        f"was written by another recipe ({rest or key}: {old} then, {new} now); resume with the recipe of that run, "
        "or start afresh in another output"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by dotted name; an empty one is a leaf."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {}
    for key, item in inner:
        found |= _flat(item, f"{name}.{key}" if name else str(key))
    return found or {name: value}
