"""Spec: a frozen, keyword-only object that is both the configuration and the thing configured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Where = tuple[str | int, ...]  # a path of keys into a document
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average: the share of what was that stays at a step


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
    plain: ClassVar[str | None] = None  # the key that a string in place of a mapping stands for, if one may


def refuse(problems: Iterable[tuple[Where, str]]) -> None:
    """For a Spec's own validator: every problem as an error of its place within the Spec, so that it gets that key's line."""
    found = [
        InitErrorDetails(type=PydanticCustomError("value_error", "{what}", {"what": what}), loc=where, input=None)
        for where, what in problems
    ]
    if found:
        raise ValidationError.from_exception_data("recipe", found)


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
    return {name for model in _models_at(annotation, where) for name in model.model_fields}


def plain_at(annotation: Any, where: Iterable[str | int]) -> list[str]:
    """The keys that a plain string may stand for at a place of such a document."""
    return list(dict.fromkeys(m.plain for m in _models_at(annotation, where) if m.plain))


def _models_at(annotation: Any, where: Iterable[str | int]) -> list[type[Spec]]:
    at = [annotation]
    for step in where:
        inner = [m for a in at for m in _models(a)]
        tagged = [m for m in inner if "kind" in m.model_fields and m.model_fields["kind"].default == step]
        named = [m.model_fields[step].annotation for m in inner if step in m.model_fields]
        at = tagged or named or at
    return [m for a in at for m in _models(a)]


def _models(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [m for inner in get_args(annotation) for m in _models(inner)]
