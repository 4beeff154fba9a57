"""Metrics of a step: sums over its batches and processes, each divided by the count that it belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.core.families import Loss
from fettle.train.parallel import World


class Sums:
    """Sums and counts by name, float64 on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, loss: Loss, share: float = 1.0) -> None:
        """Add a batch's metrics, `share` times. A metric is a sum over the loss's own count, or a pair (sum, count)."""
        for key, value in loss.metrics.items():
            total, count = value if isinstance(value, tuple) else (value, loss.count)
            self.sums[key] = self.sums.get(key, self._zero()) + share * total
            self.counts[key] = self.counts.get(key, self._zero()) + share * count

    def agree(self, world: World) -> None:
        """Have the same names on every process, in one order."""
        if world.size == 1:
            return
        names = sorted({name for found in world.gather(list(self.sums)) for name in found})
        self.sums = {name: self.sums.get(name, self._zero()) for name in names}
        self.counts = {name: self.counts.get(name, self._zero()) for name in names}

    @property
    def tensors(self) -> list[Tensor]:
        """What the processes add up."""
        return [*self.sums.values(), *self.counts.values()]

    def means(self) -> dict[str, float]:
        """Each metric as a mean; of one that nothing counted nothing is said."""
        return {
            name: (total / self.counts[name]).item() for name, total in self.sums.items() if self.counts[name] or total
        }

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)
