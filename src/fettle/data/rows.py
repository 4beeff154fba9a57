"""The rows of a source, wherever they lie; and what two sources have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from fettle.core.errors import FettleError
from fettle.core.files import sha256
from fettle.data import hub
from fettle.data.folders import files
from fettle.data.read import Row, read
from fettle.data.spec import DataSpec
from fettle.data.streams import Advance


def rows_of(spec: DataSpec, advance: Advance | None = None) -> Iterator[Row]:
    """Every row of a source, or the first `limit` of them.

    FettleError where a file or stream ends in the middle: what is lost there cannot be counted, so that no share of bad
    rows can be kept to but `max_bad: 1`, which takes what there is.
    """
    for row in islice(hub.rows(spec) if spec.is_hub else read(spec.path, spec.documents, advance), spec.limit):
        if row.lost and spec.max_bad < 1:
            raise FettleError(
                f"{row.where}: {row.problem}; how many rows are lost with it cannot be told, so max_bad: {spec.max_bad:g} "
                "cannot be kept to; mend the file, or say max_bad: 1 to take what there is"
            )
        yield row


def require_sources(key: str, sources: Sequence[DataSpec]) -> None:
    """FettleError, by its key, where a source's files are not there."""
    for i, source in enumerate(sources):
        try:
            if not source.is_hub:
                files(source.path)
        except FettleError as error:
            raise FettleError(f"{key}.{i}.path: {error}") from None


def shared(source: DataSpec, others: Sequence[DataSpec]) -> str | None:
    """What a source has in common with others: a split of a hub data set, or a file of the same content under any name."""
    if source.is_hub:
        here = (source.path, source.name, source.split)
        return source.path if here in [(other.path, other.name, other.split) for other in others] else None
    theirs = [file for other in others if not other.is_hub for file in files(other.path)]
    return next((str(file) for file in files(source.path) if any(_same(file, other) for other in theirs)), None)


def _same(a: Path, b: Path) -> bool:
    return a.samefile(b) or (a.stat().st_size == b.stat().st_size and sha256(a) == sha256(b))
