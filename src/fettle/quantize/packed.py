"""Quantized tensors at their true size: codes packed into bytes, scales and zeros beside them, and the values again.

b bits a code, n codes: the codes stand one after the other as one string of bits, the first in the highest bits, so that a
byte holds two codes of 4 bits, the first in its high half (as in bitsandbytes), and 8 codes always fill b bytes.

Scales may be quantized in turn (QLoRA's double quantization): less their mean, which is kept as `offset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce
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
    if bits in (2, 4):
        together = torch.nn.functional.pad(codes, (0, -codes.numel() % (8 // bits))).view(-1, 8 // bits)
        return reduce(lambda byte, part: byte << bits | part, together.unbind(1)).clone()
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
    if bits in (2, 4):
        shifted = [data >> shift & (2**bits - 1) for shift in range(8 - bits, -1, -bits)]
        return torch.stack(shifted, 1).view(-1)[:count]
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

    def without_codes(self) -> Quantized:
        """All but the codes, for who holds those in another order."""
        return replace(self, codes=self.codes.new_empty(0))

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor again: computed in float32, rounded once to `dtype`."""
        scale = self.scale.values() if isinstance(self.scale, Quantized) else self.scale
        table = _table(self.grid, self.codes.device)
        made = torch.ops.fettle.dequantize(
            self.codes, scale, self.zeros(), table, self.grid.bits, self.length, self.count, dtype
        )
        return (made if self.offset is None else made.add_(self.offset)).view(self.shape)

    def zeros(self) -> Tensor | None:
        """z of each group, [G]; None where the grid is symmetric."""
        if self.zero is None or self.zero.dtype != torch.uint8:
            return self.zero
        groups = self.scale.count if isinstance(self.scale, Quantized) else self.scale.numel()
        return unpack(self.zero, self.grid.bits, groups).float()


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
    scale = _stored(torch.cat(found_scales), grid)
    zero = None
    if zeros:
        zero = torch.cat(zeros)
        zero = pack(zero.to(torch.uint8), grid.bits) if grid.levels == "int" else zero.to(grid.scale_dtype)
    held = scale if scales is None else _centred(scale.float(), scales)
    return Quantized(grid, tuple(x.shape), length, torch.cat(codes), held, zero)


def assemble(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, real: bool = False) -> Quantized:
    """Codes uint8 in the shape of the tensor, scale and zero [G] of its groups, as one. `real`: zeros are no integers."""
    length = codes.numel() // max(1, scale.numel())
    if zero is not None:
        whole = grid.levels == "int" and not real
        zero = pack(zero.reshape(-1).to(torch.uint8), grid.bits) if whole else zero.reshape(-1).to(grid.scale_dtype)
    packed = pack(codes.reshape(-1), grid.bits)
    return Quantized(grid, tuple(codes.shape), length, packed, _stored(scale.reshape(-1), grid), zero)


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """Scales in the type that they are stored in. FettleError where one is beyond it."""
    stored = scale.to(grid.scale_dtype)
    if not torch.isfinite(stored).all():
        raise FettleError(f"quantize: a group's range is too wide for a scale of {grid.scale}; set grid.scale: float32")
    return stored


def blank(
    shape: tuple[int, ...], grid: Grid, scales: Grid | None = None, *, across_rows: bool = False, real: bool = False,
    device: torch.device | None = None,
) -> Quantized:  # fmt: skip
    """The layout of `quantize`, to be filled in; until then its values are NaN. `real`: zeros are no integers."""
    length, count = group_length(shape, grid, across_rows), math.prod(shape)
    groups = -(-count // length)
    scale: Tensor | Quantized = torch.full((groups,), torch.nan, dtype=grid.scale_dtype, device=device)
    if scales is not None:
        inner = blank((groups,), scales, across_rows=True, device=device)
        scale = replace(inner, offset=torch.zeros((), device=device))
    zero = None
    if not grid.symmetric:
        whole = grid.levels == "int" and not real
        zero = torch.zeros(packed_bytes(groups, grid.bits) if whole else groups, dtype=torch.uint8 if whole else grid.scale_dtype, device=device)  # fmt: skip
    codes = torch.zeros(packed_bytes(count, grid.bits), dtype=torch.uint8, device=device)
    return Quantized(grid, tuple(shape), length, codes, scale, zero)


def _step(length: int) -> int:
    """Values a chunk: whole groups and whole bytes."""
    unit = math.lcm(length, 8)
    return unit * max(1, CHUNK // unit)


def _centred(scale: Tensor, grid: Grid) -> Quantized:
    offset = scale.double().mean().float()  # in float64, so that another order of summation gives the same codes
    return replace(quantize(scale - offset, grid, across_rows=True), offset=offset)


def single(scale: Tensor | Quantized) -> Tensor:
    """The scale of a tensor whose scales are not quantized in turn."""
    assert isinstance(scale, Tensor)
    return scale


def fake(x: Tensor, grid: Grid) -> Tensor:
    """x rounded to its grid, in its own dtype and shape: what computing with quantized values sees."""
    return quantize(x, grid).values(x.dtype)


# Lookup. Several codes are looked up at once, as one wide element: that is what makes it fast. 8-bit integers need no table.

_AT_ONCE = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}  # codes, by their bits
_ELEMENT = {1: torch.float32, 2: torch.int64, 4: torch.complex128}  # what holds as many float32


@cache
def _table(grid: Grid, device: torch.device) -> Tensor:
    """float32 [2^(b n), n]: what n codes in a row stand for. Of 8-bit integers [1, 1]: what code 0 does."""
    with lasting():
        table, together = levels(grid), _AT_ONCE[grid.bits]
        if grid.levels == "int" and grid.bits == 8:
            return table[:1, None].to(device)
        index = torch.arange(2 ** (grid.bits * together), dtype=torch.int64, device="cpu")
        codes = torch.stack([index >> grid.bits * i & (2**grid.bits - 1) for i in range(together - 1, -1, -1)], 1)
        return table[codes.view(-1)].view(-1, together).to(device)


def _looked_up(data: Tensor, table: Tensor, bits: int, count: int) -> Tensor:
    """float32 [count]: the levels of packed codes."""
    if len(table) == 1:
        return data[:count].to(torch.float32).add_(table[0])
    wide = table.view(_ELEMENT[table.shape[1]]).view(-1)
    return wide.index_select(0, _indices(data, bits * table.shape[1])).view(torch.float32)[:count]


def _indices(data: Tensor, width: int) -> Tensor:
    """int32: the string of bits in numbers of `width` bits, 8 to 14; zeros follow its end."""
    if width == 8:
        return data.int()
    period = width // math.gcd(width, 8)  # bytes after which numbers begin at a byte again
    columns = torch.nn.functional.pad(data, (0, -data.numel() % period)).view(-1, period).t().int()
    found = torch.empty((columns.shape[1], 8 * period // width), dtype=torch.int32, device=data.device)
    for i in range(found.shape[1]):
        first, last = i * width // 8, ((i + 1) * width - 1) // 8
        word = columns[first] & (255 >> i * width % 8)
        for at in range(first + 1, last + 1):
            word = (word << 8) | columns[at]
        found[:, i] = word >> (8 * (last + 1) - (i + 1) * width)
    return found.view(-1)


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
