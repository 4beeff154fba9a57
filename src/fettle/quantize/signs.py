"""Products with a matrix of signs that is held at one bit an entry.

    u = x S',   S in {-1, 1} [N, K], held as bytes [N, ceil(K / 8)]: the first column in the highest bit, 1 for +1

A byte stands for eight signs, which one fetch from a table of 256 brings in the type of the product. No more than ROWS rows of S exist
at a time, so a model of signs stays at its size. For a few rows of bfloat16 on a CPU the signs are brought as int8, which the packed
kernel of torch takes: 0.33 ms for 2048 x 2048 and one row, where the dense product of that size takes 0.25 and reads sixteen times as
much memory (one thread of an AVX-512 core); for many rows the product hides what unpacking takes.

Shapes: x [M, K], u [M, N].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fettle.quantize.grid import lasting
from fettle.quantize.kernels import works
from fettle.quantize.packed import pack, unpack

ROWS = 512  # of S that are unpacked at a time
FEW = 8  # rows of x up to which the kernel for int8 is the faster one


def pack_signs(x: Tensor) -> Tensor:
    """uint8 [N, ceil(K / 8)] of the signs of x [N, K]; 0 counts as positive. The bits after the last column are 0."""
    wide = -(-x.shape[1] // 8) * 8
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, wide - x.shape[1]))
    return pack(bits.reshape(-1), 1).view(len(x), wide // 8)


def unpack_signs(data: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The signs [N, columns], 1 and -1."""
    table = _table(dtype if dtype.itemsize <= 2 else torch.int8, data.device)
    wide = table.view({8: torch.int64, 16: torch.complex128}[table.element_size() * 8]).view(-1)
    signs = wide.index_select(0, data.reshape(-1).int()).view(table.dtype).view(len(data), -1)
    return signs[:, :columns].to(dtype)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the signs that each byte stands for."""
    with lasting():
        every = unpack(torch.arange(256, dtype=torch.uint8), 1, 2048).view(256, 8)
        return (2 * every.int() - 1).to(dtype).to(device)


@torch.library.custom_op("fettle::times_signs", mutates_args=())
def times_signs(x: Tensor, data: Tensor) -> Tensor:
    """u [M, N] of x [M, K], without a gradient."""
    out = x.new_empty(len(x), len(data))
    x = x.contiguous()
    for rows in _spans(len(data)):
        if _by_int8(x):
            signs = unpack_signs(data[rows], x.shape[1], torch.int8)
            out[:, rows] = torch._weight_int8pack_mm(x, signs, x.new_ones(len(signs)))
        else:
            torch.mm(x, unpack_signs(data[rows], x.shape[1], x.dtype).T, out=out[:, rows])
    return out


@times_signs.register_fake
def _(x: Tensor, data: Tensor) -> Tensor:
    return x.new_empty(len(x), len(data))


@torch.library.custom_op("fettle::signs_backward", mutates_args=())
def signs_backward(x: Tensor, grad: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """(grad S [M, K], sum of grad * u as float32 or wider), each row of S unpacked once."""
    back = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    total = back.new_zeros(())
    for rows in _spans(len(data)):
        signs, part = unpack_signs(data[rows], x.shape[1], x.dtype), grad[:, rows]
        back += part @ signs
        total += (part.to(back.dtype) * (x @ signs.T)).sum()
    return back.to(x.dtype), total


@signs_backward.register_fake
def _(x: Tensor, grad: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))


class _Signed(torch.autograd.Function):
    """y + s x S', which keeps x alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, data, scale)
        return y + times_signs(x, data) * scale.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, data, scale = ctx.saved_tensors
        back, total = signs_backward(x, grad.contiguous(), data)
        return grad, back * scale.to(back.dtype), None, total.to(scale.dtype)


def with_signs(y: Tensor, x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """y + s x S' for y [.., N], x [.., K] and a scalar s."""
    flat = _Signed.apply(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), data, scale)
    return flat.view_as(y)  # type: ignore[no-any-return]


def _by_int8(x: Tensor) -> bool:
    """Whether the packed kernel takes it; with other widths it ends the process."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and len(x) <= FEW
        and x.shape[1] % 16 == 0
        and x.data_ptr() % 64 == 0
        and works("int8")
    )


def _spans(rows: int) -> Iterator[slice]:
    return (slice(at, min(at + ROWS, rows)) for at in range(0, rows, ROWS))
