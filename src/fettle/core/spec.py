"""Spec: a frozen, keyword-only object that is both the configuration and the thing configured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Tag


def nearest(word: str, known: Iterable[str]) -> str:
    """A closing clause for an error: the nearest right spelling of `word`, or all that is known."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known) if known else "nothing is known here"


class Spec(BaseModel):
    """Base of every part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def concrete(family: type[Spec]) -> dict[str, type[Spec]]:
    """Every subclass of `family` that has a kind of its own, by that kind."""
    found: dict[str, type[Spec]] = {}
    for sub in family.__subclasses__():
        found |= concrete(sub)
        if "kind" in sub.model_fields and isinstance(kind := sub.model_fields["kind"].default, str):
            found[kind] = sub
    return found


def one_of(family: type[Spec], default: str | None = None) -> Any:
    """The type of a field that holds any concrete member of `family`, picked by its `kind`.

    Call it once all members are imported. `default` is the kind taken where the key is left out.
    """
    members = concrete(family)

    def kind_of(data: Any) -> str:
        return str(data.get("kind", default or "") if isinstance(data, dict) else getattr(data, "kind", ""))

    tagged = tuple(Annotated[member, Tag(kind)] for kind, member in sorted(members.items()))
    return Annotated[Union[tagged], Discriminator(kind_of)]


def fields_at(annotation: Any, where: Iterable[str | int]) -> set[str]:
    """The keys that a document of type `annotation` may have at a pydantic location `where`."""
    at = [annotation]
    for step in where:
        inner = [m for a in at for m in _models(a)]
        tagged = [m for m in inner if "kind" in m.model_fields and m.model_fields["kind"].default == step]
        named = [m.model_fields[step].annotation for m in inner if step in m.model_fields]
        at = tagged or named or at
    return {name for a in at for m in _models(a) for name in m.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models(inner)]
