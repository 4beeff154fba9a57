"""Names of labels, collected from data where neither the recipe nor the checkpoint gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from fettle.core.errors import FettleError
from fettle.data.formats import to_sample
from fettle.data.forms import LABELLED
from fettle.data.parse import BadRow
from fettle.data.rows import rows_of
from fettle.data.spec import DataSpec

MOST = 1000  # labels; more are probably no labels
NUMBER = ("score",)  # the one output of a model that predicts a number


def label_names(sources: Sequence[DataSpec], task: str, multi: bool = False) -> tuple[str, ...]:
    """Every label of the sources: texts in alphabetical order ('O' first), or the numbers up to the highest.

    Numbers that are not whole give one output. FettleError where there are texts and numbers, or none, or too many.
    """
    texts: set[str] = set()
    numbers: set[float] = set()
    for spec in sources:
        if spec.template is not None:
            raise FettleError(f"{spec.path}: labels that a template makes are not collected; name them in model.labels")
        for label in _labels(spec, task):
            if isinstance(label, str):
                texts.add(label)
            elif isinstance(label, int | float):
                numbers.add(float(label))
            if len(texts) > MOST:
                raise FettleError(f"{spec.path}: more than {MOST} labels; if that is right, name them in model.labels")
    if texts and numbers:
        raise FettleError(
            f"data: some labels are texts ('{min(texts)}') and some are numbers ({min(numbers):g}); make them of one kind, or "
            "name them in model.labels"
        )
    if texts:
        return tuple(sorted(texts, key=lambda name: (name != "O", name)))
    if not numbers:
        raise FettleError(f"data: no labels were found for model.task: {task}; name them in model.labels")
    if task == "classify" and not multi and any(not n.is_integer() for n in numbers):
        return NUMBER
    if min(numbers) < 0 or max(numbers) >= MOST or any(not n.is_integer() for n in numbers):
        raise FettleError(
            f"data: labels from {min(numbers):g} to {max(numbers):g} are no numbers of labels; to predict a number, give one name "
            "alone, as in model.labels: [score]"
        )
    return tuple(str(i) for i in range(int(max(numbers)) + 1))


def _labels(spec: DataSpec, task: str) -> Iterator[Any]:
    format = next(name for name, of in LABELLED.items() if of == task)
    for row in rows_of(spec):
        try:
            sample = to_sample(row.value or {}, format)
        except BadRow:
            continue  # set aside, with its reason, when the data is encoded
        yield from chain(sample.tags, sample.label if isinstance(sample.label, list) else [sample.label])
