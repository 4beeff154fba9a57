"""Training with rounding in the forward pass: linear layers that compute as their packed form will, and still learn.

    y = x^ W^' + b,    W^ = round(W) on a grid,  x^ = round(x) on another one, or x

W is what the layer under it computes with *now*: its weight, or W + s B A where LoRAs stand around it, so that what is rounded is
what will be packed. Rounding has a gradient of its own (straight through, or learned steps); the product keeps x alone for the
backward pass, and rounds x and W again there, so that training holds no second model of dense rounded weights.

Once training is over, `settle` puts the packed layer in the place of the simulated one: the same weights, bit for bit, and the same
outputs where they are multiplied plainly; a kernel's (kernels.py) differ by its bounds.

Shapes: x [.., K], W [N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.models.select import linears
from fettle.models.surgery import made_by, replace
from fettle.models.weight import innermost, is_quantized, live_weight
from fettle.quantize.activations import Activations, Range, range_tensors, rounded
from fettle.quantize.linear import QuantizedLinear, WeightQuantizer, dequantize_linears, quantized
from fettle.quantize.packed import Quantized


class Rounding(Protocol):
    """A module that rounds weights [N, K] with a gradient, and packs them just so."""

    def __call__(self, weight: Tensor) -> Tensor: ...
    def pack(self, weight: Tensor) -> Quantized: ...


class LearnedInput(Protocol):
    """A module that rounds activations with a gradient, on a range that it holds."""

    def __call__(self, x: Tensor) -> Tensor: ...
    @property
    def held(self) -> Range: ...


class _Product(torch.autograd.Function):
    """x^ W^' + b, which keeps x; `again()` is W^ once more."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, again: Callable[[], Tensor], grid: Activations | None
    ) -> Tensor:
        """x [.., K], weight [N, K] -> [.., N]."""
        ctx.save_for_backward(x)
        ctx.again, ctx.grid = again, grid
        return F.linear(x if grid is None else rounded(x, grid), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the rounded weight, of the bias."""
        (x,) = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        with torch.enable_grad():
            source = x.detach().requires_grad_(for_x)
            met = source if ctx.grid is None else rounded(source, ctx.grid)
        grad_x = grad @ ctx.again() if for_x else None
        if grad_x is not None and met is not source:
            (grad_x,) = torch.autograd.grad(met, source, grad_x)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = flat.T @ met.detach().reshape(-1, x.shape[-1]) if for_weight else None
        return grad_x, grad_weight, flat.sum(0) if for_bias else None, None, None


class SimulatedLinear(nn.Module):
    """Any linear layer, computed as if it were packed; LoRAs of the layer stand inside, whether they come before or after."""

    outermost = True  # models/surgery.py: an update of the weight goes under it

    def __init__(
        self, base: nn.Module, edit: Any, weights: Rounding, activations: Activations | None, inputs: Any = None
    ) -> None:
        super().__init__()
        self.base, self.edit, self.enabled, self.simulates = base, edit, True, True
        self.weights = weights
        self.activations = activations  # the grid of inputs in the packed layer
        self.inputs: LearnedInput | None = inputs  # where their range is learned

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        bias: Any = innermost(self.base).bias
        grid = self.activations if self.inputs is None else None
        met = x if self.inputs is None else self.inputs(x)

        def again() -> Tensor:
            with torch.no_grad():
                return self.rounded().to(x.dtype)

        return _Product.apply(met, self.rounded().to(x.dtype), None if bias is None else bias.to(x.dtype), again, grid)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]

    def rounded(self) -> Tensor:
        """W^, with its gradient."""
        return self.weights(live_weight(self.base))

    @torch.no_grad()
    def settled(self) -> QuantizedLinear:
        """The packed layer that computes the same."""
        plain = innermost(self.base)
        packed = self.weights.pack(live_weight(self.base))
        dense: nn.Module = plain.dense() if is_quantized(plain) else plain  # type: ignore[operator]
        layer = QuantizedLinear(dense, packed, self.edit, None, self.activations)
        if self.inputs is not None:
            layer.hold_range(*self.inputs.held)
        return layer


# What the edits share.

Maker = Callable[[nn.Module, str], SimulatedLinear]


def simulate(model: nn.Module, edit: WeightQuantizer, make: Maker) -> None:
    """Put simulated layers around the targets. FettleError where one cannot be read as one weight."""
    for name, base in linears(model, edit.targets).items():
        plain = innermost(base)
        if type(plain).forward not in (nn.Linear.forward, Conv1D.forward) and not is_quantized(plain):
            raise FettleError(
                f"{edit.kind}: {name} is a {type(plain).__name__}, more than a linear layer; leave it out of the targets"
            )
        if is_quantized(base):
            raise FettleError(
                f"{edit.kind}: {name} is quantized already; leave it out of the targets of one of the two edits"
            )
        try:
            replace(model, name, make(base, name))
        except FettleError as error:
            raise FettleError(f"{edit.kind}: {name}: {error}") from None


def simulated(model: nn.Module, edit: Any) -> list[tuple[str, SimulatedLinear]]:
    """The simulated layers of an edit, by name."""
    return made_by(model, edit, SimulatedLinear)


def tensors_of(model: nn.Module, edit: Any) -> dict[str, Tensor]:
    """What an artifact keeps: the packed weights, and held ranges; packed now where the model still simulates."""
    layers = {name: layer.settled() for name, layer in simulated(model, edit)} or quantized(model, edit)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        held = layer.packed.tensors() | range_tensors(layer.held_range)
        found |= {f"{name}.{key}": t for key, t in held.items()}
    return found


def settle_linears(model: nn.Module, edit: Any) -> None:
    """Packed layers in the places of simulated ones, one after the other."""
    for name, layer in simulated(model, edit):
        replace(model, name, layer.settled())


def merge_linears(model: nn.Module, edit: Any) -> None:
    """Plain layers whose weights lie on the grid. FettleError where inputs are rounded too, which a plain layer cannot."""
    layers = [*(layer for _, layer in simulated(model, edit)), *quantized(model, edit).values()]
    if any(layer.activations is not None for layer in layers):
        raise FettleError(
            f"{edit.kind}: what the layers are given is rounded too, which plain weights cannot hold; keep the artifact, "
            "which runs packed, or train without activations"
        )
    settle_linears(model, edit)
    dequantize_linears(model, edit)
