"""How other libraries lay packed weights out in their files: GPTQ (both versions), AWQ's GEMM, compressed-tensors.

    W[n, k] = s[n, g] (q[n, k] - z[n, g]),   g = k // L

                            GPTQ                          AWQ GEMM                   compressed-tensors
    codes                   qweight [K b/32, N]           qweight [K, N/8]           weight_packed [N, ceil(K b/32)]
    zeros                   qzeros [G, N b/32]            qzeros [G, N/8]            weight_zero_point [ceil(N b/32), G]
    scales                  scales [G, N] float16         scales [G, N] float16      weight_scale [N, G]
    packed along            K; zeros along N              N; zeros along N           K; zeros along N
    beside                  g_idx [K], the group of k                                weight_shape = (N, K)

Words are int32, the first code in the lowest bits, codes running on over the ends of words where b does not divide 32; AWQ puts
codes 0, 2, 4, 6, 1, 3, 5, 7 of each eight in a word. GPTQ's first version stores z - 1, its second z. compressed-tensors may also
hold 8-bit codes as they are, `weight` int8 [N, K], less 128 as its zeros are. Sources: AutoGPTQ's and AutoAWQ's packing,
`compressed_tensors.compressors`.

Shapes: N outputs, K inputs, L values of a row that share a scale, G = K / L groups a row, b bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid
from fettle.quantize.packed import Quantized, assemble, unpack

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Affine:
    """A weight on an integer grid, row by row."""

    codes: Tensor  # uint8 [N, K]
    scale: Tensor  # [N, G]
    zero: Tensor | None  # [N, G], uint8 or, where zero points are real, as scales; None: 2^(b-1) everywhere
    bits: int

    @property
    def group(self) -> int:
        """L."""
        return self.codes.shape[1] // max(1, self.scale.shape[1])

    @property
    def zeros(self) -> Tensor:
        """uint8 [N, G], written out. FettleError where they are real."""
        if self.zero is None:
            return torch.full(self.scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
        if self.zero.dtype != torch.uint8:
            raise FettleError("its zero points are real, as HQQ's are, where the format stores whole ones")
        return self.zero

    def with_scales(self, dtype: torch.dtype) -> Affine:
        """The same with scales of another type. FettleError where one is beyond its range."""
        scale = self.scale.to(dtype)
        if not torch.isfinite(scale).all():
            most = self.scale.abs().max().item()
            raise FettleError(f"a scale of {most:.3g} is beyond the range of {str(dtype).removeprefix('torch.')}")
        return Affine(self.codes, scale, self.zero, self.bits)

    def packed(self) -> Quantized:
        """As a layer holds it. FettleError where scales have a type that none has here."""
        name = str(self.scale.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16"):
            raise FettleError(f"its scales are {name}; expected float32, float16 or bfloat16")
        group: Any = "row" if self.group == self.codes.shape[1] else self.group
        grid = Grid(bits=self.bits, symmetric=self.zero is None, group=group, scale=name)
        return assemble(
            self.codes, self.scale, self.zero, grid, real=self.zero is not None and self.zero.is_floating_point()
        )


def affine_of(packed: Quantized) -> Affine:
    """The weight of a layer. FettleError where it is on another kind of grid, saying which."""
    grid, (rows, width) = packed.grid, packed.shape
    if grid.levels != "int" or isinstance(packed.scale, Quantized) or packed.offset is not None:
        what = "NF4" if (grid.levels, grid.bits) == ("normal", 4) else f"levels: {grid.levels} in {grid.bits} bits"
        raise FettleError(f"its weights are {what}, not integers")
    if width % packed.length and packed.length != packed.count:
        raise FettleError(f"its groups of {packed.length} do not divide rows of {width}")
    codes = unpack(packed.codes, grid.bits, packed.count).view(rows, width).cpu()
    groups, zero = max(1, width // packed.length), packed.zero
    if zero is not None and zero.dtype == torch.uint8:
        zero = unpack(zero, grid.bits, packed.scale.numel())

    def by_row(values: Tensor) -> Tensor:  # one range of the whole weight is that of each of its rows
        values = values.cpu()
        return values.expand(rows).reshape(rows, 1) if values.numel() == 1 else values.view(rows, groups)

    return Affine(codes, by_row(packed.scale), None if zero is None else by_row(zero), grid.bits)


# Words.


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [R, n] -> int32 [R, ceil(n b / 32)], the first in the lowest bits; the rest of the last word is 0."""
    unit = 32 // math.gcd(32, bits)  # the fewest codes that fill whole words
    rows, count = codes.shape
    runs = torch.nn.functional.pad(codes, (0, -count % unit)).view(rows, -1, unit).long()
    out = torch.zeros(rows, runs.shape[1], unit * bits // 32, dtype=torch.int64)
    for i in range(unit):
        word, at = divmod(i * bits, 32)
        out[..., word] |= runs[..., i] << at
        if at + bits > 32:
            out[..., word + 1] |= runs[..., i] >> (32 - at)
    low = out & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32).view(rows, -1)[:, : math.ceil(count * bits / 32)].contiguous()


def codes_of(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, ceil(n b / 32)] -> the codes, uint8 [R, n]."""
    unit, rows = 32 // math.gcd(32, bits), packed.shape[0]
    each = unit * bits // 32
    runs = torch.nn.functional.pad(packed, (0, -packed.shape[1] % each)).view(rows, -1, each).long() & 0xFFFFFFFF
    out = torch.empty(rows, runs.shape[1], unit, dtype=torch.uint8)
    for i in range(unit):
        word, at = divmod(i * bits, 32)
        value = runs[..., word] >> at
        if at + bits > 32:
            value = value | (runs[..., word + 1] << (32 - at))
        out[..., i] = value & (2**bits - 1)
    return out.view(rows, -1)[:, :count].contiguous()


# GPTQ.


def gptq(weight: Affine, version: int) -> Tensors:
    """A weight in GPTQ's layout. FettleError where its sizes do not fill words, or version 1 has no place for a zero."""
    rows, width = weight.codes.shape
    for count, what in ((width, "inputs"), (rows, "outputs")):
        if count * weight.bits % 32:
            raise FettleError(f"its {count} {what} of {weight.bits} bits do not fill words of 32")
    zeros = weight.zeros
    if version == 1:
        if (zeros == 0).any():
            raise FettleError("a group has zero point 0, which version 1 of the format, storing z - 1, cannot hold")
        zeros = zeros - 1
    return {
        "qweight": words(weight.codes, weight.bits).t().contiguous(),
        "qzeros": words(zeros.t().contiguous(), weight.bits),
        "scales": weight.scale.t().contiguous(),
        "g_idx": (torch.arange(width) // weight.group).to(torch.int32),
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int, group: int, version: int) -> Affine:
    """A weight out of GPTQ's layout; `group` -1 is a whole row. FettleError where the tensors are not of that layout."""
    qweight = tensors["qweight"]
    width, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    length = width if group == -1 else group
    _divides(length, width)
    groups = width // length
    _shaped(tensors, {"qzeros": (groups, rows * bits // 32), "scales": (groups, rows)})
    if (order := tensors.get("g_idx")) is not None:
        _shaped(tensors, {"g_idx": (width,)})
        if not torch.equal(order.long(), torch.arange(width) // length):
            raise FettleError(
                "its groups are in the order of activations (desc_act without static groups), which a packed layer here cannot "
                "follow; take a file that was made with static groups or without desc_act"
            )
    zeros = codes_of(tensors["qzeros"], bits, rows).t().contiguous()
    if version == 1:  # the highest code stands for 0, as in AutoGPTQ's own reader
        zeros = (zeros + 1) & (2**bits - 1)
    return _affine(codes_of(qweight.t().contiguous(), bits, width), tensors["scales"].t(), zeros, bits)


def _affine(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Affine:
    """With no zeros where all are the middle."""
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    return Affine(codes, scale.contiguous(), None if symmetric else zero.contiguous(), bits)


def _divides(length: int, width: int) -> None:
    if length < 1 or width % length:
        raise FettleError(f"groups of {length} do not divide its rows of {width}")


def _shaped(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise FettleError(f"it has no '{name}'")
        if tuple(tensors[name].shape) != shape:
            raise FettleError(f"its '{name}' has shape {tuple(tensors[name].shape)}; the configuration means {shape}")


# AWQ.


def awq(weight: Affine) -> Tensors:
    """A weight in AWQ's GEMM layout. FettleError where it has not 4 bits, or its outputs do not fill words."""
    rows = weight.codes.shape[0]
    if weight.bits != 4:
        raise FettleError(f"its weights have {weight.bits} bits, and the format has 4 alone")
    if rows % 8:
        raise FettleError(f"its {rows} outputs are no multiple of 8, which fill a word")
    return {
        "qweight": _awq_words(weight.codes.t()),
        "qzeros": _awq_words(weight.zeros.t()),
        "scales": weight.scale.t().contiguous(),
    }


def _awq_words(codes: Tensor) -> Tensor:
    return words(codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER].reshape(codes.shape), 4)


def _awq_codes(packed: Tensor) -> Tensor:
    codes = codes_of(packed, 4, packed.shape[1] * 8)
    back = [AWQ_ORDER.index(i) for i in range(8)]
    return codes.view(codes.shape[0], -1, 8)[..., back].reshape(codes.shape)


def from_awq(tensors: Mapping[str, Tensor], group: int) -> Affine:
    """A weight out of AWQ's GEMM layout; `group` -1 is a whole row."""
    width, rows = tensors["qweight"].shape[0], tensors["qweight"].shape[1] * 8
    length = width if group == -1 else group
    _divides(length, width)
    _shaped(tensors, {"qzeros": (width // length, rows // 8), "scales": (width // length, rows)})
    zeros = _awq_codes(tensors["qzeros"]).t().contiguous()
    return _affine(_awq_codes(tensors["qweight"]).t().contiguous(), tensors["scales"].t(), zeros, 4)


# compressed-tensors.


def compressed(weight: Affine, whole: bool = False) -> Tensors:
    """A weight as 'pack-quantized' tensors, or `whole` as 'int-quantized', whose 8-bit codes are not packed."""
    middle, made = 2 ** (weight.bits - 1), {"weight_scale": weight.scale.contiguous()}
    uneven = weight.zero is not None
    if whole:
        made["weight"] = (weight.codes.short() - middle).to(torch.int8)
        return made | ({"weight_zero_point": (weight.zeros.short() - middle).to(torch.int8)} if uneven else {})
    made |= {"weight_packed": words(weight.codes, weight.bits), "weight_shape": torch.tensor(weight.codes.shape)}
    if uneven:
        made["weight_zero_point"] = words(weight.zeros.t().contiguous(), weight.bits).t().contiguous()
    return made


def from_compressed(tensors: Mapping[str, Tensor], bits: int, group: int | None, symmetric: bool) -> Affine:
    """A weight out of compressed-tensors; `group` None: as wide as the scales say (a row, or the whole weight)."""
    middle = 2 ** (bits - 1)
    if "weight_packed" in tensors:
        rows, width = (int(n) for n in tensors["weight_shape"].tolist())
        _shaped(tensors, {"weight_packed": (rows, math.ceil(width * bits / 32))})
        codes = codes_of(tensors["weight_packed"], bits, width)
    else:
        rows, width = tensors["weight"].shape
        codes = (tensors["weight"].short() + middle).to(torch.uint8)
    length = width if group is None else group
    _divides(length, width)
    groups = width // length
    scale = tensors["weight_scale"]
    if group is None and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(rows, 1)
    elif scale.shape != (rows, groups):
        raise FettleError(
            f"its 'weight_scale' has shape {tuple(scale.shape)}; the configuration means {(rows, groups)}"
        )
    if symmetric:
        return Affine(codes, scale.contiguous(), None, bits)
    if "weight_zero_point" not in tensors:
        raise FettleError("it has no 'weight_zero_point', though the configuration is not symmetric")
    held = tensors["weight_zero_point"]
    if held.dtype == torch.int32:
        _shaped(tensors, {"weight_zero_point": (math.ceil(rows * bits / 32), groups)})
        zero = codes_of(held.t().contiguous(), bits, rows).t()
    else:
        zero = (held.short() + middle).to(torch.uint8)
        zero = zero.reshape(-1, 1 if held.numel() == 1 else groups).expand(rows, groups)
    return _affine(codes, scale, zero, bits)
