"""Mixed precision: a budget of bits spread over layers by how much each of them feels rounding.

    minimise  sum_l d_l(b_l)    over b_l in the choices,    so that    sum_l n_l e_l(b_l) <= budget * sum_l n_l

d_l(b): how far the model's answers move, KL(full || rounded) in nats a token of a text, when layer l alone is rounded to b bits; e_l(b): bits
a weight with scales counted; n_l: its weights. That the d add up is an assumption (as in HAWQ, Dong et al. 2019, arXiv 1905.03696, which
takes second derivatives for d): errors of several layers are small and roughly independent.

The choice is a knapsack with one item taken of each layer, solved exactly by dynamic programming over a budget cut into STEPS; sizes
are rounded up, so that what comes out never exceeds the budget.

Shapes: L layers, B choices of bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.roles import evaluating
from fettle.models.select import linears
from fettle.models.surgery import replace
from fettle.models.weight import in_out, read_weight
from fettle.quantize.linear import QuantizedLinear, refuse

STEPS = 1 << 14  # parts that a budget is cut into
Quantizer = Any  # an edit that quantizes one weight at a time: rtn, hqq, gptq (which is asked without its text)


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer: its weights, and for each number of bits what is held of a weight, and how far answers move (nats a token)."""

    layer: str
    weights: int
    held: Mapping[int, float]
    moved: Mapping[int, float]


@torch.no_grad()
def sensitivities(
    forest: Forest,
    batches: Sequence[Batch],
    edits: Mapping[int, Quantizer],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Sensitivity]:
    """Each layer that the edits target, rounded alone by each of them; `edits` by bits. One pass over the text for each, and one more.

    The model is left as it was. FettleError where a layer cannot be rounded.
    """
    with evaluating(forest.model):
        full = [_logps(forest, batch) for batch in batches]
        names = list(linears(forest.model, next(iter(edits.values())).targets))
        found = []
        for i, name in enumerate(names):
            progress(i, len(names))
            found.append(_sensitivity(forest, name, batches, edits, full))
        return found


def _sensitivity(
    forest: Forest, name: str, batches: Sequence[Batch], edits: Mapping[int, Quantizer], full: Sequence[Tensor]
) -> Sensitivity:
    base = forest.model.get_submodule(name)
    held, moved = {}, {}
    for bits, edit in edits.items():
        refuse(base, name, edit.kind)
        try:
            packed = edit.quantize(read_weight(base))
        except FettleError as error:
            raise FettleError(f"edits: {edit.kind}: {name}: {error}") from None
        replace(forest.model, name, QuantizedLinear(base, packed, edit, None, edit.activations))
        try:
            held[bits] = packed.bits
            moved[bits] = _divergence(forest, batches, full)
        finally:
            replace(forest.model, name, base)
    return Sensitivity(name, math.prod(in_out(base)), held, moved)


def _logps(forest: Forest, batch: Batch) -> Tensor:
    """[N, V] of the learned targets, in the type of the model: they are kept for all of the text."""
    learned = (batch.targets != IGNORE).nonzero()[:, 0]
    return forest.logits(batch, learned).float().log_softmax(-1).to(forest.dtype)


def _divergence(forest: Forest, batches: Sequence[Batch], full: Sequence[Tensor]) -> float:
    """Nats a token."""
    total, count = 0.0, 0
    for batch, wanted in zip(batches, full, strict=True):
        p, q = wanted.float(), _logps(forest, batch).float()
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return max(0.0, total / max(1, count))


def allocate(layers: Sequence[Sensitivity], budget: float) -> dict[str, int]:
    """Bits of each layer, at most `budget` bits a weight with scales over all. FettleError where even the fewest are over it."""
    total = budget * sum(layer.weights for layer in layers)
    least = sum(layer.weights * min(layer.held.values()) for layer in layers)
    if least > total * (1 + 1e-9):
        raise FettleError(
            f"mixed precision: {budget:g} bits a weight are under the {least / sum(layer.weights for layer in layers):.3f} that the fewest bits "
            "take with their scales; raise the budget, or allow fewer bits"
        )
    room = total - least  # what can be spent beyond the fewest, so that rounding up costs as little as it may
    unit = max(room / STEPS, 1e-9)
    steps = math.floor(room / unit + 1e-6)
    best = np.zeros(steps + 1)
    taken: list[np.ndarray] = []
    for layer in layers:
        choices = sorted(layer.held)
        fewest = min(layer.held.values())
        costs = [math.ceil(layer.weights * (layer.held[b] - fewest) / unit - 1e-6) for b in choices]
        tried = np.full((len(choices), steps + 1), np.inf)
        for row, cost, bits in zip(tried, costs, choices, strict=True):
            if cost <= steps:
                row[cost:] = best[: steps + 1 - cost] + layer.moved[bits]
        taken.append(tried.argmin(0))
        best = tried.min(0)
    at, chosen = steps, {}
    for layer, picks in zip(reversed(layers), reversed(taken), strict=True):
        bits = sorted(layer.held)[int(picks[at])]
        chosen[layer.layer] = bits
        fewest = min(layer.held.values())
        at -= math.ceil(layer.weights * (layer.held[bits] - fewest) / unit - 1e-6)
    return {layer.layer: chosen[layer.layer] for layer in layers}


def spent(layers: Sequence[Sensitivity], bits: Mapping[str, int]) -> float:
    """Bits a weight with scales, over all layers."""
    held = sum(layer.weights * layer.held[bits[layer.layer]] for layer in layers)
    return held / sum(layer.weights for layer in layers)
