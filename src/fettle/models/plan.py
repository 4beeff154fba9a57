"""Plan: the segments of one batch in the forms that attention backends need, each built once a batch.

Shapes: T tokens of the row; of a bucket: N tiles, L query rows, S key columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import Batch, Segment, ancestors, visible

TILE = 256  # most query rows of a tile
SCORES = 1 << 22  # most scores of one head in one bucket


@dataclass(frozen=True)
class Tile:
    """Consecutive queries of one segment with all keys that any of them sees.

    The keys are those of the segment's path, root first, from number `first` on; query row i is number `at` + i of
    the same path.
    """

    start: int
    rows: int
    keys: np.ndarray
    first: int
    at: int
    causal: bool


@dataclass(frozen=True)
class Bucket:
    """N tiles of one padded shape (N, L, S).

    `queries` int64 [N*L] and `keys` int64 [N*S] say which tokens to gather; a tile that is smaller repeats its first
    query and key, so that nothing of another document comes near it. `spare` lists the rows of `queries` that only
    fill up. `bias` [N or 1, 1, L, S] is -inf where a key is not seen, else 0.
    """

    shape: tuple[int, int, int]
    queries: Tensor
    keys: Tensor
    spare: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Tiling:
    """All buckets of a row.

    `back` int64 [T]: the row of each token among the queries of all buckets in order; one past the last for padding.
    `key_back` the same among the keys, where each token is a key of one tile only; None where some are keys of several.
    """

    buckets: tuple[Bucket, ...]
    back: Tensor
    key_back: Tensor | None


class Plan:
    """Who sees whom in one batch.

    `positions` int64 [T] are those of the batch; `padding` are the segments whose result nobody reads. `states`
    [layers, 2, K, P, D] are keys and values that stand in the place of those of the first P tokens (deep soft prompts).
    """

    def __init__(
        self, segments: tuple[Segment, ...], positions: Tensor, padding: frozenset[int] = frozenset(),
        states: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.segments, self.positions, self.padding, self.states = segments, positions, padding, states
        self.length = len(positions)
        self._kept: dict[Any, Any] = {}

    @staticmethod
    def of(batch: Batch, states: Tensor | None = None) -> Plan:
        """The plan of a batch; segments without a name that nobody sees are padding."""
        seen = {segment.parent for segment in batch.segments}
        padding = frozenset(i for i, name in enumerate(batch.names) if not name and i not in seen)
        return Plan(batch.segments, batch.positions, padding, states)

    @property
    def is_flat(self) -> bool:
        """Whether no segment has a parent."""
        return all(segment.parent < 0 for segment in self.segments)

    def keep(self, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` returned the first time that this key was asked for."""
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """bool [T, T]: who is seen, and is nearer than `window` positions where the layer has one.

        A window bounds how far back a token sees; ahead, a segment that is not causal is seen to its end.
        """

        def build() -> Tensor:
            mask = visible(self.segments, self.length).to(device)
            if window is not None:
                at = self.positions.to(device)
                mask &= at[:, None] - at[None, :] < window
            return mask

        return self.keep(("mask", window, device), build)

    def tiling(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tiling:
        """The row cut into tiles, gathered into buckets of few shapes."""
        if window is not None and int(self.positions.max()) < window:
            window = None
        return self.keep(("tiling", window, dtype, device), lambda: self._tiling(window, dtype, device))

    def _tiling(self, window: int | None, dtype: torch.dtype, device: torch.device) -> Tiling:
        shapes: dict[tuple[int, int], list[Tile]] = {}
        for tile in self._tiles(window):
            shapes.setdefault((rounded(tile.rows), rounded(len(tile.keys))), []).append(tile)
        buckets: list[Bucket] = []
        back, key_back = np.full(self.length, -1), np.full(self.length, -1)
        row = column = uses = 0
        for (rows, columns), tiles in sorted(shapes.items()):
            most = max(1, SCORES // (rows * columns))
            for group in (tiles[i : i + most] for i in range(0, len(tiles), most)):
                for i, tile in enumerate(group):
                    back[tile.start : tile.start + tile.rows] = row + i * rows + np.arange(tile.rows)
                    key_back[tile.keys] = column + i * columns + np.arange(len(tile.keys))
                    uses += len(tile.keys)
                buckets.append(_bucket(group, rows, columns, window, dtype, device))
                row, column = row + len(group) * rows, column + len(group) * columns
        once = uses == int((key_back >= 0).sum())
        back[back < 0], key_back[key_back < 0] = row, column
        rows_of, columns_of = torch.from_numpy(back).to(device), torch.from_numpy(key_back).to(device)
        return Tiling(tuple(buckets), rows_of, columns_of if once else None)

    def _tiles(self, window: int | None) -> list[Tile]:
        tiles = []
        for index, segment in enumerate(self.segments):
            if index in self.padding or segment.stop == segment.start:
                continue
            path = [self.segments[i] for i in ancestors(self.segments, index)]
            keys = np.concatenate([np.arange(s.start, s.stop) for s in path])
            above = len(keys) - (segment.stop - segment.start)
            for start in range(segment.start, segment.stop, TILE):
                rows = min(TILE, segment.stop - start)
                at = above + start - segment.start
                first = 0 if window is None else max(0, at - window + 1)
                last = at + rows if segment.causal else len(keys)
                tiles.append(Tile(start, rows, keys[first:last], first, at, segment.causal))
        return tiles


def rounded(n: int, bound: int | None = None) -> int:
    """A length rounded up to one of few, so that a CPU's matrix library meets few shapes; not past what a model can see."""
    step = 32 if n <= 128 else 64 if n <= 512 else 128 if n <= 1024 else 512
    up = -(-n // step) * step
    return up if bound is None else max(n, min(up, bound))


def _bucket(
    tiles: list[Tile], rows: int, columns: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Bucket:
    queries, keys = np.empty((len(tiles), rows), np.int64), np.empty((len(tiles), columns), np.int64)
    for i, tile in enumerate(tiles):
        queries[i], keys[i] = tile.start, tile.keys[0]
        queries[i, : tile.rows] += np.arange(tile.rows)
        keys[i, : len(tile.keys)] = tile.keys
    spare = np.arange(rows)[None, :] >= np.array([t.rows for t in tiles])[:, None]
    if window is None and all(t.causal and t.at == 0 for t in tiles):
        seen = torch.ones(1, rows, columns, dtype=torch.bool, device=device).tril()  # one for all tiles
    else:
        seen = torch.from_numpy(_seen(tiles, rows, columns, window)).to(device)
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
    put = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return Bucket(
        (len(tiles), rows, columns), put(queries.ravel()), put(keys.ravel()), put(np.flatnonzero(spare)), bias[:, None]
    )


def _seen(tiles: list[Tile], rows: int, columns: int, window: int | None) -> np.ndarray:
    """bool [N, L, S]. Rows that only fill up see the first key, so that no row of a softmax is empty."""

    def each(values: list[int] | list[bool]) -> np.ndarray:
        return np.array(values)[:, None, None]

    row, column = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
    query, key = each([t.at for t in tiles]) + row, each([t.first for t in tiles]) + column
    seen = ((key <= query) | ~each([t.causal for t in tiles])) & (column < each([len(t.keys) for t in tiles]))
    if window is not None:
        seen &= query - key < window
    return seen | ((row >= each([t.rows for t in tiles])) & (column == 0))
