"""Quantized tensors at their true size: codes packed into bytes, scales and zeros beside them, and the values again.

b bits a code, n codes: the codes stand one after the other as one string of bits, the first in the highest bits, so that a
byte holds two codes of 4 bits, the first in its high half (as in bitsandbytes), and 8 codes always fill b bytes.

Scales may be quantized in turn (QLoRA's double quantization): less their mean, which is kept as `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid, encode, fit, group_length, lasting, levels, split

CHUNK = 1 << 20  # values made at a time: what passes through memory on the way stays small


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [n] under 2^b -> bytes uint8 [ceil(n b / 8)]; the bits after the last code are 0."""
    if bits == 8:
        return codes.clone()
    eights = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8).long()
    word = eights[:, 0]
    for i in range(1, 8):
        word = (word << bits) | eights[:, i]
    parts = [(word >> 8 * i) & 255 for i in range(bits - 1, -1, -1)]
    return torch.stack(parts, 1).to(torch.uint8).view(-1)[: packed_bytes(codes.numel(), bits)].clone()


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Bytes -> the first `count` codes, uint8."""
    if bits == 8:
        return data[:count].clone()
    parts = torch.nn.functional.pad(data, (0, -data.numel() % bits)).view(-1, bits).long()
    word = parts[:, 0]
    for i in range(1, bits):
        word = (word << 8) | parts[:, i]
    codes = [(word >> bits * i) & (2**bits - 1) for i in range(7, -1, -1)]
    return torch.stack(codes, 1).to(torch.uint8).view(-1)[:count]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return (count * bits + 7) // 8


@dataclass(frozen=True)
class Quantized:
    """A tensor of n values in G groups of `length`, packed."""

    grid: Grid
    shape: tuple[int, ...]
    length: int
    codes: Tensor  # uint8 [ceil(n b / 8)]
    scale: Tensor | Quantized  # [G]
    zero: Tensor | None = None  # [G] in the dtype of scales; integers are packed like codes
    offset: Tensor | None = None  # scalar, added to every value

    @property
    def count(self) -> int:
        """n."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Effective bits a value: all that is stored."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values()) / max(1, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name: codes, scale (or scale_codes, scale_scale, ..), zero, offset."""
        inner = {f"scale_{k}": t for k, t in self.scale.tensors().items()} if isinstance(self.scale, Quantized) else {}
        own = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "offset": self.offset}
        return {k: t for k, t in own.items() if isinstance(t, Tensor)} | inner

    def holding(self, tensors: Mapping[str, Tensor]) -> Quantized:
        """The same layout over other tensors, named as `tensors` names them."""
        inner = {k.removeprefix("scale_"): t for k, t in tensors.items() if k.startswith("scale_")}
        scale = self.scale.holding(inner) if isinstance(self.scale, Quantized) else tensors["scale"]
        return replace(
            self, codes=tensors["codes"], scale=scale, zero=tensors.get("zero"), offset=tensors.get("offset")
        )

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor again: computed in float32, rounded once to `dtype`."""
        scale = self.scale.values() if isinstance(self.scale, Quantized) else self.scale
        zero = self.zero
        if zero is not None and zero.dtype == torch.uint8:
            zero = unpack(zero, self.grid.bits, scale.numel()).float()
        made = torch.ops.fettle.dequantize(
            self.codes,
            scale,
            zero,
            _table(self.grid, self.codes.device),
            self.grid.bits,
            self.length,
            self.count,
            dtype,
        )
        return (made if self.offset is None else made.add_(self.offset)).view(self.shape)


def quantize(x: Tensor, grid: Grid, scales: Grid | None = None, across_rows: bool = False) -> Quantized:
    """x, of any shape, on a grid; its scales on `scales`, where given. FettleError where a value is not finite.

    `across_rows`: groups that do not divide a row run on into the next, and the last may be short.
    """
    length = group_length(tuple(x.shape), grid, across_rows)
    codes, found_scales, zeros = [], [], []
    for chunk in x.detach().reshape(-1).split(_step(length)):
        if not torch.isfinite(chunk).all():
            raise FettleError("quantize: values that are not finite (NaN or infinity); the weights are damaged")
        found = []
        for part in split(chunk, length):
            scale, zero = fit(part, grid)
            found.append(encode(part, scale, zero, grid).view(-1))
            found_scales.append(scale.view(-1))
            zeros += [] if zero is None else [zero.view(-1)]
        codes.append(pack(torch.cat(found), grid.bits))
    scale = torch.cat(found_scales).to(grid.scale_dtype)
    zero = None
    if zeros:
        zero = torch.cat(zeros)
        zero = pack(zero.to(torch.uint8), grid.bits) if grid.levels == "int" else zero.to(grid.scale_dtype)
    held = scale if scales is None else _centred(scale.float(), scales)
    return Quantized(grid, tuple(x.shape), length, torch.cat(codes), held, zero)


def _step(length: int) -> int:
    """Values a chunk: whole groups and whole bytes."""
    unit = math.lcm(length, 8)
    return unit * max(1, CHUNK // unit)


def _centred(scale: Tensor, grid: Grid) -> Quantized:
    offset = scale.double().mean().float()  # in float64, so that another order of summation gives the same codes
    return replace(quantize(scale - offset, grid, across_rows=True), offset=offset)


def fake(x: Tensor, grid: Grid) -> Tensor:
    """x rounded to its grid, in its own dtype and shape: what computing with quantized values sees."""
    return quantize(x, grid).values(x.dtype)


@cache
def _table(grid: Grid, device: torch.device) -> Tensor:
    """float32 [256, codes a byte] where codes do not cross bytes: what a byte stands for; else the levels [2^b, 1]."""
    with lasting():
        table = levels(grid)
        if 8 % grid.bits:
            return table[:, None].to(device)
        every = torch.arange(256, dtype=torch.uint8, device="cpu")
        return table[unpack(every, grid.bits, 256 * (8 // grid.bits)).int()].view(256, -1).to(device)


@torch.library.custom_op("fettle::dequantize", mutates_args=())
def _dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor, bits: int, length: int, count: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """s (l[q] - z), [count]; one opaque operator, a chunk of whole groups and whole bytes at a time."""
    out = torch.empty(count, dtype=dtype, device=codes.device)
    step = _step(length)
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = _looked_up(codes[start * bits // 8 : packed_bytes(stop, bits)], table, bits, stop - start)
        first = start // length
        for piece, into in zip(split(values, length), split(out[start:stop], length), strict=True):
            span = slice(first, first + len(piece))
            if zero is not None:
                piece.sub_(zero[span, None])
            if dtype == torch.float32:
                torch.mul(piece, scale[span, None].float(), out=into)
            else:
                into.copy_(piece.mul_(scale[span, None].float()))
            first += len(piece)
    return out


@_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor, bits: int, length: int, count: int, dtype: Any) -> Tensor:  # fmt: skip
    return codes.new_empty(count, dtype=dtype)


def _looked_up(data: Tensor, table: Tensor, bits: int, count: int) -> Tensor:
    """float32 [count]. All values of a byte are fetched as one wide element: that is what makes it fast."""
    index = (unpack(data, bits, count) if 8 % bits else data).int()
    wide = {1: torch.float32, 2: torch.int64, 4: torch.complex128}[table.shape[1]]
    return table.view(wide).view(-1).index_select(0, index).view(torch.float32)[:count]
