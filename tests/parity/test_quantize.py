"""NF4 and int8 against bitsandbytes: the same codes, the same scales, the same values, the same products."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.quantize.activations import Activations
from fettle.quantize.grid import Grid, dynamic, levels
from fettle.quantize.int8 import Int8
from fettle.quantize.kernels import product_w8a8, works
from fettle.quantize.nf4 import SCALES, nf4
from fettle.quantize.normal4 import Normal4
from fettle.quantize.packed import Quantized, quantize, unpack

FIXTURE = [
    4, 193, 110, 41, 243, 176, 93, 23, 226, 159, 60, 5, 209, 142, 42, 244, 193, 110, 24, 227, 176, 93, 23, 226, 159, 59, 5,
    209, 142, 42, 244, 193,
]  # fmt: skip


@pytest.fixture(scope="module")
def bnb() -> Any:
    logging.disable(logging.WARNING)  # it says at import that an optional kernel is missing
    try:
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional as functional
    finally:
        logging.disable(logging.NOTSET)
    return functional


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    x[0, :64] = 0  # a block of nothing
    x[-1, 3] = 1.5  # and one with an outlier
    return x.to(dtype)


def test_the_codes_are_the_same(bnb: Any) -> None:
    assert torch.equal(dynamic(signed=True), bnb.create_dynamic_map())
    assert torch.equal(dynamic(signed=False), bnb.create_dynamic_map(signed=False))
    assert torch.equal(levels(nf4(torch.ones(1, 64)).grid), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 256), (64, 128), (3, 384)])
@pytest.mark.parametrize("block", [64, 128])
def test_codes_scales_and_values_are_the_same(bnb: Any, shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=False)
    ours = nf4(weight, block, double=False)
    assert torch.equal(ours.codes, theirs.view(-1))
    assert isinstance(ours.scale, Tensor) and torch.equal(ours.scale, state.absmax)
    assert torch.equal(ours.values(dtype), bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("shape", [(33, 30), (5, 160), (7, 65)])
def test_blocks_that_run_over_rows_have_the_same_codes(bnb: Any, shape: tuple[int, ...]) -> None:
    weight = weights(shape, torch.float32)  # dequantizing them on a CPU, version 0.50 takes other scales than it stored
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = nf4(weight, double=False)
    # what is left of a last byte they fill with another value
    assert torch.equal(unpack(ours.codes, 4, ours.count), unpack(theirs.view(-1), 4, ours.count))
    assert isinstance(ours.scale, Tensor) and torch.equal(ours.scale, state.absmax)


def test_quantized_scales_are_the_same_or_nearer(bnb: Any) -> None:
    """Their code for CPUs misses the nearest of the 256 values now and then, by one; where it does not, all is equal."""
    weight = weights((1024, 1024), torch.float32)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4(weight)
    scale = ours.scale
    assert isinstance(scale, Quantized) and scale.offset is not None and scale.grid == SCALES
    assert torch.equal(ours.codes, theirs.view(-1))
    assert torch.allclose(scale.offset, state.offset, rtol=2e-7, atol=0)
    assert torch.allclose(scale.scale, state.state2.absmax, rtol=0, atol=1e-7)
    other = scale.codes != state.absmax
    assert float(other.double().mean()) < 0.01
    assert bool(((scale.codes.int() - state.absmax.int()).abs()[other] == 1).all())
    exact = weight.view(-1, 64).abs().amax(1).double()
    found = scale.values().double()
    read = bnb.dequantize_blockwise(state.absmax, state.state2).double() + state.offset
    assert bool(((found - exact).abs() <= (read - exact).abs() + 1e-8).all())
    same = ~other.repeat_interleave(64).view_as(weight)
    assert torch.allclose(ours.values()[same], bnb.dequantize_4bit(theirs, state)[same], rtol=1e-5, atol=1e-9)


def test_without_the_reference_its_numbers_still_hold() -> None:
    """Codes and scale that bitsandbytes 0.50.2 gave for the 64 numbers ((37 i) mod 101 - 50) / 50."""
    x = torch.tensor([((37 * i) % 101 - 50) / 50 for i in range(64)])
    packed = nf4(x[None], double=False)
    assert packed.codes.tolist() == FIXTURE and packed.scale.item() == 1.0  # type: ignore[union-attr]


# 8 bits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_rows_have_the_same_codes_and_scales(bnb: Any, dtype: torch.dtype) -> None:
    for x in (weights((64, 128), dtype), weights((3, 40), dtype)):
        theirs, most, _ = bnb.int8_vectorwise_quant(x.to(torch.float16) if dtype == torch.float16 else x.float())
        ours = quantize(x, Grid(bits=8, narrow=True))
        assert isinstance(ours.scale, Tensor)
        assert torch.equal((ours.codes ^ 128).view(torch.int8).view(x.shape), theirs)
        assert torch.allclose(ours.scale * 127, most.float(), rtol=2e-7, atol=0)


def test_a_product_of_int8_is_the_same(bnb: Any) -> None:
    weight, x = weights((48, 96), torch.float32), torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    if not works("w8a8"):
        pytest.skip("this processor multiplies no integers")
    x_codes, x_most, _ = bnb.int8_vectorwise_quant(x)
    w_codes, w_most, _ = bnb.int8_vectorwise_quant(weight)
    theirs = bnb.int8_linear_matmul(x_codes, w_codes).float() * (x_most[:, None].float() * w_most.float()) / 127**2
    ours = product_w8a8(Int8.of(quantize(weight, Grid(bits=8, narrow=True))), x, Activations(narrow=True), None)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_a_product_of_nf4_is_the_same(bnb: Any, rows: int) -> None:
    import bitsandbytes

    if not works("nf4"):
        pytest.skip("this processor has no kernel of theirs")
    weight = weights((128, 256), torch.bfloat16)
    theirs = bitsandbytes.nn.Linear4bit(
        256, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False
    )
    theirs.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    theirs = theirs.to("cpu").eval()
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        assert torch.equal(Normal4.of(nf4(weight, double=False)).product(x), theirs(x))
