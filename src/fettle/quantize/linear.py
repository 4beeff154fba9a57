"""A linear layer whose weight is held quantized, and putting it in the place of plain ones.

    y = x W' + b,   W = s (l[q] - z)  [N, K], made when it is needed and let go of at once

The forward pass dequantizes into the type of x; the backward pass dequantizes again. Neither keeps W, so that what a layer
holds is its packed codes and scales. models/weight.py reads it like any other layer, and every edit wraps it as such.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.models.allocator import release
from fettle.models.select import linears
from fettle.models.surgery import is_trained, replace
from fettle.models.weight import in_out, is_adapter, is_quantized, read_weight
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized


class _Linear(torch.autograd.Function):
    """x W' + b for a frozen, packed W; keeps no tensor but those of W that the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Quantized) -> Tensor:
        """x [.., K] -> [.., N]."""
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return F.linear(x, weight.values(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the bias."""
        grad_x = grad @ ctx.weight.values(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class QuantizedLinear(nn.Module):
    """Any plain linear layer with its weight packed; the bias is kept as it is."""

    like: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, base: nn.Module, packed: Quantized, edit: WeightQuantizer, residual: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_out(base)
        self.quantizer, self.transposed = edit, isinstance(base, Conv1D)
        there = read_weight(base)
        # Empty: it says which type the layer has, on which device, and follows the model where that changes.
        self.register_buffer("like", there.new_empty(0), persistent=False)
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        self._layout = packed.holding({name: torch.empty(0) for name in packed.tensors()})
        for name, tensor in packed.tensors().items():
            self.register_buffer(name, tensor)
        self.residual = residual  # B [N, r] and A [r, K] that LoftQ leaves to a LoRA

    @property
    def packed(self) -> Quantized:
        """The weight as it is held."""
        return self._layout.holding({name: getattr(self, name) for name in self._layout.tensors()})

    @property
    def weight(self) -> Tensor:
        """The weight in the layout of the plain layer, made at every call: for code that looks past `forward`."""
        return self.dequantized().t() if self.transposed else self.dequantized()

    def dequantized(self) -> Tensor:
        """[N, K] in the type of the plain layer."""
        return self.packed.values(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        return _Linear.apply(x, self.bias, self.packed)  # type: ignore[no-any-return]

    def dense(self) -> nn.Module:
        """The plain layer that computes the same."""
        with torch.device("meta"):  # no weights are drawn
            if self.transposed:
                layer: nn.Module = Conv1D(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight.contiguous(), requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Follow the model to a device; scales keep their type when the model changes its own."""

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.numel() == 0 or isinstance(tensor, nn.Parameter) else _moved(tensor, fn)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        """As nn.Linear's, with the bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packed.bits:.3f}"


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    made = fn(tensor)
    return made if made.dtype == tensor.dtype else tensor.to(made.device)


class WeightQuantizer(Protocol):
    """An edit that quantizes linear layers one by one."""

    @property
    def kind(self) -> str: ...
    @property
    def targets(self) -> str | tuple[str, ...]: ...
    @property
    def loftq(self) -> LoftQ | None: ...
    def quantize(self, weight: Tensor) -> Quantized: ...


@torch.no_grad()
def quantize_linears(model: nn.Module, edit: WeightQuantizer) -> None:
    """Replace plain linear layers by quantized ones, one after the other: a dense weight goes before the next is read.

    FettleError where a target matches nothing, is quantized already, carries an adapter, or cannot be quantized.
    """
    for name in list(linears(model, edit.targets)):  # names only: the dictionary would keep every dense layer alive
        base = model.get_submodule(name)
        _refuse(base, name, edit.kind)
        try:
            weight = read_weight(base)
            packed, residual = edit.loftq.start(weight, edit.quantize) if edit.loftq else (edit.quantize(weight), None)
        except FettleError as error:
            raise FettleError(f"edits: {edit.kind}: {name}: {error}") from None
        replace(model, name, QuantizedLinear(base, packed, edit, residual))
        del base, weight
    release()


def _refuse(base: nn.Module, name: str, kind: str) -> None:
    if is_adapter(base):
        raise FettleError(f"edits: {kind} comes after an edit that wraps {name}; put {kind} before it in the list")
    if is_quantized(base):
        raise FettleError(
            f"edits: {kind} finds {name} quantized already; leave it out of the targets of one of the two edits"
        )
    if is_trained(getattr(base, "weight", None)):
        raise FettleError(
            f"edits: {kind} comes after an edit that trains {name}, and would round away what that learns; put {kind} before it, "
            "leave the layer out of the targets of one of the two, or quantize what fettle export --to hf writes of the result"
        )
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward):
        raise FettleError(
            f"edits: {kind}: {name} is a {type(base).__name__}, more than a linear layer; leave it out of the targets"
        )


def dequantize_linears(model: nn.Module, edit: WeightQuantizer) -> None:
    """Put plain layers, in the model's type, in the places that an edit quantized."""
    for name in list(quantized(model, edit)):
        replace(model, name, model.get_submodule(name).dense())  # type: ignore[operator]


def quantized(model: nn.Module, edit: WeightQuantizer | None = None) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model (that an edit made), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and edit in (None, module.quantizer)
    }


def kept(model: nn.Module, edit: WeightQuantizer) -> dict[str, Tensor]:
    """What an artifact must keep of a quantizer: nothing where it is a function of the base alone, else packed weights."""
    if edit.loftq is None:
        return {}
    return {f"{n}.{k}": t for n, layer in quantized(model, edit).items() for k, t in layer.packed.tensors().items()}


def describe(model: nn.Module) -> dict[str, Any]:
    """What of a model is quantized, at how many bits a weight, and how many weights of which frozen tensors are not.

    Left alone are the head, embeddings, routers and fused experts, which are no linear layers. For a manifest.
    """
    layers = quantized(model)
    if not layers:
        return {}
    count = sum(layer.packed.count for layer in layers.values())
    size = sum(layer.packed.bits * layer.packed.count for layer in layers.values()) / 8
    dense: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not parameter.requires_grad:
            family = re.sub(r"\d+", "#", name)
            dense[family] = dense.get(family, 0) + parameter.numel()
    return {
        "layers": len(layers), "weights": count, "bytes": round(size), "bits": 8 * size / count, "left_dense": dense,
    }  # fmt: skip


@torch.no_grad()
def requantizing(before: nn.Module, merged: nn.Module) -> dict[str, Any]:
    """What quantizing a merged model again would cost, over the layers that are quantized in `before`; for a manifest.

    error = |Q(W) - W| / |W|;  update = |W - W0| / |W|: W merged, W0 the dequantized base, Frobenius norms. Where the error is
    over the update, the rounding is larger than what was learned.
    """
    rows = []
    for name, layer in quantized(before).items():
        outer = name.split(".base")[0]
        weight = read_weight(merged.get_submodule(outer)).float()
        size = weight.norm().clamp_min(1e-30)
        error = (layer.quantizer.quantize(weight).values() - weight).norm() / size
        rows.append((float(error), float((weight - layer.dequantized().float()).norm() / size), outer))
    if not rows:
        return {}
    worst = max(rows)
    return {
        "layers": len(rows),
        "mean_error": sum(row[0] for row in rows) / len(rows),
        "mean_update": sum(row[1] for row in rows) / len(rows),
        "worst_error": worst[0],
        "worst_layer": worst[2],
    }
