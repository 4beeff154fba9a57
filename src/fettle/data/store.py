"""Encoded examples on disk: written once, then memory-mapped.

A folder: tokens.bin (uint16 or int32, all examples end to end), and .npy arrays: offsets int64 [n + 1] into the tokens,
spans int32 [m, 2] and span_weights float32 [m] of what is learned, span_offsets int64 [n + 1] into those, splits int32 [n]
(where an example's second part begins, -1), labels float32 [l], label_offsets int64 [n + 1] into those, answers int32 [a]
(where the answers of a prompt begin), answer_offsets int64 [n + 1] into those, files int32, lines int64 and columns int32 [n]
(the row that an example comes from), parts int32 [n] (which example of its row), learned int64 [n];
set_aside.jsonl (the bad rows), and a manifest with counts and hashes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fettle.core.batch import Node
from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, verify, write_json
from fettle.data.read import place
from fettle.data.template import Encoded, Span, weights_of

ARRAYS = (
    "offsets", "spans", "span_weights", "span_offsets", "splits", "labels", "label_offsets", "answers", "answer_offsets",
    "files", "lines", "columns", "parts", "learned",
)  # fmt: skip
ASIDE = "set_aside.jsonl"


class Writer:
    """Fills a folder with examples. `vocabulary` decides the width of a token."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
        self.tokens = open(folder / "tokens.bin", "wb")
        self.aside = open(folder / ASIDE, "wb")
        self.names: dict[str, int] = {}
        self.offsets, self.span_offsets = array("q", [0]), array("q", [0])
        self.spans, self.weights = array("i"), array("f")
        self.splits, self.labels, self.label_offsets = array("i"), array("f"), array("q", [0])
        self.answers, self.answer_offsets = array("i"), array("q", [0])
        self.files, self.lines, self.columns = array("i"), array("q"), array("i")
        self.parts, self.learned = array("i"), array("q")

    def add(self, where: str, examples: list[Encoded]) -> None:
        """One row's examples; `where` is the row's."""
        file, line, column = place(where)
        number = self.names.setdefault(file, len(self.names))
        for part, example in enumerate(examples):
            self.tokens.write(example.tokens.astype(self.dtype).tobytes())
            self.offsets.append(self.offsets[-1] + len(example.tokens))
            for start, stop, weight in example.spans:
                self.spans.extend((start, stop))
                self.weights.append(weight)
            self.span_offsets.append(len(self.weights))
            self.splits.append(example.split)
            self.labels.extend(example.labels)
            self.label_offsets.append(len(self.labels))
            self.answers.extend(example.answers)
            self.answer_offsets.append(len(self.answers))
            self.learned.append(example.learned)
            self.files.append(number)
            self.lines.append(line)
            self.columns.append(column)
            self.parts.append(part if len(examples) > 1 else -1)

    def set_aside(self, where: str, reason: str, raw: str, value: Any) -> None:
        """A row that cannot be used."""
        line = {"where": where, "reason": reason, "row": value if value is not None else raw}
        self.aside.write(orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS))

    def stop(self) -> None:
        """Close the files, whether or not there is more to write."""
        self.tokens.close()
        self.aside.close()

    def close(self, manifest: dict[str, Any]) -> None:
        """Write the arrays and what the manifest says."""
        self.stop()
        columns: dict[str, array[Any]] = {
            "offsets": self.offsets, "spans": self.spans, "span_weights": self.weights, "span_offsets": self.span_offsets,
            "splits": self.splits, "labels": self.labels, "label_offsets": self.label_offsets,
            "answers": self.answers, "answer_offsets": self.answer_offsets,
            "files": self.files, "lines": self.lines, "columns": self.columns, "parts": self.parts, "learned": self.learned,
        }  # fmt: skip
        for name in ARRAYS:
            data = np.frombuffer(columns[name], dtype=np.dtype(columns[name].typecode))
            np.save(self.folder / f"{name}.npy", data.reshape(-1, 2) if name == "spans" else data)
        write_json(
            self.folder / MANIFEST, manifest | {"kind": "tokens", "dtype": self.dtype.name, "sources": list(self.names)}
        )


@dataclass
class Store:
    """Examples of one source, mapped from disk."""

    folder: Path
    manifest: dict[str, Any]
    tokens: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    span_weights: np.ndarray
    span_offsets: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    label_offsets: np.ndarray
    answers: np.ndarray
    answer_offsets: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    columns: np.ndarray
    parts: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each example."""
        return np.diff(self.offsets)

    def name(self, index: int) -> str:
        """The `where` of an example's row, with `#k` where the row gave several."""
        column, part = int(self.columns[index]), int(self.parts[index])
        where = f"{self.manifest['sources'][self.files[index]]}:{self.lines[index]}" + (f":{column}" if column else "")
        return where + (f"#{part + 1}" if part >= 0 else "")

    def tokens_of(self, index: int, stop: int | None = None) -> np.ndarray:
        """int32: an example's tokens, up to `stop`; a copy."""
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[begin : end if stop is None else min(begin + stop, end)].astype(np.int32)

    def spans_of(self, index: int) -> list[Span]:
        """What is learned of an example: (start, stop, weight)."""
        first, last = int(self.span_offsets[index]), int(self.span_offsets[index + 1])
        found = zip(self.spans[first:last], self.span_weights[first:last], strict=True)
        return [(int(a), int(b), float(w)) for (a, b), w in found]

    def encoded(self, index: int) -> Encoded:
        """An example as it was written."""
        return Encoded(
            self.tokens_of(index),
            tuple(self.spans_of(index)),
            split=int(self.splits[index]),
            labels=self.labels_of(index),
            answers=tuple(self.answers[int(self.answer_offsets[index]) : int(self.answer_offsets[index + 1])].tolist()),
        )

    def labels_of(self, index: int) -> tuple[float, ...]:
        """An example's labels."""
        return tuple(self.labels[int(self.label_offsets[index]) : int(self.label_offsets[index + 1])].tolist())

    def node(self, index: int, start: int = 0, stop: int | None = None) -> Node:
        """Tokens [start, stop) of an example, with their weights; the first is not learned."""
        tokens = self.tokens_of(index, stop)[start:]
        stop = start + len(tokens)
        spans = [
            (max(a - start, 0), min(b, stop) - start, w) for a, b, w in self.spans_of(index) if a < stop and b > start
        ]
        return Node(tokens, weights_of(len(tokens), spans))


def open_store(folder: Path) -> Store:
    """Map a folder that a Writer left; FettleError where it is damaged."""
    manifest = verify(folder)
    if manifest.get("kind") != "tokens":
        raise FettleError(f"{folder}: holds no encoded examples")
    dtype, size = np.dtype(manifest["dtype"]), (folder / "tokens.bin").stat().st_size
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if size else np.zeros(0, dtype)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    return Store(folder, manifest, tokens, **arrays)


def cached(cache: Path, key: str) -> Store | None:
    """The store of a key, if there is a whole one; a damaged one is removed from sight by being written anew."""
    folder = cache / key
    if not (folder / MANIFEST).exists():
        return None
    try:
        return open_store(folder)
    except FettleError:
        return None
