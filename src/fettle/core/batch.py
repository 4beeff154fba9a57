"""A batch is a forest: one row of exactly T tokens, cut into segments that see themselves and their ancestors.

Shapes: T tokens of a batch, S segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fettle.core.errors import FettleError

IGNORE = -100  # a target where nothing is learned


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a row; sees itself (causally or both ways) and all of its ancestors."""

    start: int
    stop: int
    parent: int = -1  # index of the segment whose tokens, and ancestors', it sees; -1 for none
    causal: bool = True


@dataclass(frozen=True)
class Node:
    """One segment of an example before packing: token ids int32 [n], and weights float32 [n].

    `weights[i]` is the weight of token i *as a target*, that is of predicting it from what comes
    before it; 0 where nothing is learned. Where `marks` int64 [n] are given, token i is to be marked
    with `marks[i]` (IGNORE for none) at its own place instead, and `weights[i]` is the weight of that.
    `types` int64 [n] are the token types of models that have them (0 where left out).
    """

    tokens: np.ndarray
    weights: np.ndarray
    parent: int = -1
    causal: bool = True
    marks: np.ndarray | None = None
    types: np.ndarray | None = None


@dataclass(frozen=True)
class Example:
    """A tree of nodes, parents before children, with the name of where it comes from (`file:line`).

    `extra` are facts of the example as a whole, as its label; a batch stacks them by key, in order.
    """

    nodes: tuple[Node, ...]
    name: str = ""
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(node.tokens) for node in self.nodes)


@dataclass
class Batch:
    """One row of T tokens. `names[s]` is the example that segment s came from; '' for padding.

    `extra` holds what its examples bring, stacked [E, ...] over E examples, and "types" int64 [T] where nodes have them.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    targets: Tensor  # int64 [T]: the token to predict *at* this position, IGNORE where nothing is learned
    weights: Tensor  # float32 [T]: weight of each target
    segments: tuple[Segment, ...]
    names: tuple[str, ...] = ()
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def useful(self) -> int:
        """Tokens that are not padding."""
        return sum(s.stop - s.start for s, name in zip(self.segments, self.names, strict=True) if name)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        move = {k: v.to(device, non_blocking=True) for k, v in self.extra.items()}
        tokens, positions, targets, weights = (
            t.to(device, non_blocking=True) for t in (self.tokens, self.positions, self.targets, self.weights)
        )
        return Batch(tokens, positions, targets, weights, self.segments, self.names, move)


def pack(examples: list[Example], length: int, pad: int) -> Batch:
    """Lay examples into one row of `length` tokens; the tail is a segment that nobody sees, all at position 0.

    A node's first token is predicted from the last token of its parent. One position predicts one
    token, so where a prompt has several children its builder cuts the prompt one token short and
    puts that token at the head of each child, with weight 0: the same paths, one prediction each.
    """
    tokens = np.full(length, pad, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    targets = np.full(length, IGNORE, dtype=np.int64)
    weights = np.zeros(length, dtype=np.float32)
    segments: list[Segment] = []
    names: list[str] = []
    at = 0
    for example in examples:
        base = len(segments)
        for node in example.nodes:
            n = len(node.tokens)
            if at + n > length:
                raise FettleError(
                    f"{example.name}: {len(example)} tokens do not fit into what is left of a row of {length}"
                )
            parent = base + node.parent if node.parent >= 0 else -1
            first = int(positions[segments[parent].stop - 1]) + 1 if parent >= 0 else 0
            tokens[at : at + n] = node.tokens
            positions[at : at + n] = np.arange(first, first + n)
            learn = node.weights > 0
            if node.marks is not None:
                targets[at : at + n] = np.where(learn, node.marks, IGNORE)
                weights[at : at + n] = np.where(node.marks != IGNORE, node.weights, 0)
            else:
                targets[at : at + n - 1] = np.where(learn[1:], node.tokens[1:], IGNORE)
                weights[at : at + n - 1] = node.weights[1:]
            if parent >= 0 and n and learn[0] and node.marks is None:
                last = segments[parent].stop - 1
                if targets[last] != IGNORE:
                    raise FettleError(
                        f"{example.name}: two segments ask the same position to predict their first token"
                    )
                targets[last], weights[last] = node.tokens[0], node.weights[0]
            segments.append(Segment(at, at + n, parent, node.causal))
            names.append(example.name or "?")
            at += n
    if at < length:
        segments.append(Segment(at, length))
        names.append("")
    make = torch.from_numpy
    extra = _extra(examples, length)
    return Batch(make(tokens), make(positions), make(targets), make(weights), tuple(segments), tuple(names), extra)


def without_padding(batch: Batch) -> Batch:
    """The batch without the tail that nobody sees."""
    if not batch.names or batch.names[-1]:
        return batch
    end = batch.segments[-1].start
    tokens, positions, targets, weights = (
        t[:end] for t in (batch.tokens, batch.positions, batch.targets, batch.weights)
    )
    extra = {key: value[:end] if key == "types" else value for key, value in batch.extra.items()}
    return Batch(tokens, positions, targets, weights, batch.segments[:-1], batch.names[:-1], extra)


def in_rows(examples: Iterable[Example], length: int) -> Iterator[list[Example]]:
    """Examples, in order, in groups of at most `length` tokens; a longer one stands alone."""
    group: list[Example] = []
    held = 0
    for example in examples:
        if group and held + len(example) > length:
            yield group
            group, held = [], 0
        group.append(example)
        held += len(example)
    if group:
        yield group


def _extra(examples: list[Example], length: int) -> dict[str, Tensor]:
    """What the examples of a row bring beside tokens: stacked by key, and the types of its tokens."""
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in examples for key in example.extra):
        lacking = next((example.name for example in examples if key not in example.extra), None)
        if lacking is not None:
            raise FettleError(f"{lacking}: has no '{key}', which other examples of its batch have")
        found[key] = torch.from_numpy(np.stack([example.extra[key] for example in examples]))
    nodes = [node for example in examples for node in example.nodes]
    if any(node.types is not None for node in nodes):
        types = [np.zeros(len(n.tokens), np.int64) if n.types is None else n.types for n in nodes]
        row = np.concatenate(types)
        found["types"] = torch.from_numpy(np.pad(row, (0, length - len(row))).astype(np.int64))
    return found


def with_prefix(batch: Batch, length: int) -> Batch:
    """The batch with `length` virtual tokens in front, a root that all others get as their parent; positions move by as many.

    The new tokens have the id 0 and no target; their segment has no name, so they do not count as useful.
    """
    moved = [Segment(s.start + length, s.stop + length, s.parent + 1, s.causal) for s in batch.segments]
    tokens, targets, weights = (
        torch.cat([t.new_full((length,), blank), t])
        for t, blank in ((batch.tokens, 0), (batch.targets, IGNORE), (batch.weights, 0))
    )
    positions = torch.cat([torch.arange(length).to(batch.positions), batch.positions + length])
    segments = (Segment(0, length), *moved)
    return Batch(tokens, positions, targets, weights, segments, ("", *batch.names), batch.extra)


def ancestors(segments: tuple[Segment, ...], index: int) -> list[int]:
    """Segment `index` and its ancestors, root first."""
    path = [index]
    while segments[path[-1]].parent >= 0:
        path.append(segments[path[-1]].parent)
    return path[::-1]


def visible(segments: tuple[Segment, ...], length: int) -> Tensor:
    """bool [T, T]: whether query row i sees key column j. The definition that every attention backend must agree with."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for index, segment in enumerate(segments):
        rows = slice(segment.start, segment.stop)
        size = segment.stop - segment.start
        own = torch.ones(size, size, dtype=torch.bool)
        mask[rows, rows] = own.tril() if segment.causal else own
        for above in ancestors(segments, index)[:-1]:
            mask[rows, segments[above].start : segments[above].stop] = True
    return mask
