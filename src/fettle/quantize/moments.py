"""What calibration knows of a layer's input: moments of x over the tokens of the text, and a few of its rows.

    H = mean x x'  [K, K]      |W - V|_H^2 = tr (W - V) H (W - V)' = mean |W x - V x|^2

so that the output error of any other weight V is known without the text, for every token of it at once. H is half of
the Hessian of GPTQ's layer-wise objective (Frantar et al. 2022, arXiv 2210.17323, whose factor 2 cancels everywhere).

Shapes: K inputs, N outputs, R rows kept, x [.., K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fettle.quantize.observe import Observer

ROWS = 512  # rows of an input that are kept, over all batches


@dataclass(frozen=True)
class Moments:
    """Of one input, over `count` tokens; all float32."""

    count: int
    mean: Tensor  # [K], of |x|
    peak: Tensor  # [K], greatest |x|
    rows: Tensor  # [R, K], evenly spaced tokens
    second: Tensor | None = None  # H
    observer: Observer | None = None

    def scaled(self, scale: Tensor) -> Moments:
        """The same of x / scale."""
        second = None if self.second is None else self.second / torch.outer(scale, scale)
        return Moments(self.count, self.mean / scale, self.peak / scale, self.rows / scale, second)


def output_error(weight: Tensor, other: Tensor, second: Tensor) -> Tensor:
    """mean (w x - v x)^2 over tokens, for each output: [N]. weight and other [N, K], second [K, K]."""
    apart = weight - other
    return ((apart @ second) * apart).sum(1)


class Watch:
    """Gathers the moments of one input, call by call."""

    def __init__(self, second: bool, observe: bool, rows: int) -> None:
        self.wants_second, self.each = second, rows
        self.observer = Observer() if observe else None
        self.count = 0
        self.sums: Tensor | None = None
        self.peak: Tensor | None = None
        self.second: Tensor | None = None
        self.rows: list[Tensor] = []

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """x [.., K]."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if not len(flat):
            return
        if self.observer is not None:
            self.observer.see(flat)
        wide = flat.float()
        size = wide.abs()
        if self.sums is None or self.peak is None:
            self.sums, self.peak = torch.zeros_like(size[0]), torch.zeros_like(size[0])
        self.sums += size.sum(0)
        self.peak = torch.maximum(self.peak, size.amax(0))
        before, self.count = self.count, self.count + len(flat)
        if self.wants_second:
            product = (wide.T @ wide) / self.count
            self.second = product if self.second is None else self.second.mul_(before / self.count).add_(product)
        self.rows.append(wide[torch.linspace(0, len(wide) - 1, min(self.each, len(wide))).long()].clone())

    def moments(self, width: int, device: torch.device) -> Moments:
        """All that was seen; zeros of `width` where nothing was."""
        if self.sums is None or self.peak is None:
            zeros = torch.zeros(width, device=device)
            second = torch.zeros(width, width, device=device) if self.wants_second else None
            return Moments(0, zeros, zeros, zeros.new_zeros(0, width), second, self.observer)
        rows = torch.cat(self.rows)
        return Moments(self.count, self.sums / self.count, self.peak, rows, self.second, self.observer)
