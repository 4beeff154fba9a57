"""Learned steps against the paper's own code in float64, and where they begin."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fettle.models.select import linears
from fettle.quantize import LSQ, Activations, Grid
from fettle.quantize.lsq import LearnedInputs, LearnedWeights, ends, input_sizes, stepped
from fettle.quantize.packed import quantize
from laws.test_edits import build


def by_the_paper(v: Tensor, s: Tensor, low: int, high: int, gain: float) -> Tensor:
    """The pseudocode of the paper's appendix: a scaled gradient, a clip, a round that passes gradients through."""
    scaled = s * gain
    step = (s - scaled).detach() + scaled
    clipped = (v / step).clamp(-low, high)
    return ((clipped.round() - clipped).detach() + clipped) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("narrow", [False, True])
def test_values_and_gradients_are_the_papers(bits: int, narrow: bool) -> None:
    grid = Grid(bits=bits, group=16, narrow=narrow)
    low, high = ends(grid)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    s = (0.5 + torch.rand(12, 1, generator=generator, dtype=torch.float64)) * 1.5 / high
    up = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    gain = 1 / math.sqrt(16 * high)
    results = []
    for function in (lambda a, b: stepped(a, b, grid, gain), lambda a, b: by_the_paper(a, b, low, high, gain)):
        a, b = x.clone().requires_grad_(), s.clone().requires_grad_()
        out = function(a, b)
        out.backward(up)
        results.append((out.detach(), a.grad, b.grad))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)
    assert (results[0][1] == 0).any(), "some values were clipped"


def test_steps_begin_where_the_paper_says() -> None:
    weight = torch.randn(6, 32, dtype=torch.float64)
    layer = LearnedWeights(weight, Grid(bits=4, group=8), {"dtype": torch.float64})
    assert torch.allclose(layer.step[:, 0], 2 * weight.view(24, 8).abs().mean(1) / math.sqrt(7))
    assert layer.gain == 1 / math.sqrt(8 * 7)
    inputs = LearnedInputs(32, Activations(group="tensor", static=True), torch.tensor(0.7), {"dtype": torch.float64})
    assert float(inputs.step.detach()) == pytest.approx(2 * 0.7 / math.sqrt(127)) and inputs.gain == 1 / math.sqrt(
        32 * 127
    )


def test_the_size_of_inputs_is_what_the_model_makes_of_random_tokens() -> None:
    model = build("llama", torch.float32)
    found = input_sizes(model, "all-linear")
    assert found.keys() == linears(model).keys() and all(0 < float(size) < 10 for size in found.values())
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    again = input_sizes(model, "all-linear")
    hook.remove()
    assert all(torch.equal(found[n], again[n]) for n in found)
    assert torch.equal(again["model.layers.1.mlp.down_proj"], seen[0].abs().mean()) and seen[0].shape[1] == 64


def test_a_learned_range_beats_the_range_of_the_values() -> None:
    """A layer with outliers, trained on its own output's error: the steps shrink, and the error falls below round-to-nearest's."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    weight[:, 0] *= 12
    grid = Grid(bits=3)
    layer = LearnedWeights(weight, grid, {"dtype": torch.float32})
    x = torch.randn(256, 64)
    wanted = x @ weight.T
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(x @ layer(weight).T, wanted).backward()
        optimizer.step()
    learned = nn.functional.mse_loss(x @ layer.pack(weight).values().T, wanted)
    nearest = nn.functional.mse_loss(x @ quantize(weight, grid).values().T, wanted)
    assert float(learned) < 0.8 * float(nearest)


def test_what_cannot_be_learned_is_refused() -> None:
    for wrong, said in (
        ({"grid": {"levels": "normal"}}, "steps are learned for levels: int"),
        ({"grid": {"range": "mse"}}, "the range is learned"),
        ({"activations": {"bits": 8}}, "group: tensor and static: true"),
    ):
        with pytest.raises(ValidationError, match=said):
            LSQ.model_validate(wrong)
