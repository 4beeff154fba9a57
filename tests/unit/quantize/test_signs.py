"""One bit an entry: packing, products without the dense matrix, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.quantize import signs
from fettle.quantize.signs import pack_signs, times_signs, unpack_signs, with_signs


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 1000))
def test_round_trip(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    delta[0, 0] = 0.0
    packed = pack_signs(delta)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 8))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        found = unpack_signs(packed, columns, dtype)
        assert found.dtype == dtype and torch.equal(found.float(), torch.where(delta >= 0, 1.0, -1.0))


def test_the_first_column_is_the_highest_bit() -> None:
    assert pack_signs(torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 1, 0]])).tolist() == [[0b10000001, 0b10000000]]


@pytest.mark.parametrize("shape", [(1, 48, 32), (5, 33, 20), (9, 64, 700), (3, 8, 1200)])
def test_products_and_gradients_are_the_dense_ones(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    x, y = (
        torch.randn(2, rows, n, generator=generator, dtype=torch.float64).requires_grad_() for n in (inputs, outputs)
    )
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = with_signs(y, x, pack_signs(delta), scale)
    wanted = y + scale * (x @ torch.where(delta >= 0, 1.0, -1.0).double().T)
    assert torch.allclose(found, wanted, rtol=1e-12)
    up = torch.randn_like(wanted)
    for one, two in zip(
        torch.autograd.grad(found, (x, y, scale), up), torch.autograd.grad(wanted, (x, y, scale), up), strict=True
    ):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, signs.FEW, signs.FEW + 1, 70])
@pytest.mark.parametrize("inputs", [48, 40, 33])
def test_in_bfloat16_by_whatever_kernel(rows: int, inputs: int) -> None:
    """Sums of products of bfloat16 with 1 and -1 are exact in float32 but for their order; the result is rounded once."""
    generator = torch.Generator().manual_seed(rows)
    delta = torch.randn(600, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    exact = x.double() @ torch.where(delta >= 0, 1.0, -1.0).double().T
    found = times_signs(x, pack_signs(delta)).double()
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * x.double().abs().sum(1, keepdim=True)).all()
