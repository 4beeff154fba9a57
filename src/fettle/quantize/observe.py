"""The range of everything that a layer is given, batch after batch, in a histogram: what a static range is found on.

Min-max is exact. A percentile, and the range of the least squared error, are those of the histogram: BINS over [-R, R], R a
power of two that doubles when a value lies beyond it, two bins becoming one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid, affine, errors, search

BINS = 1 << 14
CHUNK = 1 << 20  # values counted at a time


class Observer:
    """Sees tensors, and says on which range a grid of them should lie."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.reach, self.counts = 0.0, torch.zeros(BINS, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        """Count the values of x. FettleError where one is not finite."""
        if not x.numel():
            return
        low, high = (float(end) for end in x.aminmax())
        if not math.isfinite(low + high):
            raise FettleError("activations: values that are not finite (NaN or infinity) on the calibration text")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-self.low, self.high))
        for chunk in x.detach().reshape(-1).split(CHUNK):
            found = torch.histc(chunk.float(), BINS, -self.reach, self.reach)
            self.counts += found.to(self.counts)

    def _widen(self, reach: float) -> None:
        if self.reach == 0.0:
            self.reach = 2.0 ** math.ceil(math.log2(max(reach, 1e-30)))
        while self.reach < reach:
            self.reach *= 2
            quarter = BINS // 4
            halved = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(halved, (quarter, quarter))

    def range(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, [1, 1] each. FettleError where nothing was seen."""
        if self.low > self.high:
            raise FettleError("activations: no value was seen, so there is no range; calibrate on text that reaches it")
        low, high = self._ends(grid) if grid.range == "percentile" else (self.low, self.high)
        ends = torch.tensor([[low]]), torch.tensor([[high]])
        if grid.range != "mse":
            return affine(*ends, grid)
        width = 2 * self.reach / BINS
        seen = self.counts.nonzero()[:, 0]
        middles, counts = ((seen + 0.5) * width - self.reach).float()[None], self.counts[seen][None]
        return search(*ends, grid, lambda s, z: (errors(middles, s, z, grid) * counts).sum(1, keepdim=True))

    def _ends(self, grid: Grid) -> tuple[float, float]:
        """By nearest rank, the outer edge of the bin that holds it: of |x| where the grid is symmetric, else of both ends."""
        half, width = BINS // 2, 2 * self.reach / BINS
        rank = max(1.0, math.ceil(float(self.counts.sum()) * grid.percentile / 100))
        if grid.symmetric:
            sizes = self.counts[half:] + self.counts[:half].flip(0)
            reach = (_bin_of(sizes, rank) + 1) * width
            return max(self.low, -reach), min(self.high, reach)
        low, high = _bin_of(self.counts.flip(0), rank), _bin_of(self.counts, rank)
        return max(self.low, self.reach - (low + 1) * width), min(self.high, (high + 1) * width - self.reach)


def _bin_of(counts: Tensor, rank: float) -> int:
    """The bin that holds the value of a rank, counted from 1."""
    return int(torch.searchsorted(counts.cumsum(0), torch.tensor(rank, dtype=counts.dtype)))
