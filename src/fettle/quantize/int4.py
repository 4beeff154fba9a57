"""4-bit weights in the order of torch's int4 kernel for CPUs, and back.

The kernel takes W outputs at a time (64 with AVX-512, else 32) and for each of them input after input: a block of W outputs is
[K, W/2] bytes, byte j of an input holding output j in its low half and output j + W/2 in its high one. What is left of the
outputs, a multiple of 16, is a narrower block of neighbours: byte j holds outputs 2j and 2j + 1. Portable codes are
row after row, the first of two inputs in the high half of a byte. Both take N K / 2 bytes.

Shapes: N outputs, K inputs, L values a group, W outputs a block, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.quantize.packed import CHUNK, Quantized, single

BLOCKS = (256, 128, 64, 32)  # weights a scale that the kernel knows


@dataclass(frozen=True)
class Int4:
    """A weight as torch's int4 kernel for CPUs reads it, with scales by block of inputs, whatever the groups."""

    portable: Quantized  # without its codes
    codes: Tensor  # uint8 [N, K / 2]
    scale: Tensor  # bfloat16 [K / block, N, 2]: s and s (8 - z)

    @classmethod
    def of(cls, weight: Quantized) -> Int4:
        """From the portable form."""
        rows, columns = weight.shape
        block = block_of(weight)
        group = torch.arange(0, rows * columns, block, device=weight.codes.device) // weight.length
        scale = single(weight.scale).float()[group].bfloat16()
        zero = weight.zeros()
        offset = torch.zeros_like(scale) if zero is None else (scale.float() * (8 - zero[group])).bfloat16()
        both = torch.stack([scale, offset], 1).view(rows, columns // block, 2).transpose(0, 1).contiguous()
        return cls(weight.without_codes(), arrange_int4(weight.codes, rows, columns), both)

    @property
    def bits(self) -> float:
        """Effective bits a value, of the portable form."""
        return self.portable.bits + 8 * self.codes.numel() / self.portable.count

    def restored(self) -> Quantized:
        """The portable form."""
        return replace(self.portable, codes=restore_int4(self.codes))

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once."""
        return values_int4(self.codes, self.portable, dtype)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], in bfloat16."""
        block = x.shape[1] // self.scale.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.codes, block, self.scale)  # type: ignore[no-any-return]


def block_of(weight: Quantized) -> int:
    """The most weights that the int4 kernel can give one scale to; 0 where there is no such number."""
    return next((b for b in BLOCKS if not weight.length % b and not weight.shape[1] % b), 0)


# The order of codes.


def arrange_int4(codes: Tensor, rows: int, columns: int) -> Tensor:
    """Portable codes [N K / 2] in the kernel's order, uint8 [N, K / 2], as torch._convert_weight_to_int4pack_for_cpu gives them."""
    out, plain = torch.empty((rows, columns // 2), dtype=torch.uint8), codes.view(rows, columns // 2)
    for at in _runs(rows, columns):
        low, high = _halves(plain[at])
        turned = torch.stack([low >> 4 | high & 240, low & 15 | high << 4], -1).flatten(-2)  # an even and an odd input
        out[at].view(len(turned), columns, -1).copy_(turned.transpose(1, 2))
    return out


def restore_int4(arranged: Tensor) -> Tensor:
    """The portable codes again."""
    rows, columns = len(arranged), 2 * arranged.shape[1]
    out = torch.empty_like(arranged)
    for at in _runs(rows, columns):
        even, odd = _turned(arranged[at]).unflatten(-1, (-1, 2)).unbind(-1)
        low, high = _halves(out[at])
        low.copy_(even << 4 | odd & 15)
        high.copy_(even & 240 | odd >> 4)
    return out.view(-1)


def values_int4(arranged: Tensor, portable: Quantized, dtype: torch.dtype) -> Tensor:
    """W [N, K], computed in float32, rounded once to `dtype`; scales and zeros are those of the portable form."""
    rows, columns = portable.shape
    out = torch.empty((rows, columns), dtype=dtype)
    scale, zero = portable.scale, portable.zeros()
    piece = portable.length if columns % portable.length == 0 else 32  # values of a row that lie in one group
    for at in _runs(rows, columns):
        starts = torch.arange(at.start * columns, at.stop * columns, piece).view(-1, columns // piece)
        groups = _halves(starts // portable.length)
        both = _turned(arranged[at])
        for half, codes, group in zip(_halves(out[at]), (both & 15, both >> 4), groups, strict=True):
            made = codes.to(torch.float32).view(*group.shape, piece)
            made.sub_(8 if zero is None else zero[group][..., None]).mul_(scale[group][..., None])  # type: ignore[index]
            half.copy_(made.view(codes.shape))
    return out


def _turned(arranged: Tensor) -> Tensor:
    """Whole blocks [B W, K / 2] as [B, W / 2, K]: a byte holds an input's codes for an output of the first half and one of the second."""
    columns, width = 2 * arranged.shape[1], min(_width(), len(arranged))
    return arranged.view(-1, columns, width // 2).transpose(1, 2).contiguous()


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of whole blocks of outputs [B W, n]: those in the low and in the high halves of bytes, each a view [B, W / 2, n]."""
    if len(rows) < _width():
        pairs = rows.view(1, -1, 2, rows.shape[1])
        return pairs[:, :, 0], pairs[:, :, 1]
    blocks = rows.view(-1, 2, _width() // 2, rows.shape[1])
    return blocks[:, 0], blocks[:, 1]


def _width() -> int:
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def _runs(rows: int, columns: int) -> list[slice]:
    """Rows that are whole blocks, of about CHUNK values; the narrower block at the end by itself."""
    width = _width()
    step, full = width * max(1, CHUNK // (width * columns)), rows // width * width
    found = [slice(i, min(i + step, full)) for i in range(0, full, step)]
    return found + ([slice(full, rows)] if full < rows else [])
