"""8-bit weights as torch's kernels read them: signed bytes, row after row, q - 128 of the portable codes q.

Shapes: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.quantize.packed import CHUNK, Quantized, single


@dataclass(frozen=True)
class Int8:
    """A weight as signed bytes [N, K] with a scale a row."""

    portable: Quantized  # without its codes
    codes: Tensor  # int8 [N, K]: q - 128
    scale: Tensor  # bfloat16 [N]
    sums: Tensor  # int32 [N]: of each row's codes

    @classmethod
    def of(cls, weight: Quantized) -> Int8:
        """From the portable form."""
        rows, columns = weight.shape
        codes = (weight.codes ^ 128).view(torch.int8).view(rows, columns)
        scale = single(weight.scale).expand(rows).to(torch.bfloat16).contiguous()
        return cls(weight.without_codes(), codes, scale, codes.sum(1, dtype=torch.int32))

    @property
    def bits(self) -> float:
        """Effective bits a value, of the portable form."""
        return self.portable.bits + 8 * self.codes.numel() / self.portable.count

    def restored(self) -> Quantized:
        """The portable form."""
        return replace(self.portable, codes=self.codes.view(torch.uint8).view(-1) ^ 128)

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once."""
        rows, columns = self.codes.shape
        out = torch.empty((rows, columns), dtype=dtype)
        step = max(1, CHUNK // columns)
        for at in (slice(i, i + step) for i in range(0, rows, step)):
            out[at].copy_(self._scaled(self.codes[at].to(torch.float32), at))
        return out

    def inputs(self, at: Tensor) -> Tensor:
        """The weights of some inputs, float32 [N, n]."""
        return self._scaled(self.codes[:, at].to(torch.float32), slice(None))

    def _scaled(self, codes: Tensor, at: slice) -> Tensor:
        rows, zero = len(self.codes), self.zeros
        codes = codes if zero is None else codes.sub_(zero.expand(rows)[at, None])
        return codes.mul_(single(self.portable.scale).expand(rows)[at, None])

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], in bfloat16."""
        return torch._weight_int8pack_mm(aligned(x), self.codes, self.scale)

    @property
    def zeros(self) -> Tensor | None:
        """Of signed codes, [N] or [1]."""
        zero = self.portable.zeros()
        return None if zero is None else zero - 128


def aligned(x: Tensor) -> Tensor:
    """x in one piece that begins where a vector of the processor may; a slice of another tensor need not."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)
