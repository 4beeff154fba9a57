"""The rows of a file as samples of one format, encoded: for evaluations by a head, or of preferences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fettle.core import FettleError
from fettle.data.formats import Sample, to_sample
from fettle.data.parse import BadRow
from fettle.data.read import read
from fettle.data.template import Encoded
from fettle.evaluate.tasks import Evaluation, raise_problems, sampled


@dataclass(frozen=True)
class Asked:
    """One row: where it stands, what it says, and its tokens with their right labels."""

    where: str
    sample: Sample
    encoded: Encoded


def read_samples(
    spec: Evaluation,
    format: str,
    encode: Callable[[Sequence[Sample]], Sequence[Encoded | str]],
    dressed: Callable[[Sample], Sample] = lambda sample: sample,
) -> list[Asked]:
    """The rows that an evaluation takes; `encode` gives the tokens of a sample as it is `dressed`, or why it has none.

    FettleError names the rows that cannot be used.
    """
    samples: list[tuple[str, Sample]] = []
    problems: list[str] = []
    for row in read(spec.path):
        try:
            if row.value is None:
                raise BadRow(row.problem or "cannot be read")
            samples.append((row.where, dressed(to_sample(row.value, format))))
        except BadRow as problem:
            problems.append(f"{row.where}: {problem}")
    samples = sampled(samples, spec.limit, spec.seed)
    asked: list[Asked] = []
    for (where, sample), found in zip(samples, encode([s for _, s in samples]), strict=True):
        if isinstance(found, str):
            problems.append(f"{where}: {found}")
        else:
            asked.append(Asked(where, sample, found))
    raise_problems(spec.path, problems, "rows more that cannot be used")
    if not asked:
        raise FettleError(f"{spec.path}: no rows")
    return asked
