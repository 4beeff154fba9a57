"""ZeroQuant: group-wise weights, token-wise activations, and layer-by-layer distillation (Yao et al. 2022, arXiv
2206.01861).

    y = Q_token(x) Q_group(W)' + b
    for each block k:   minimise over its weights  mean (B_k(x) - B^_k(x))^2,   B^_k with fake quantization of W and x

Group-wise grids follow weights whose rows are uneven, token-wise ones activations whose tokens are. Without `distill`
that is all, and text only shows what it does. With it each block, quantized, learns to return what it returned before:
no labels, one block in memory at a time, a straight-through gradient through the rounding. x is what the blocks before
return as they are now, quantized (the paper feeds the original's), so that a block also learns to make up for them. A
block that is no better for it keeps its plain rounding.

Shapes: x [.., K], W [N, K].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.core.spec import Spec
from fettle.models.surgery import replace
from fettle.quantize.activations import Activations, rounded
from fettle.quantize.calibrate import Calibration, Unit, needs_text, round_blocks
from fettle.quantize.grid import Grid
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.packed import Quantized, blank, quantize


class LayerDistill(Spec):
    """How a quantized block learns from what it was."""

    steps: int = Field(default=100, ge=1, description="updates of a block, a row of text each")
    lr: float = Field(default=1e-4, gt=0, description="of Adam, falling to 0 along a cosine")


class ZeroQuant(Edit):
    """Hold weights in groups and round activations by token; nothing trains afterwards."""

    role = "quantizes"
    loftq: ClassVar[None] = None
    kind: Literal["zeroquant"] = "zeroquant"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Grid(bits=8, group=64)
    activations: Activations | None = Activations(bits=8)
    distill: LayerDistill | None = Field(
        default=None, description="let every block learn to be what it was; needs text"
    )

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return quantize(weight, self.grid)

    def apply(self, model: nn.Module) -> None:
        """Replace the targets, layer by layer. FettleError with `distill`, which needs text."""
        if self.distill is not None:
            needs_text(self)
        quantize_linears(model, self)

    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """Replace the targets, block by block, each distilled where that is asked for."""
        if self.distill is None:
            round_blocks(model, self, calibration)
            return
        observe = self.activations is not None and self.activations.static

        def work(unit: Unit) -> None:
            unit.moments(unit.names, second=False, observe=observe)
            assert self.distill is not None
            weights = {name: unit.weight(name) for name in unit.names}
            if unit.run is not None:
                weights = distilled(unit, weights, self.grid, self.activations, self.distill)
            else:
                calibration.leave(", ".join(unit.names), "not distilled, as it is no part of a block")
            for name, weight in weights.items():
                unit.put(name, self, self.quantize(weight))

        calibration.walk(self, work, second=False)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Blank layers for those that an artifact keeps, the others rounded again."""
        outline_linears(model, self, names or (), lambda w: blank(tuple(w.shape), self.grid, device=w.device))
        if self.distill is None or names is None:
            quantize_linears(model, self, skip=names or ())

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The packed weights where they were distilled."""
        return kept(model, self, always=self.distill is not None)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return self.tensors(model)

    def merge(self, model: nn.Module) -> None:
        """Put dense weights back, in the model's type, so that later edits of the list can be folded into them."""
        dequantize_linears(model, self)


class _Student(nn.Module):
    """A linear layer whose weight and input are rounded in passing."""

    def __init__(self, base: Any, weight: Tensor, grid: Grid, activations: Activations | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias, self.grid, self.activations = base.bias, grid, activations
        self.held: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if self.activations is not None:
            x = rounded(x, self.activations, self.held)
        return nn.functional.linear(x, rounded(self.weight, self.grid).to(x.dtype), self.bias)


def distilled(
    unit: Unit, weights: dict[str, Tensor], grid: Grid, activations: Activations | None, plan: LayerDistill
) -> dict[str, Tensor]:
    """The weights [N, K] float32 of a block after it learned, or as they were where that gave nothing; by name."""
    wanted = unit.remembered(list(unit.batches))
    with _students(unit, weights, grid, activations) as students, torch.enable_grad():
        trained = [student.weight for student in students.values()]
        optimizer = torch.optim.Adam(trained, plan.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
        before = _loss(unit, wanted)
        for step in range(plan.steps):
            j = step % len(unit.batches)
            loss = torch.stack([_apart(a, b) for a, b in zip(unit.outputs(j), wanted[j], strict=True)]).mean()
            gradients = torch.autograd.grad(loss, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        learned = _loss(unit, wanted) < before
        return {n: s.weight.detach().clone() for n, s in students.items()} if learned else weights


@contextmanager
def _students(
    unit: Unit, weights: dict[str, Tensor], grid: Grid, activations: Activations | None
) -> Iterator[dict[str, _Student]]:
    """Within it students stand in the places of the block's layers."""
    bases = {name: unit.model.get_submodule(name) for name in weights}
    students = {n: _Student(base, weights[n].clone(), grid, activations) for n, base in bases.items()}
    for name, student in students.items():
        if activations is not None and activations.static:
            observer = unit.seen(name).observer
            found = () if observer is None else observer.range(activations)
            student.held = tuple(t if t is None else t.to(student.weight.device) for t in found) or None
        replace(unit.model, name, student)
    try:
        yield students
    finally:
        for name, base in bases.items():
            replace(unit.model, name, base)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one.float() - other.float()).square().mean()


@torch.no_grad()
def _loss(unit: Unit, wanted: dict[int, list[Tensor]]) -> float:
    every = [_apart(a, b) for j in unit.batches for a, b in zip(unit.outputs(j), wanted[j], strict=True)]
    return float(torch.stack(every).mean())
