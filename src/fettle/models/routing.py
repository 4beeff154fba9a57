"""Routing: which of several owners (adapters, tenants) each token of a batch has, in forest batches and in plain ones.

A layer sees tokens [..] of some shape and asks for what is to be done with them; the answer is built once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.models import prompt
from fettle.models.forest import Forest

T = TypeVar("T")
Route = Callable[[torch.Size, torch.device], T]  # from the shape of a layer's tokens


@dataclass(frozen=True)
class Routes(Generic[T]):
    """Owners by name; `build` makes what a layer needs from the owner of each token, -1 for none. `kind` is for sentences."""

    forest: Forest
    names: tuple[str, ...]
    build: Callable[[np.ndarray, torch.device], T]
    kind: str

    def by_segment(self, batch: Batch, names: Sequence[str | None]) -> Route[T]:
        """An owner, or none, for each segment of a forest batch. FettleError where tokens cannot be told apart."""
        front = prompt.active(self.forest.model)
        if front is not None and front.heads is None:
            raise FettleError(
                f"{self.kind}: the rows of a soft prompt stand once before all texts of a batch, so they cannot have what "
                "each has; use one at a time, or route_rows with plain batches"
            )
        if self.forest.backend == "paths":
            raise FettleError(
                f"{self.kind}: {type(self.forest.model).__name__} runs a batch path by path, so tokens cannot be told apart "
                "in it; use one at a time"
            )
        if len(names) != len(batch.segments):
            raise FettleError(f"{self.kind}: {len(names)} names for {len(batch.segments)} segments; give one for each")
        ahead = 0 if front is None else front.length  # the places of a deep prompt, whose states no layer computes
        owners = np.full(ahead + len(batch.tokens), -1)
        for segment, name in zip(batch.segments, names, strict=True):
            owners[ahead + segment.start : ahead + segment.stop] = -1 if name is None else self.index(name)
        return self._route(lambda shape: owners)

    def by_row(self, names: Sequence[str | None]) -> Route[T]:
        """An owner, or none, for each row of plain batches [rows, length], as in generation."""
        rows = np.array([-1 if name is None else self.index(name) for name in names])
        return self._route(
            lambda shape: np.repeat(rows, shape[1]) if len(shape) == 2 and shape[0] == len(rows) else rows[:0]
        )

    def index(self, name: str) -> int:
        """The number of an owner. FettleError where there is none called so."""
        if name not in self.names:
            raise FettleError(f"{self.kind}: there is none called '{name}'; {nearest(name, self.names)}")
        return self.names.index(name)

    def _route(self, owners: Callable[[torch.Size], np.ndarray]) -> Route[T]:
        kept: dict[tuple[torch.Size, torch.device], T] = {}

        def of(shape: torch.Size, device: torch.device) -> T:
            if (shape, device) not in kept:
                found = owners(shape)
                if len(found) != shape.numel():
                    raise FettleError(
                        f"{self.kind}: a layer sees {tuple(shape)} tokens, which are not those of the batch that was routed; "
                        "route every batch, and use one at a time for layers that see a part of it (experts)"
                    )
                kept[shape, device] = self.build(found, device)
            return kept[shape, device]

        return of
