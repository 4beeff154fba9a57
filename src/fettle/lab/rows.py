"""JSONL files that are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fettle.core.files import new_file


def write_rows(path: str | Path, rows: Iterable[dict]) -> int:
    """Write one JSON object a line (UTF-8, keys in their order) and return the number of rows, streamed to disk."""
    count = 0
    with new_file(Path(path)) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count
