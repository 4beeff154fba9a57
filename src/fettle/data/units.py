"""Units: what is packed. A text longer than a row becomes several windows, a conversation too long is dealt with by policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fettle.core.errors import FettleError
from fettle.data.store import Store


@dataclass(frozen=True)
class Limit:
    """The most tokens of an example: what a row has room for, and what the model sees, a soft prompt's taken off."""

    row: int
    context: int | None = None  # None where there is no bound

    @property
    def tokens(self) -> int:
        """The lesser of both."""
        return self.row if self.context is None else min(self.row, self.context)

    @property
    def window(self) -> int:
        """Tokens of a window: as many as may be, or so many less that one more fits, where over a tenth of a row would be empty."""
        fits = self.row // self.tokens
        return self.tokens if fits * self.tokens >= 0.9 * self.row else self.row // (fits + 1)

    def __str__(self) -> str:
        return f"{self.tokens} tokens" + (", all that the model sees" if self.tokens < self.row else "")

    @property
    def advice(self) -> str:
        """What would raise it, before what else there is to do."""
        return "" if self.tokens < self.row else "raise batch.tokens, or "


@dataclass(frozen=True)
class Units:
    """Arrays over units: the example, and the tokens [start, stop) of it. `cut` and `dropped` are example numbers."""

    example: np.ndarray  # int64 [u]
    start: np.ndarray  # int64 [u]
    stop: np.ndarray  # int64 [u]
    cut: np.ndarray
    dropped: np.ndarray

    def __len__(self) -> int:
        return len(self.example)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [u]: tokens of each unit."""
        return self.stop - self.start


def windows(store: Store, limit: Limit) -> Units:
    """Texts cut into windows that fill a row. The last token of a window is the first of the next, so that each is learned once."""
    sizes, length = store.lengths, limit.window
    number = np.where(sizes <= length, 1, -(-(sizes - 1) // (length - 1)))
    example = np.repeat(np.arange(len(sizes)), number)
    nth = np.arange(len(example)) - np.repeat(np.cumsum(number) - number, number)
    start = nth * (length - 1)
    none = np.zeros(0, dtype=np.int64)
    return Units(example, start, np.minimum(start + length, sizes[example]), none, none)


def whole(store: Store, limit: Limit, policy: str, unseen: np.ndarray | None = None) -> Units:
    """Examples as they are; those over the limit dropped, cut at their end, or refused.

    `unseen` bool [n] are examples that count as too long besides, since no cut lets the model see all of them.
    """
    sizes, length = store.lengths, limit.tokens
    over = np.flatnonzero((sizes > length) if unseen is None else (sizes > length) | unseen)
    if len(over) and policy == "error":
        raise FettleError(
            f"{store.name(int(over[0]))}: {sizes[over[0]]} tokens are more than {limit}; {len(over)} of {len(sizes)} examples "
            f"are; {limit.advice}say long: drop or long: truncate"
        )
    if policy == "drop":
        keep, cut, dropped = np.setdiff1d(np.arange(len(sizes)), over), over[:0], over
    else:
        lost = np.array([i for i in over if not _learns(store, int(i), length)], dtype=np.int64)
        keep, cut, dropped = np.setdiff1d(np.arange(len(sizes)), lost), np.setdiff1d(over, lost), lost
    return Units(keep, np.zeros(len(keep), dtype=np.int64), np.minimum(sizes[keep], length), cut, dropped)


def _learns(store: Store, index: int, stop: int) -> bool:
    """Whether anything is learned in the first `stop` tokens."""
    return any(start < stop for start, _, _ in store.spans_of(index))
