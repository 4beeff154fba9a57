"""Packed weights in the layouts of other libraries' files: there and back, and what has no place in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid
from fettle.quantize.layouts import (
    Affine,
    affine_of,
    awq,
    codes_of,
    compressed,
    from_awq,
    from_compressed,
    from_gptq,
    gptq,
    words,
)  # fmt: skip
from fettle.quantize.nf4 import nf4
from fettle.quantize.packed import Quantized, quantize


def weight(bits: int, symmetric: bool = True, group: int | str = 32, shape: tuple[int, int] = (64, 96)) -> Quantized:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    return quantize(x, Grid(bits=bits, symmetric=symmetric, group=group, scale="float16"))


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 1000))
def test_words_there_and_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = words(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 32)) and packed.dtype == torch.int32
    assert torch.equal(codes_of(packed, bits, count), codes)
    number = sum(int(c) << bits * i for i, c in enumerate(codes[0]))  # the row as one number
    assert all(packed[0, i].item() & 0xFFFFFFFF == (number >> 32 * i) & 0xFFFFFFFF for i in range(packed.shape[1]))


def same(one: Affine, other: Quantized) -> bool:
    return torch.equal(one.packed().values(), other.values())


@pytest.mark.parametrize("group", [32, 96, "row", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_there_and_back(bits: int, symmetric: bool, group: int | str) -> None:
    there = weight(bits, symmetric, group)
    affine = affine_of(there)
    size = 32 if group == 32 else -1
    assert same(affine, there)
    assert same(from_gptq(gptq(affine, 2), bits, size, 2), there)
    if (affine.zeros > 0).all():
        assert same(from_gptq(gptq(affine, 1), bits, size, 1), there)
    if bits == 4:
        assert same(from_awq(awq(affine), size), there)
    assert same(from_compressed(compressed(affine), bits, None if size == -1 else size, symmetric), there)
    if bits == 8:
        assert same(
            from_compressed(compressed(affine, whole=True), bits, None if size == -1 else size, symmetric), there
        )


def test_one_scale_of_a_whole_weight_is_read_as_it_is_stored_elsewhere() -> None:
    there = weight(8, group="tensor")
    tensors = compressed(affine_of(there)) | {"weight_scale": there.scale.view(1)}  # type: ignore[union-attr]
    assert same(from_compressed(tensors, 8, None, True), there)


def test_a_zero_point_of_zero_has_no_place_in_version_1() -> None:
    there = quantize(torch.rand(32, 32) + 0.5, Grid(bits=4, symmetric=False, scale="float16"))
    assert same(from_gptq(gptq(affine_of(there), 2), 4, -1, 2), there)
    with pytest.raises(FettleError, match="zero point 0, which version 1 .* cannot hold"):
        gptq(affine_of(there), 1)
    wrapped = gptq(affine_of(there), 2)
    wrapped["qzeros"] = words(torch.full((1, 32), 15, dtype=torch.uint8), 4)  # as tools that do not refuse write it
    assert same(from_gptq(wrapped, 4, -1, 1), there)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: gptq(affine_of(weight(4, shape=(64, 36), group=36)), 2), "its 36 inputs of 4 bits do not fill words"),
        (lambda: gptq(affine_of(weight(4, shape=(36, 64))), 2), "its 36 outputs of 4 bits do not fill words"),
        (lambda: awq(affine_of(weight(8))), "have 8 bits, and the format has 4 alone"),
        (lambda: awq(affine_of(weight(4, shape=(36, 64)))), "its 36 outputs are no multiple of 8"),
        (lambda: affine_of(nf4(torch.randn(8, 64))), "its weights are NF4, not integers"),
        (lambda: affine_of(quantize(torch.randn(8, 64), Grid(levels="normal", bits=3))), "levels: normal in 3 bits"),
        (lambda: affine_of(quantize(torch.randn(8, 48), Grid(group=32), across_rows=True)), "groups of 32 do not divide rows of 48"),
        (lambda: affine_of(quantize(torch.randn(8, 64) * 1e7, Grid())).with_scales(torch.float16), "beyond the range of float16"),
    ],
)  # fmt: skip
def test_what_has_no_place(made, sentence: str) -> None:
    with pytest.raises(FettleError, match=sentence):
        made()


def test_scales_are_rounded_where_they_are_stored_narrower() -> None:
    there = affine_of(quantize(torch.randn(8, 64), Grid(bits=4)))
    assert there.scale.dtype == torch.float32
    narrow = there.with_scales(torch.float16)
    assert narrow.scale.dtype == torch.float16 and torch.equal(narrow.codes, there.codes)
    assert torch.allclose(narrow.packed().values(), there.packed().values(), rtol=2**-11, atol=0)


def test_codes_at_both_ends_survive() -> None:
    codes: Tensor = torch.tensor([[0, 255] * 16] * 4, dtype=torch.uint8)
    affine = Affine(codes, torch.ones(4, 1), None, 8)
    assert torch.equal(from_compressed(compressed(affine, whole=True), 8, None, True).codes, codes)
    assert torch.equal(from_gptq(gptq(affine, 1), 8, -1, 1).codes, codes)
