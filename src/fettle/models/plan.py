"""Plan: the segments of one batch in the forms that attention backends need, each built once a batch.

Shapes: T tokens of the row; of a bucket: N tiles, L query rows, S key columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fettle.core.batch import Batch, Segment, ancestors, visible

TILE = 128  # query rows of a tile that sees few keys; of one that sees many, twice as many
SCORES = 1 << 18  # scores of one head in one bucket, about: all heads of it then fit a core's share of the cache


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
    """N tiles of one padded shape (N, L, S), for each of H query heads and K key heads.

    `queries` int64 [N*H*L] and `keys` int64 [N*K*S] are rows of tables [T*H, D] and [T*K, D]; a tile that is smaller
    repeats its first query and key, so that nothing of another document comes near it; tiles that only make up the number
    are of the first tile's, and nobody reads them. `spare` lists those of `queries` that only fill up. `bias` [N or 1, 1, L, B]
    is of the last B columns: -inf where a key is not seen, else 0; all rows see all columns before.
    """

    shape: tuple[int, int, int]
    queries: Tensor
    keys: Tensor
    spare: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Bags:
    """Which rows of one table are summed to a row of another: for its row i those in `rows` from `starts[i]` on, or none."""

    rows: Tensor  # int64
    starts: Tensor  # int64

    def sum(self, x: Tensor) -> Tensor:
        """[len(starts), D] from x [.., D], summed in float32 or wider."""
        return nn.functional.embedding_bag(self.rows, x, self.starts, mode="sum")


@dataclass(frozen=True)
class Tiling:
    """All buckets of a row, and the way back: to a token's heads from all queries and from all keys of the buckets in order."""

    buckets: tuple[Bucket, ...]
    of_queries: Bags
    of_keys: Bags


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

    def tiling(self, window: int | None, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tiling:
        """The row cut into tiles, gathered into buckets of few shapes; `heads` of queries and of keys."""
        if window is not None and int(self.positions.max()) < window:
            window = None
        return self.keep(("tiling", window, heads, dtype, device), lambda: self._tiling(window, heads, dtype, device))

    def _tiling(self, window: int | None, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tiling:
        shapes: dict[tuple[int, int], list[Tile]] = {}
        for tile in self._tiles(window):
            shapes.setdefault((_fitted(tile.rows), _fitted(len(tile.keys))), []).append(tile)
        groups: list[tuple[np.ndarray, np.ndarray, Tensor]] = []
        for (rows, columns), tiles in sorted(shapes.items()):
            most = _counted(max(1, SCORES // (rows * columns)), up=False)
            for group in (tiles[i : i + most] for i in range(0, len(tiles), most)):
                count = _counted(len(group))
                queries = _filled([np.arange(t.start, t.start + t.rows) for t in group], rows, count)
                bias = _bias(group, rows, columns, window, dtype, device, count)
                groups.append((queries, _filled([t.keys for t in group], columns, count), bias))
        return Tiling(
            tuple(_bucket(*group, heads, device) for group in groups),
            _bags([queries for queries, _, _ in groups], self.length, heads[0], device),
            _bags([keys for _, keys, _ in groups], self.length, heads[1], device),
        )

    def _tiles(self, window: int | None) -> list[Tile]:
        tiles = []
        for index, segment in enumerate(self.segments):
            if index in self.padding or segment.stop == segment.start:
                continue
            path = [self.segments[i] for i in ancestors(self.segments, index)]
            keys = np.concatenate([np.arange(s.start, s.stop) for s in path])
            above = len(keys) - (segment.stop - segment.start)
            start = segment.start
            while start < segment.stop:
                at = above + start - segment.start
                rows = _height(at, segment.stop - start)
                first = 0 if window is None else max(0, at - window + 1)
                last = at + rows if segment.causal else len(keys)
                tiles.append(Tile(start, rows, keys[first:last], first, at, segment.causal))
                start += rows
        return tiles


def rounded(n: int, bound: int | None = None) -> int:
    """A length rounded up to one of few, so that a CPU's matrix library meets few shapes; not past what a model can see."""
    step = 32 if n <= 128 else 64 if n <= 512 else 128 if n <= 1024 else 512
    up = -(-n // step) * step
    return up if bound is None else max(n, min(up, bound))


def _height(at: int, left: int) -> int:
    """Rows of a tile, of `left` ones, that begins at key `at`: a causal one wastes half of its own square, a low one its gathers."""
    most = TILE if at < 4 * TILE else 2 * TILE
    return left if left <= 1.25 * most else most


def _fitted(n: int) -> int:
    """Little is added: soon a new shape costs the matrix library less than columns that nobody sees."""
    return -(-n // 32) * 32


def _counted(n: int, up: bool = True) -> int:
    """A number of tiles rounded up, or down, to one of few, two from each power of two to the next.

    The matrix library keeps half a megabyte for every shape that it has met in 16 bits, and a thousand of them.
    """
    step = 1 << max(0, (n - 1 if up else n).bit_length() - 2)
    return (-(-n // step) if up else n // step) * step


def _filled(rows: list[np.ndarray], width: int, count: int) -> np.ndarray:
    """int64 [count, width]: each row, with -1 behind it, and rows of -1 behind them all."""
    table = np.full((count, width), -1)
    for line, row in zip(table, rows, strict=False):
        line[: len(row)] = row
    return table


def _bucket(
    queries: np.ndarray, keys: np.ndarray, bias: Tensor, heads: tuple[int, int], device: torch.device
) -> Bucket:
    """Of tokens [N, L] and [N, S], -1 for none."""

    def of_heads(tokens: np.ndarray, many: int) -> Tensor:
        first = np.where(tokens[:, :1] < 0, tokens[0, 0], tokens[:, :1])
        tokens = np.where(tokens < 0, first, tokens)[:, None]
        return torch.from_numpy((tokens * many + np.arange(many)[:, None]).ravel()).to(device)

    (n, rows), columns = queries.shape, keys.shape[1]
    spare = torch.from_numpy(np.flatnonzero(np.repeat(queries[:, None] < 0, heads[0], 1))).to(device)
    return Bucket((n, rows, columns), of_heads(queries, heads[0]), of_heads(keys, heads[1]), spare, bias)


def _bags(tables: list[np.ndarray], length: int, heads: int, device: torch.device) -> Bags:
    """For each head of each token, row by row [T*heads], where it stands in tables [N, heads, W] of tokens [N, W], one after another."""
    token, first, step = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    begin = 0
    for table in tables:
        n, width = table.shape
        real = table >= 0
        row = begin + np.arange(n)[:, None] * heads * width + np.arange(width)
        token, first, step = [*token, table[real]], [*first, row[real]], [*step, np.full(real.sum(), width)]
        begin += table.size * heads
    tokens = np.concatenate(token)
    order = np.argsort(tokens, kind="stable")
    tokens, firsts, steps = tokens[order], np.concatenate(first)[order], np.concatenate(step)[order]
    counts = np.bincount(tokens, minlength=length)
    before = np.cumsum(counts) - counts
    head = np.arange(heads)[:, None]
    rows = np.empty(heads * len(tokens), np.int64)
    number = np.arange(len(tokens)) - before[tokens]  # of a use among those of its token
    rows[heads * before[tokens] + head * counts[tokens] + number] = firsts + head * steps
    starts = (heads * before + head * counts).T.ravel()
    return Bags(torch.from_numpy(rows).to(device), torch.from_numpy(starts).to(device))


def _bias(
    tiles: list[Tile], rows: int, columns: int, window: int | None, dtype: torch.dtype, device: torch.device, count: int
) -> Tensor:
    """[N or 1, 1, L, B] for `count` tiles, of which those behind `tiles` see all."""
    if window is None and all(t.causal and t.at == 0 for t in tiles):
        seen = torch.ones(1, rows, columns, dtype=torch.bool, device=device).tril()  # one for all tiles
    else:
        clear = 0 if window is not None else min(t.at if t.causal else len(t.keys) for t in tiles)
        of_tiles = _seen(tiles, rows, columns, clear, window)
        whole = np.ones((count, *of_tiles.shape[1:]), bool)
        whole[: len(tiles)] = of_tiles
        seen = torch.from_numpy(whole).to(device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None]


def _seen(tiles: list[Tile], rows: int, columns: int, clear: int, window: int | None) -> np.ndarray:
    """bool [N, L, S - clear] of the columns from `clear` on. Rows that only fill up see all, so that no row of a softmax is empty."""

    def each(values: list[int] | list[bool]) -> np.ndarray:
        return np.array(values)[:, None, None]

    row, column = np.arange(rows)[None, :, None], np.arange(clear, columns)[None, None, :]
    query, key = each([t.at for t in tiles]) + row, each([t.first for t in tiles]) + column
    seen = ((key <= query) | ~each([t.causal for t in tiles])) & (column < each([len(t.keys) for t in tiles]))
    if window is not None:
        seen &= query - key < window
    return seen | (row >= each([t.rows for t in tiles]))
