"""GGUF's blocks of 32 weights: their types, and packed weights laid into them as they are; github.com/ggml-org/ggml.

    Q4_0  w = d (q - 8)     d float16, 32 codes of 4 bits         Q4_1  w = d q + m     d, m float16, 32 codes of 4 bits
    Q5_0  w = d (q - 16)    the same, fifth bits beside           Q5_1  w = d q + m     the same, fifth bits beside
    Q8_0  w = d q           d float16, 32 int8

A grid fits a type that has its bits or more, symmetric or not as it is, where its groups are multiples of 32: the scale is
repeated. Not symmetric, m = -s z is rounded to float16. Dense weights are rounded by the type's own rule (`gguf.quants`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fettle.core import FettleError
from fettle.quantize.layouts import Affine

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EVEN, UNEVEN = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}, {"Q4_1": 4, "Q5_1": 5}  # bits of a code; symmetric or not
TYPES = (*FLOATS, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCK = 32


def fitting(weight: Affine, wanted: str | None = None) -> str:
    """The smallest type, or `wanted`, that holds a packed weight as it is. FettleError where none does, saying why."""
    types = EVEN if weight.zero is None else UNEVEN
    if weight.group % BLOCK:
        raise FettleError(f"its groups of {weight.group} are no multiple of {BLOCK}, which share a scale in GGUF")
    fits = [name for name, bits in types.items() if weight.bits <= bits and wanted in (None, name)]
    if not fits:
        what = "symmetric" if weight.zero is None else "not symmetric"
        raise FettleError(
            f"its weights have {weight.bits} bits, {what}, which {wanted or 'no type of GGUF'} holds as they are"
        )
    return fits[0]


def blocks(weight: Affine, kind: str) -> tuple[np.ndarray[Any, Any], Tensor]:
    """A packed weight in a type: its bytes uint8 [N, ..] as GGUF stores them, and the values they stand for, float32 [N, K]."""
    rows, width = weight.codes.shape
    codes = weight.codes.reshape(-1, BLOCK)
    repeat = weight.group // BLOCK
    scale = weight.with_scales(torch.float16).scale.repeat_interleave(repeat, 1).reshape(-1, 1)
    head = [_bytes(scale)]
    if weight.zero is None:
        codes = codes.short() + 2 ** (EVEN[kind] - 1) - 2 ** (weight.bits - 1)
        values = scale.float() * (codes - 2 ** (EVEN[kind] - 1))
    else:
        wide = weight.scale.float() * weight.zero.float()
        least = (-wide).to(torch.float16).repeat_interleave(repeat, 1).reshape(-1, 1)
        if not torch.isfinite(least).all():
            raise FettleError("a scale times its zero point is beyond the range of float16")
        head.append(_bytes(least))
        values = scale.float() * codes + least.float()
    body = _bytes((codes - 128).to(torch.int8)) if kind == "Q8_0" else _nibbles(codes.to(torch.uint8).numpy(), kind)
    made = np.concatenate([*head, body], axis=1)
    return made.reshape(rows, -1), values.view(rows, width)


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().numpy().view(np.uint8)


def _nibbles(codes: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Codes [n, 32] -> four low bits of codes j and j + 16 in byte j, before them the fifth bits, the first lowest."""
    low = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4
    if kind.startswith("Q4"):
        return low  # type: ignore[no-any-return]
    return np.concatenate([np.packbits(codes >> 4, axis=1, bitorder="little"), low], axis=1)


def rounded(weight: Tensor, kind: str) -> tuple[np.ndarray[Any, Any], Tensor]:
    """A dense weight [.., K] by the type's own rule: its bytes and the values they stand for, float32. FettleError as above."""
    import gguf

    if kind not in FLOATS and weight.shape[-1] % BLOCK:
        raise FettleError(
            f"its rows of {weight.shape[-1]} are no multiple of {BLOCK}, the block of {kind}; use --type F16"
        )
    number = gguf.GGMLQuantizationType[kind]
    with np.errstate(over="ignore"):  # told below
        data = gguf.quants.quantize(weight.float().contiguous().numpy(), number)
    values = torch.from_numpy(np.array(gguf.quants.dequantize(data, number)))
    if not torch.isfinite(values).all():
        raise FettleError(
            f"a weight of {weight.abs().max().item():.3g} is beyond the range of {kind}; use --type BF16 or F32"
        )
    return data, values
