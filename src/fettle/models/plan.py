"""Plan: the segments of one batch in the forms that attention backends need, each built once a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.core.batch import Segment, ancestors, visible


class Plan:
    """Who sees whom in one batch. `positions` int64 [T] are those of the batch."""

    def __init__(self, segments: tuple[Segment, ...], positions: Tensor) -> None:
        self.segments, self.positions = segments, positions
        self.length = len(positions)
        self._kept: dict[object, object] = {}

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """bool [T, T]: visible, and nearer than `window` positions where the layer has one."""
        def build() -> Tensor:
            mask = visible(self.segments, self.length).to(device)
            if window is not None:
                at = self.positions.to(device)
                mask &= at[:, None] - at[None, :] < window
            return mask
        return self._keep(("mask", window, device), build)

    def pieces(self, device: torch.device):
        def build():
            found = []
            for i, segment in enumerate(self.segments):
                above = ancestors(self.segments, i)[:-1]
                if not above:
                    found.append((segment, slice(segment.start, segment.stop), None))
                    continue
                keys = torch.cat([torch.arange(self.segments[a].start, self.segments[a].stop) for a in [*above, i]])
                n = segment.stop - segment.start
                mask = torch.ones(n, len(keys), dtype=torch.bool)
                if segment.causal:
                    mask = mask.tril(len(keys) - n)
                found.append((segment, keys.to(device), mask.to(device)))
            return found
        return self._keep(("pieces", device), build)

    def _keep(self, key, build):
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]
