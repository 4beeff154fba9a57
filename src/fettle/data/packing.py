"""Which examples lie in which row: best fit, computed from lengths alone.

Examples come in their shuffled order. Within a window of WINDOW of them the longest is placed first, each into the row
that it fills best; rows that are nearly full close with the window, the others stay open for the next. The rows are then
shuffled, so that a batch says nothing about its place in the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 4096
CLOSE = 0.985  # a row at least this full is not worth keeping open


@dataclass(frozen=True)
class Plan:
    """`order[starts[r] : starts[r + 1]]` are the examples of row r."""

    order: np.ndarray  # int64 [n]
    starts: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """The examples of one row."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count) that depends on the seed alone, whatever the version of numpy (raw Philox bits, sorted)."""
    bits = np.random.Philox(np.random.SeedSequence([s & 0xFFFFFFFF for s in seed])).random_raw(count)
    return np.argsort(bits, kind="stable")


def plan(lengths: np.ndarray, capacity: int, packing: bool, *seed: int) -> Plan:
    """Rows for examples of `lengths` (each from 1 to capacity) in their given order; row order shuffled by `seed`."""
    rows = _best_fit(lengths, capacity) if packing else [[i] for i in range(len(lengths))]
    if packing:
        rows = [rows[i] for i in shuffled(len(rows), *seed)]
    starts = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(r) for r in rows], out=starts[1:])
    order = np.fromiter((i for r in rows for i in r), dtype=np.int64, count=len(lengths))
    return Plan(order, starts)


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    done: list[list[int]] = []
    room: dict[int, list[list[int]]] = {}  # by the room left: the open rows
    mask = 0  # bit c: some open row has c tokens of room
    keep = int(capacity * (1 - CLOSE))
    for begin in range(0, len(lengths), WINDOW):
        window = lengths[begin : begin + WINDOW]
        for i in np.argsort(-window, kind="stable").tolist():
            size = int(window[i])
            fitting = mask >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                row = room[left].pop()
                if not room[left]:
                    del room[left]
                    mask &= ~(1 << left)
            else:
                left, row = capacity, []
            row.append(begin + i)
            left -= size
            if left:
                room.setdefault(left, []).append(row)
                mask |= 1 << left
            else:
                done.append(row)
        for left in [c for c in room if c <= keep]:
            done += room.pop(left)
            mask &= ~(1 << left)
    return done + [row for left in sorted(room) for row in room[left]]
