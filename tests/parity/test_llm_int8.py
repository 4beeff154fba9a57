"""LLM.int8 against bitsandbytes' layer on the CPU, which computes in float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fettle.quantize import LLMInt8
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.packed import unpack

bnb = pytest.importorskip("bitsandbytes")


def layers() -> tuple[nn.Linear, nn.Module, QuantizedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(256, 64).half().float().requires_grad_(False)
    theirs = bnb.nn.Linear8bitLt(256, 64, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(plain.weight.clone(), requires_grad=False, has_fp16_weights=False)
    theirs.bias = plain.bias
    edit = LLMInt8()
    return (
        plain,
        theirs.to("cpu").eval(),
        QuantizedLinear(plain, edit.quantize(plain.weight), edit, None, edit.activations),
    )


def inputs(outliers: bool) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(7, 256).clamp(-5, 5)
    if outliers:
        x[:, [3, 77]] = x[:, [3, 77]].sign() * (7 + x[:, [3, 77]].abs())
    return x.half().float()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("outliers", [False, True])
@torch.no_grad()
def test_output_and_codes_are_theirs_up_to_float16(outliers: bool) -> None:
    plain, theirs, ours = layers()
    x = inputs(outliers)
    wanted = theirs(x)
    state = theirs.state.CB if theirs.state.CB is not None else theirs.weight.data
    codes = unpack(ours.packed.codes, 8, 256 * 64).int().view(64, 256) - 128
    assert torch.equal(codes, state.int())
    found, exact = ours(x), plain(x)
    rounding = float((found - exact).norm())
    apart = float((found - wanted).norm())
    print(f"apart {apart:.4f}, of the rounding of both {rounding:.4f}")
    assert apart < 0.05 * rounding
