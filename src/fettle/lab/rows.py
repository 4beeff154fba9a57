"""JSONL files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fettle.core.files import sync


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line (UTF-8, keys in their order) and return the number of rows.

    Rows are streamed to a file beside `path`, synced and renamed, so a reader sees the old file or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)
    return count
