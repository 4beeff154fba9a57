"""Every edit there is, for the recipe's `edits:`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fettle.peft
import fettle.quantize  # noqa: F401 - importing a family makes its edits known
from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import one_of

AnyEdit = one_of(Edit)


@contextmanager
def naming(place: int, edit: Edit) -> Iterator[None]:
    """Within it, a FettleError begins with the key of the recipe that it is about: 'edits.0.targets: ...'."""
    try:
        yield
    except FettleError as error:
        sentence = str(error).removeprefix("edits: ")
        joint = "." if sentence.partition(":")[0] in type(edit).model_fields else ": "
        raise FettleError(f"edits.{place}{joint}{sentence}") from error
