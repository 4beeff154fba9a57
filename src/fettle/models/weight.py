"""The one place that knows how a linear layer stores its weight.

An embedding is a linear map too, from a token's place among V to C widths, stored as [V, C] like a Conv1D: here its weight
is [C, V]. It is not `is_linear`, because it takes ids rather than vectors.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps the last dimension by a matrix: a linear layer, quantized or not, or an adapter around one (`.base`)."""
    inner = innermost(module)
    return isinstance(inner, (nn.Linear, Conv1D)) or is_quantized(inner)


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that holds its weight in another form and gives it back when asked.

    Such a layer has `in_features`, `out_features`, `dequantized()` -> [out, in] and `dense()`, the plain layer like it.
    """
    return callable(getattr(module, "dequantized", None))


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` looks vectors up by token id: an embedding, or an adapter around one."""
    return isinstance(innermost(module), nn.Embedding)


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` wraps a linear layer or an embedding as its `base`."""
    base = getattr(module, "base", None)
    return isinstance(base, nn.Module) and (is_linear(base) or is_embedding(base))


def innermost(module: nn.Module) -> nn.Module:
    """What stands inside all adapters around it."""
    while isinstance(base := getattr(module, "base", None), nn.Module):
        module = base
    return module


def in_out(module: nn.Module) -> tuple[int, int]:
    """(in, out) widths of a linear layer; an adapter that changes those of its base says so in an `in_out` of its own."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear) or is_quantized(module):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_adapter(module):
        return getattr(module, "in_out", None) or in_out(module.base)  # type: ignore[arg-type]
    raise FettleError(f"{type(module).__name__}: not a linear layer that fettle can read (nn.Linear or Conv1D)")


def read_weight(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a view where the layer stores it, so do not write to it; made anew of a quantized layer."""
    if is_adapter(module):
        raise FettleError(
            f"{type(module).__name__} adapts a linear layer: read the weight of its base, or merge it first"
        )
    in_out(module)
    if is_quantized(module):
        return module.dequantized()  # type: ignore[operator, no-any-return]
    weight = module.weight
    return weight.t() if isinstance(module, (Conv1D, nn.Embedding)) else weight  # type: ignore[operator, return-value]


def live_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] that a layer computes with now, with the gradient of what trains: its own, plus what LoRAs add.

    FettleError where something around the layer is more than a change of its weight.
    """
    if is_adapter(module):
        own = getattr(module, "live_weight", None)
        if own is None:
            raise FettleError(
                f"{type(module).__name__} around it is more than a change of its weight; put this edit before that one"
            )
        return own()  # type: ignore[no-any-return]
    return read_weight(module)


@torch.no_grad()
def write_weight(module: nn.Module, tensor: Tensor) -> None:
    """Store a weight [out, in], rounded to the dtype of the layer."""
    if is_quantized(module):
        raise FettleError(
            f"{type(module).__name__}: a quantized layer takes no new weight, which it would round; merge the edit that "
            "quantized it first, as the list of edits is merged in its order, and the layer is dense"
        )
    there = read_weight(module)
    if there.shape != tensor.shape:
        raise FettleError(f"a weight of shape {tuple(tensor.shape)} does not fit a layer of {tuple(there.shape)}")
    there.copy_(tensor)


def count_weights(model: nn.Module) -> int:
    """How many weights a model has, those that quantized layers stand for among them."""
    packed = [math.prod(in_out(m)) for m in model.modules() if is_quantized(m)]
    return sum(p.numel() for p in model.parameters()) + sum(packed)


def place(module: nn.Module) -> dict[str, Any]:
    """Where the masters of an adapter of `module` belong: its device, and float32 or wider."""
    held = next(chain(module.parameters(), module.buffers()))
    return {"device": held.device, "dtype": torch.float64 if held.dtype == torch.float64 else torch.float32}
