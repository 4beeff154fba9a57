"""LoftQ: the residual makes up for the rounding, more with every bit that is missing."""

from __future__ import annotations

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.quantize import Grid, LoftQ
from fettle.quantize.loftq import loftq
from fettle.quantize.nf4 import nf4
from fettle.quantize.packed import quantize

QUANTIZERS = {
    "nf4": nf4,
    "nf2": lambda w: quantize(w, Grid(levels="normal", bits=2, group=64)),
    "int3": lambda w: quantize(w, Grid(bits=3, group=32, symmetric=False)),
}


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(96, 128) * 0.02 + torch.randn(96, 4) @ torch.randn(4, 128) * 0.02


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_start_is_nearer_to_the_weight_than_plain_rounding(name: str, weight: torch.Tensor) -> None:
    quantizer = QUANTIZERS[name]

    def error(iterations: int) -> float:
        packed, b, a = loftq(weight, quantizer, 16, iterations)
        assert b.shape == (96, 16) and a.shape == (16, 128)
        return float((packed.values() + b @ a - weight).norm())

    plain = float((quantizer(weight).values() - weight).norm())
    assert error(1) < 0.9 * plain
    assert error(5) <= error(1) and (name == "nf2" or error(5) < error(1))


def test_one_iteration_is_the_best_low_rank_part_of_the_residual(weight: torch.Tensor) -> None:
    wide = weight.double()
    packed, b, a = loftq(wide, nf4, 8, 1)
    left = wide - packed.values(torch.float64)
    u, s, vh = torch.linalg.svd(left)
    assert torch.allclose(b @ a, u[:, :8] * s[:8] @ vh[:8], atol=1e-12)
    assert torch.equal(packed.codes, nf4(wide).codes)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1)), "the roots of the singular values go to each side"


def test_the_fast_way_is_near_the_exact_one(weight: torch.Tensor) -> None:
    torch.manual_seed(0)
    exact, fast = (loftq(weight, nf4, 16, 5, powers) for powers in (None, 16))
    errors = [float((p.values() + b @ a - weight).norm()) for p, b, a in (exact, fast)]
    assert errors[1] < 1.02 * errors[0]


def test_a_rank_over_the_size_is_a_sentence() -> None:
    with pytest.raises(FettleError, match="rank 9 is over the size"):
        LoftQ(rank=9).start(torch.randn(8, 16), nf4)
