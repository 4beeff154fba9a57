"""A linear layer whose weight is held quantized, and putting it in the place of plain ones.

    y = x W' + b,   W = s (l[q] - z)  [N, K], multiplied packed where a kernel can, else made and let go of at once

With `activations` x is rounded too, see activations.py; kernels.py says what multiplies. The backward pass makes W anew and
keeps none, so that what a layer holds is its packed codes and scales. models/weight.py reads it like any other layer, and every
edit wraps it as such.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.models.allocator import release
from fettle.models.select import linears
from fettle.models.surgery import changed_by, is_trained, replace
from fettle.models.weight import in_out, is_adapter, is_quantized, read_weight
from fettle.quantize.activations import Activations, Ranged, range_tensors, reached
from fettle.quantize.kernels import FORMS, Held, fitting, kernel_for, pick, product, tensors
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized

_ARRANGING = threading.RLock()  # two threads that both generate first change the form once


class _Linear(torch.autograd.Function):
    """A layer's product for a frozen, packed W; keeps no tensor of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """x [.., K] -> [.., N]."""
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        clips = layer.activations is not None and layer.activations.clips and ctx.needs_input_grad[0]
        ctx.save_for_backward(reached(x, layer.activations, layer.held_range) if clips else None)  # type: ignore[arg-type]
        return layer.product(x, learning=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, where it was not clipped, and of the bias."""
        (mask,) = ctx.saved_tensors
        grad_x = grad @ ctx.layer.values(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_x = grad_x if mask is None or grad_x is None else grad_x.mul_(mask)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class QuantizedLinear(Ranged):
    """Any plain linear layer with its weight packed; the bias is kept as it is."""

    like: Tensor
    bias: nn.Parameter | None
    held: Held  # the weight: its portable form, or a kernel's

    def __init__(
        self,
        base: nn.Module,
        packed: Quantized,
        edit: WeightQuantizer,
        residual: tuple[Tensor, Tensor] | None = None,
        activations: Activations | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_out(base)
        self.quantizer, self.transposed = edit, isinstance(base, Conv1D)
        self.changed_by = changed_by(base)
        self.own = bool(self.changed_by)  # whether its codes are no function of the base alone
        there = read_weight(base)
        # Empty: it says which type the layer has, on which device, and follows the model where that changes.
        self.register_buffer("like", there.new_empty(0), persistent=False)
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        self._hold(packed)
        self.residual = residual  # B [N, r] and A [r, K] that LoftQ leaves to a LoRA
        self.await_range(activations, there.device)
        self.fits = fitting(packed, activations)  # the kernels that may multiply; none: always plainly

    @property
    def packed(self) -> Quantized:
        """The weight in its portable form, which the layer holds from here on, until a kernel wants its own."""
        with _ARRANGING:
            if not isinstance(self.held, Quantized):
                with torch.no_grad(), torch.inference_mode(False):
                    self._hold(self.held.restored())
        return self.held  # type: ignore[return-value]

    @property
    def bits(self) -> float:
        """Effective bits a weight, in the portable form: what an artifact or an export would hold."""
        return self.held.bits

    def _hold(self, held: Held) -> None:
        """Hold a form of the weight, in place of the one before."""
        for name in tensors(self.held) if "held" in self.__dict__ else ():
            del self._buffers[name]
        for name, tensor in tensors(held).items():
            self.register_buffer(name, tensor)
        self.held = held

    def _arranged(self, kernel: str) -> Held:
        """The form that a kernel reads, which the layer holds from here on."""
        with _ARRANGING:
            if isinstance(self.held, Quantized):
                with torch.no_grad(), torch.inference_mode(False):
                    self._hold(FORMS[kernel].of(self.held))
            return self.held

    @property
    def weight(self) -> Tensor:
        """The weight in the layout of the plain layer, made at every call: for code that looks past `forward`."""
        return self.dequantized().t() if self.transposed else self.dequantized()

    def dequantized(self) -> Tensor:
        """[N, K] in the type of the plain layer."""
        return self.held.values(self.like.dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K], rounded once to `dtype`."""
        return self.held.values(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]. FettleError where the range of a static input was never set."""
        if torch.is_grad_enabled() and (x.requires_grad or self.bias is not None and self.bias.requires_grad):
            return _Linear.apply(x, self.bias, self)  # type: ignore[no-any-return]
        return self.product(x)

    def product(self, x: Tensor, learning: bool = False) -> Tensor:
        """The same without a gradient; `learning`: the backward pass will make W again, which is fastest from the portable form."""
        kernel, range = kernel_for(self.fits, x), self.ready_range()
        held = self.held  # what another thread puts in its place does not concern this call
        if kernel != "plain" and isinstance(held, Quantized):
            held = self._arranged(kernel)
        elif kernel == "plain" and learning:
            held = self.packed
        return product(kernel, held, x, self.bias, self.activations, range)

    def kernel(self, rows: int = 1) -> str:
        """What multiplies so many rows in the model's type, see kernels.py: 'int8', 'int4', 'w8a8' or 'plain'."""
        return pick(self.fits, rows, self.like.dtype, self.like.device.type)

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
        """Follow the model to a device, in the portable form; scales keep their type when the model changes its own."""
        self.packed  # noqa: B018

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.numel() == 0 or isinstance(tensor, nn.Parameter) else _moved(tensor, fn)

        super()._apply(moved, recurse)
        self.held = self.packed.holding(self._buffers)  # type: ignore[arg-type]
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """In the portable form."""
        self.packed  # noqa: B018
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the bits."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits:.3f}"


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
    @property
    def activations(self) -> Activations | None: ...
    def quantize(self, weight: Tensor) -> Quantized: ...


@torch.no_grad()
def quantize_linears(model: nn.Module, edit: WeightQuantizer, skip: Collection[str] = ()) -> None:
    """Replace plain linear layers by quantized ones, one after the other: a dense weight goes before the next is read.

    Those whose codes are among `skip` are quantized already, by this edit. FettleError where a target matches nothing, is
    quantized already, carries an adapter, or cannot be quantized.
    """
    names = [
        n for n in linears(model, edit.targets) if f"{n}.codes" not in skip
    ]  # a dictionary would keep dense layers
    for name in names:
        base = model.get_submodule(name)
        refuse(base, name, edit.kind)
        try:
            weight = read_weight(base)
            packed, residual = edit.loftq.start(weight, edit.quantize) if edit.loftq else (edit.quantize(weight), None)
        except FettleError as error:
            raise FettleError(f"edits: {edit.kind}: {name}: {error}") from None
        replace(model, name, QuantizedLinear(base, packed, edit, residual, edit.activations))
        del base, weight
    release()


def refuse(base: nn.Module, name: str, kind: str) -> None:
    """FettleError where a quantizer may not take a layer: it is quantized, wrapped, trained, or more than a linear layer."""
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


@torch.no_grad()
def outline_linears(
    model: nn.Module, edit: WeightQuantizer, names: Collection[str], blank: Callable[[Tensor], Quantized]
) -> None:
    """Lay `blank(weight)` in the places of the layers whose codes are among `names`, the tensors of an artifact."""
    for name in [n.removesuffix(".codes") for n in names if n.endswith(".codes")]:
        base = model.get_submodule(name)
        refuse(base, name, edit.kind)
        layer = QuantizedLinear(base, blank(read_weight(base)), edit, None, edit.activations)
        layer.own = True
        replace(model, name, layer)
        del base
    release()


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


def require_no_residual(model: nn.Module) -> None:
    """FettleError where LoftQ took an update off a weight and no LoRA began from it: what is left is worse than plain rounding."""
    left = {name.split(".base")[0]: layer.residual for name, layer in quantized(model).items()}
    waiting = {name: residual[0].shape[1] for name, residual in left.items() if residual is not None}
    if waiting:
        (name, rank), more = next(iter(waiting.items())), len(waiting) - 1
        raise FettleError(
            f"edits: loftq took an update of rank {rank} off {name}{f' and {more} more' if more else ''}, and no lora begins from it; "
            f"add {{kind: lora, rank: {rank}, init: loftq}} with the quantizer's targets, or leave loftq out"
        )


def kept(model: nn.Module, edit: WeightQuantizer, always: bool = False) -> dict[str, Tensor]:
    """What an artifact must keep of a quantizer: static ranges, and packed weights where they are no function of the base alone.

    They are none (`always`) of a method that looks at more, and where an edit before it scaled the weight.
    """
    found: dict[str, Tensor] = {}
    for name, layer in quantized(model, edit).items():
        held = layer.packed.tensors() if always or edit.loftq is not None or layer.own else {}
        found |= {f"{name}.{key}": tensor for key, tensor in (held | range_tensors(layer.held_range)).items()}
    return found


def describe(model: nn.Module) -> dict[str, Any]:
    """What of a model is quantized, at how many bits a weight, and how many weights of which frozen tensors are not.

    Left alone are the head, embeddings, routers and stacked experts, which are no linear layers. For a manifest.
    """
    layers = quantized(model)
    if not layers:
        return {}
    counts = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    count = sum(counts.values())
    size = sum(layer.bits * counts[name] for name, layer in layers.items()) / 8
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
