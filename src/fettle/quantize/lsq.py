"""LSQ: learned step size quantization (Esser et al. 2019, arXiv 1902.08153).

    v^ = s clip(round(v / s), -Q_N, Q_P)            Q_N = 2^(b-1), Q_P = 2^(b-1) - 1                            (equations 1, 2)

    d v^ / d v = 1 where -Q_N <= v / s <= Q_P, else 0                                                           (equation 5)
    d v^ / d s = round(v / s) - v / s there, else -Q_N or Q_P                                                   (equation 3)
    the latter times g = 1 / sqrt(n Q_P), n the values that share s: of a weight its group, of activations the layer's inputs
                                                                                                                (section 2.2)

The ranges are no function of the values but are learned with them: where clipping costs less than coarse steps, a range shrinks.
Weights have a step for each group of their grid; a layer's inputs have one for all tokens, so that a packed layer rounds them on a
held range, with nothing to find out at run time.

Steps start at 2 mean |v| / sqrt(Q_P). For inputs, v is what the model makes of random tokens at start, the same on every machine
and with every recipe: no data is needed, and training moves the steps to where the data want them.

Shapes: G groups of L values, W [N, K]; x [.., K]; a weight's steps [G, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fettle.core.families import Edit
from fettle.models.experts import everywhere
from fettle.models.select import linears
from fettle.models.weight import in_out, live_weight, place
from fettle.quantize.activations import Activations, Range
from fettle.quantize.grid import Grid, encode, group_length, snapped
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized, pack
from fettle.quantize.simulated import (
    SimulatedLinear,
    merge_linears,
    settle_linears,
    simulate,
    simulated,
    tensors_of,
)

PROBE = 64  # random tokens that the first steps of inputs are found on
LEAST = 1e-8  # a step stays over it


def stepped(x: Tensor, step: Tensor, grid: Grid, gain: float) -> Tensor:
    """v^ of groups x [G, L] with steps [G, 1]; `gain` is g."""
    return _Stepped.apply(x, step, grid, gain)  # type: ignore[no-any-return]


def first_step(size: Tensor, grid: Grid) -> Tensor:
    """2 E|v| / sqrt(Q_P), from E|v|."""
    return (2 * size / math.sqrt(ends(grid)[1])).clamp_min(LEAST)


def ends(grid: Grid) -> tuple[int, int]:
    """(Q_N, Q_P)."""
    half = 2 ** (grid.bits - 1)
    return half - int(grid.narrow), half - 1


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid, gain: float) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.grid, ctx.gain = grid, gain
        return snapped(x, step, None, grid).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors
        low, high = ends(ctx.grid)
        units = x.to(step.dtype) / step
        inside = (units >= -low) & (units <= high)
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        slope = torch.where(inside, units.round() - units, units.clamp(-low, high))
        grad_step = (grad.to(step.dtype) * slope).sum(1, keepdim=True).mul_(ctx.gain)
        return grad_x, grad_step, None, None


class LearnedWeights(nn.Module):
    """Weights rounded with learned steps."""

    def __init__(self, weight: Tensor, grid: Grid, where: dict[str, Any]) -> None:
        super().__init__()
        self.grid, self.length = grid, group_length(tuple(weight.shape), grid)
        size = weight.reshape(-1, self.length).to(**where).abs().mean(1, keepdim=True)
        self.step = nn.Parameter(first_step(size, grid))
        self.gain = 1 / math.sqrt(self.length * ends(grid)[1])

    def forward(self, weight: Tensor) -> Tensor:
        """W^ of W [N, K]."""
        return stepped(weight.reshape(-1, self.length), self.step, self.grid, self.gain).view(weight.shape)

    def pack(self, weight: Tensor) -> Quantized:
        """W^ as it is held."""
        codes = encode(weight.reshape(-1, self.length), self.step.detach(), None, self.grid)
        scale = self.step.detach().view(-1).to(self.grid.scale_dtype)
        return Quantized(self.grid, tuple(weight.shape), self.length, pack(codes.reshape(-1), self.grid.bits), scale)


class LearnedInputs(nn.Module):
    """Activations rounded with one learned step."""

    def __init__(self, inputs: int, grid: Grid, size: Tensor, where: dict[str, Any]) -> None:
        super().__init__()
        self.grid = grid
        self.step = nn.Parameter(first_step(size.to(**where).view(1, 1), grid))
        self.gain = 1 / math.sqrt(inputs * ends(grid)[1])

    def forward(self, x: Tensor) -> Tensor:
        """x^ of x [.., K]."""
        return stepped(x.reshape(1, -1), self.step, self.grid, self.gain).view(x.shape)

    @property
    def held(self) -> Range:
        """The step, as the packed layer holds it."""
        return self.step.detach(), None


class LSQ(Edit):
    """Round as a packed model would, with ranges that are learned; packed when training ends. The steps train by themselves."""

    kind: Literal["lsq"] = "lsq"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Field(default=Grid(bits=4), description="of the weights: int, symmetric; `range` is learned")
    activations: Activations | None = Field(
        default=None, description="of the inputs: int, symmetric, static; `range` is learned"
    )
    lr_ratio: float = Field(default=1.0, gt=0, description="learning rate of the steps over that of the weights")

    @model_validator(mode="after")
    def _learnable(self) -> LSQ:
        for name, grid in (("grid", self.grid), ("activations", self.activations)):
            if grid is None:
                continue
            if grid.levels != "int" or not grid.symmetric:
                raise ValueError(
                    f"{name}: steps are learned for levels: int with symmetric: true; else take {{kind: qat}}"
                )
            if grid.range != "minmax" or grid.scale != "float32":
                raise ValueError(f"{name}: the range is learned, in float32; leave out 'range' and 'scale'")
        if self.activations is not None and not self.activations.static:
            raise ValueError(
                "activations: one step is learned for all tokens; give group: tensor and static: true, or take {kind: qat}"
            )
        return self

    @property
    def loftq(self) -> LoftQ | None:
        """None: nothing is left to a LoRA."""
        return None

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K], on the steps that learning begins with."""
        return LearnedWeights(weight, self.grid, {"dtype": torch.float32}).pack(weight)

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where groups do not divide a row, or where a layer is no plain one."""
        sizes = input_sizes(model, self.targets) if self.activations is not None else {}

        def make(base: nn.Module, name: str) -> SimulatedLinear:
            where = place(base)
            weights, inputs = LearnedWeights(live_weight(base).detach(), self.grid, where), None
            if self.activations is not None:
                inputs = LearnedInputs(in_out(base)[0], self.activations, sizes[name], where)
            return SimulatedLinear(base, self, weights, self.activations, inputs)

        simulate(model, self, make)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The packed weights with their steps, and the inputs' steps."""
        return tensors_of(model, self)

    def lr_scales(self, model: nn.Module) -> dict[str, float]:
        """`lr_ratio` for every step."""
        return {f"{layer}.{key}": self.lr_ratio for layer, key, _ in self._steps(model)} if self.lr_ratio != 1 else {}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Keep the steps over 0."""
        for _, _, parameter in self._steps(model):
            parameter.clamp_(min=LEAST)

    def settle(self, model: nn.Module) -> None:
        """Pack the layers."""
        settle_linears(model, self)

    def merge(self, model: nn.Module) -> None:
        """Plain weights on the grid. FettleError where inputs are rounded too."""
        merge_linears(model, self)

    def _steps(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
        for name, layer in simulated(model, self):
            yield from ((name, key, p) for key, p in layer.named_parameters() if not key.startswith("base."))


@torch.no_grad()
def input_sizes(model: Any, targets: Any) -> dict[str, Tensor]:
    """Mean |x| of what each target is given when the model reads random tokens; 1 where nothing reaches it."""
    layers = linears(model, targets)
    found: dict[str, Tensor] = {}
    with _watching(layers, found), everywhere():
        size, device = int(model.config.get_text_config().vocab_size), next(model.parameters()).device
        ids = torch.randint(size, (1, PROBE), generator=torch.Generator().manual_seed(0)).to(device)
        training = model.training
        model.eval()
        try:
            model.base_model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
        finally:
            model.train(training)
    return {name: found.get(name, torch.ones(())) for name in layers}


@contextmanager
def _watching(layers: dict[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].float().abs().mean()}))  # type: ignore[misc]
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
