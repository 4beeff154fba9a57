"""Mixed precision: the knapsack against every choice there is, the budget, and a model of uneven layers at equal bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.quantize import RTN, Grid
from fettle.quantize.mixed import STEPS, Sensitivity, allocate, sensitivities, spent

CHOICES = (2, 3, 4, 8)


def layers(draw: list[tuple[int, float]]) -> list[Sensitivity]:
    """Layers of some sizes that feel rounding by so much, halved by each bit."""
    return [
        Sensitivity(f"{i}", 64 * size, {b: b + 0.25 for b in CHOICES}, {b: felt * 4.0**-b for b in CHOICES})
        for i, (size, felt) in enumerate(draw)
    ]


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 100)), min_size=1, max_size=5), st.floats(2.25, 8.25))
def test_it_is_the_best_of_all_choices_within_the_budget(drawn: list[tuple[int, float]], budget: float) -> None:
    made = layers(drawn)
    chosen = allocate(made, budget)
    assert list(chosen) == [layer.layer for layer in made] and spent(made, chosen) <= budget * (1 + 1e-9)
    slack = (budget - 2.25) * len(made) / STEPS  # what rounding sizes up may have cost
    best = min(
        sum(layer.moved[b] for layer, b in zip(made, bits, strict=True))
        for bits in itertools.product(CHOICES, repeat=len(made))
        if spent(made, dict(zip(chosen, bits, strict=True))) <= budget - slack + 1e-12 or set(bits) == {2}
    )
    assert sum(layer.moved[chosen[layer.layer]] for layer in made) <= best + 1e-9


def test_a_budget_that_cannot_be_met_is_told_with_the_least() -> None:
    with pytest.raises(FettleError, match=r"2 bits a weight are under the 2.250"):
        allocate(layers([(1, 1.0), (2, 1.0)]), 2.0)
    assert set(allocate(layers([(1, 1.0), (2, 1.0)]), 2.25).values()) == {2}
    assert set(allocate(layers([(1, 1.0), (2, 1.0)]), 9.0).values()) == {8}


def uneven(folder: Path) -> Forest:
    """A model that is sure of its answers, whose first block does nearly all and whose second nearly nothing."""
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    with torch.no_grad():
        forest.model.lm_head.weight.mul_(20)
        for name, parameter in forest.model.model.layers[0].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(20)
    return forest


def text(seed: int) -> Batch:
    ids = np.random.default_rng(seed).integers(5, 300, 64).astype(np.int32)
    return pack([Example((Node(ids, np.ones(len(ids), np.float32)),), "text")], len(ids), 0)


@torch.no_grad()
def moved(folder: Path, edits: list[RTN], full: Forest, batch: Batch) -> float:
    """KL from the full model on a text that was not measured on."""
    forest = uneven(folder)
    for edit in edits:
        edit.apply(forest.model)
    p, q = (f.head.logits(f.hidden(batch)).log_softmax(-1) for f in (full, forest))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_beats_equal_bits_where_layers_are_uneven(tiny_llama: Path) -> None:
    forest, grid = uneven(tiny_llama), Grid(bits=3, group=32, symmetric=False, scale="float16")
    by_bits = {b: RTN(grid=grid.model_copy(update={"bits": b})) for b in (2, 3, 4, 5)}
    before = {name: p.clone() for name, p in forest.model.named_parameters()}
    found = sensitivities(forest, [text(0), text(1)], by_bits)
    assert all(torch.equal(p, before[name]) for name, p in forest.model.named_parameters())
    assert len(found) == 14 and all(layer.moved[2] > layer.moved[5] >= 0 for layer in found)
    budget = found[0].held[3]
    chosen = allocate(found, budget)
    assert spent(found, chosen) <= budget and len(set(chosen.values())) > 1
    mixed = [
        RTN(grid=by_bits[b].grid, targets=tuple(name for name, c in chosen.items() if c == b))
        for b in set(chosen.values())
    ]
    equal, better = (moved(tiny_llama, edits, uneven(tiny_llama), text(9)) for edits in ([by_bits[3]], mixed))
    assert better < 0.75 * equal, (better, equal)
