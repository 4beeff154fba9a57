"""Reading back what was written: other code opens it and computes with it, and may fail in its own ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fettle.core import FettleError


@contextmanager
def reading(folder: Path, by: str) -> Iterator[None]:
    """Within it, `by` reads what is to become `folder`. FettleError where that fails, however it does."""
    try:
        yield
    except FettleError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise FettleError(
            f"{folder}: {by} could not read back what was written ({said}); nothing was written, so take another --to"
        ) from error
