"""Which examples lie in which row: best fit, computed from lengths alone.

Examples are placed in their shuffled order, each into the open row that it fills best. Placing the longest first would
pack a little tighter, but then the examples of a row would be of one length, and so often of one kind: a batch must be a
fair sample. At most OPEN rows are open at a time; the fullest closes. The rows are then shuffled, so that the rows that
closed last, which are the emptier ones, do not come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OPEN = 256


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
    count = 0  # of open rows

    def take(left: int) -> list[int]:
        nonlocal mask, count
        row = room[left].pop()
        count -= 1
        if not room[left]:
            del room[left]
            mask &= ~(1 << left)
        return row

    for i, size in enumerate(lengths.tolist()):
        fitting = mask >> size
        left = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        row = take(left) if fitting else []
        row.append(i)
        left -= size
        if not left:
            done.append(row)
            continue
        room.setdefault(left, []).append(row)
        mask |= 1 << left
        count += 1
        if count > OPEN:
            done.append(take((mask & -mask).bit_length() - 1))
    return done + [row for left in sorted(room) for row in room[left]]
