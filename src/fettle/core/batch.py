"""A batch is a forest: one row of exactly T tokens, cut into segments that see themselves and their ancestors.

Shapes: T tokens of a batch, S segments.
"""

from __future__ import annotations

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
    before it; 0 where nothing is learned.
    """

    tokens: np.ndarray
    weights: np.ndarray
    parent: int = -1
    causal: bool = True


@dataclass(frozen=True)
class Example:
    """A tree of nodes, parents before children, with the name of where it comes from (`file:line`)."""

    nodes: tuple[Node, ...]
    name: str = ""

    def __len__(self) -> int:
        return sum(len(node.tokens) for node in self.nodes)


@dataclass
class Batch:
    """One row of T tokens. `names[s]` is the example that segment s came from; '' for padding."""

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
    """Lay examples into one row of `length` tokens; the tail is a segment that nobody sees.

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
            targets[at : at + n - 1] = np.where(learn[1:], node.tokens[1:], IGNORE)
            weights[at : at + n - 1] = node.weights[1:]
            if parent >= 0 and n and learn[0]:
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
        positions[at:] = np.arange(length - at)
        segments.append(Segment(at, length))
        names.append("")
    make = torch.from_numpy
    return Batch(make(tokens), make(positions), make(targets), make(weights), tuple(segments), tuple(names))


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
