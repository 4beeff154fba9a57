"""Answers of an endpoint on disk, as they come, and what they cost.

A line of JSON an answer: {"key": the request's hash, "answer": ..}. Lines are only ever added, and each is on the disk before
the next request ends, so that whatever breaks off loses what was under way and nothing else. A torn line counts as absent.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from fettle.core.files import make_folder, writing


@dataclass
class Ledger:
    """What was asked for and what it took. `cost` is in the currency of the prices; `seconds` are summed over requests."""

    requests: int = 0
    retries: int = 0
    cached: int = 0  # answers that were there already
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0

    def plain(self) -> dict[str, float]:
        """As JSON writes it."""
        return asdict(self)


class Answers:
    """Answers by the hash of their request; in memory alone where there is no file. Safe to use from several threads."""

    def __init__(self, path: Path | None) -> None:
        self.path, self._lock = path, threading.Lock()
        self.known: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        for line in path.read_bytes().splitlines() if path is not None and path.exists() else ():
            try:
                row = orjson.loads(line)
                self.known[row["key"]] = row["answer"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                continue

    def keep(self, key: str, answer: dict[str, Any]) -> None:
        """Remember an answer, on the disk too."""
        with self._lock:
            self.known[key] = answer
            if self.path is None:
                return
            with writing(self.path):
                if self._file is None:
                    make_folder(self.path.parent)
                    torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
                    self._file = open(self.path, "ab")
                    if torn:
                        self._file.write(b"\n")
                self._file.write(orjson.dumps({"key": key, "answer": answer}, option=orjson.OPT_APPEND_NEWLINE))
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def hashed(request: Any) -> str:
    """The key of a request: SHA-256 of its JSON with sorted keys."""
    return hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS)).hexdigest()
