"""Rows of a data set on the Hugging Face hub, streamed, by the `datasets` library (an extra)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fettle.core.errors import FettleError
from fettle.data.read import Row, call_columns, stated
from fettle.data.spec import DataSpec


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise FettleError(
            "data from the hub (hf://...) needs the library 'datasets'; install it with: pip install 'fettle[hub]'"
        ) from None
    return datasets


def commit(spec: DataSpec) -> str:
    """The commit that a hub source means now, so that the cache knows when it changed."""
    _library()
    from huggingface_hub import HfApi

    name = spec.path.removeprefix("hf://")
    try:
        return str(HfApi().dataset_info(name, revision=spec.revision).sha)
    except Exception as error:
        raise FettleError(
            f"{spec.path}: the hub does not give this data set ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None


def rows(spec: DataSpec) -> Iterator[Row]:
    """Every row of a hub data set; its 'line' is its number, from 1. A row that the library cannot read ends the stream."""
    name = spec.path.removeprefix("hf://")
    try:
        found = _library().load_dataset(name, spec.name, split=spec.split, revision=spec.revision, streaming=True)
    except FettleError:
        raise
    except Exception as error:
        raise FettleError(
            f"{spec.path}: cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None
    features = getattr(found, "features", None)  # None where the library knows them only once it has read the rows
    columns = None if features is None else call_columns(features.arrow_schema)
    number, stream = 0, iter(found)
    while True:
        number += 1
        try:
            value = next(stream, None)
        except Exception as error:
            yield Row(
                f"{spec.path}:{number}",
                problem=f"the stream fails here; what follows is lost ({type(error).__name__}: {error})",
                lost=True,
            )
            return
        if value is None:
            return
        yield Row(f"{spec.path}:{number}", value=stated(dict(value), value if columns is None else columns))
