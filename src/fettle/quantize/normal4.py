"""NF4 weights in the order of bitsandbytes' kernel for CPUs, and back. That library is optional: without it weights are made.

The kernel takes 32 outputs at a time and for each of them two inputs after two: a block of outputs is [K/2, 32] bytes, byte
2 j + p of a pair of inputs holding the code of its input p for output j in the low half and for output j + 16 in the high one.

Shapes: M rows of x, N outputs, K inputs, L values a group, B blocks of outputs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fettle.quantize.packed import Quantized

BLOCK = 32  # outputs


@dataclass(frozen=True)
class Normal4:
    """A weight as the kernel reads it."""

    portable: Quantized  # without its codes
    codes: Tensor  # uint8 [N, K / 2]
    scale: Tensor  # bfloat16 [K / L, N]

    @classmethod
    def of(cls, weight: Quantized) -> Normal4:
        """From the portable form."""
        rows, columns = weight.shape
        scale = weight.scale.values() if isinstance(weight.scale, Quantized) else weight.scale
        low, high = weight.codes.view(-1, 2, BLOCK // 2, columns // 2).unbind(1)
        even, odd = low >> 4 | high & 240, low & 15 | high << 4
        codes = torch.stack([even, odd], -1).transpose(1, 2).reshape(rows, columns // 2)
        return cls(weight.without_codes(), codes, scale.view(rows, -1).t().to(torch.bfloat16).contiguous())

    @property
    def bits(self) -> float:
        """Effective bits a value, of the portable form."""
        return self.portable.bits + 8 * self.codes.numel() / self.portable.count

    def restored(self) -> Quantized:
        """The portable form."""
        half = self.codes.shape[1]
        even, odd = self.codes.view(-1, half, BLOCK // 2, 2).transpose(1, 2).unbind(-1)
        both = torch.stack([even << 4 | odd & 15, even & 240 | odd >> 4], 1)  # [B, 2, 16, K / 2]
        return replace(self.portable, codes=both.view(-1))

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once."""
        return self.restored().values(dtype)

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], in bfloat16."""
        shape, code = self.portable.shape, torch.tensor([-1.0, 0.0])  # of the code it looks at the second: is it NF4?
        return torch.ops.bitsandbytes.gemv_4bit(  # type: ignore[no-any-return]
            x.contiguous(), self.codes, shape, self.scale, code, self.portable.length
        )


def why_not_normal4(weight: Quantized) -> str | None:
    """What keeps a weight from the kernel; None where nothing does."""
    grid = weight.grid
    if grid.levels != "normal" or grid.bits != 4 or not grid.symmetric or weight.offset is not None:
        return "the weight is not in NF4"
    if weight.shape[0] % BLOCK:
        return f"{weight.shape[0]} outputs, not a multiple of {BLOCK}"
    if weight.length % 32 or weight.shape[1] % weight.length:
        return (
            f"blocks of {weight.length} in rows of {weight.shape[1]}, which they should divide, and be multiples of 32"
        )
    return None


def is_installed() -> bool:
    """Whether the library is there with its kernel; loads it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of kernels that would have to be fetched
    try:
        return bool(importlib.import_module("bitsandbytes.functional").has_avx512bf16())
    except Exception:  # whatever keeps it from loading on this machine
        return False
    finally:
        logger.setLevel(level)
