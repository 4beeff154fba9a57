"""The one place that knows how a linear layer stores its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError


def is_linear(module: nn.Module) -> bool:
    """Whether `module` maps the last dimension by a matrix: a linear layer, or an adapter around one (`.base`)."""
    return isinstance(module, (nn.Linear, Conv1D)) or is_adapter(module)


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` wraps a linear layer as its `base`."""
    base = getattr(module, "base", None)
    return isinstance(base, nn.Module) and is_linear(base)


def in_out(module: nn.Module) -> tuple[int, int]:
    """(in, out) widths of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_adapter(module):
        return in_out(module.base)  # type: ignore[arg-type]
    raise FettleError(f"{type(module).__name__}: not a linear layer that fettle can read (nn.Linear or Conv1D)")


def read_weight(module: nn.Module) -> Tensor:
    """The weight as [out, in]; a view where the layer stores it, so do not write to it."""
    if is_adapter(module):
        raise FettleError(
            f"{type(module).__name__} adapts a linear layer: read the weight of its base, or merge it first"
        )
    in_out(module)
    weight = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight  # type: ignore[operator, return-value]


@torch.no_grad()
def write_weight(module: nn.Module, tensor: Tensor) -> None:
    """Store a weight [out, in], rounded to the dtype of the layer."""
    there = read_weight(module)
    if there.shape != tensor.shape:
        raise FettleError(f"a weight of shape {tuple(tensor.shape)} does not fit a layer of {tuple(there.shape)}")
    there.copy_(tensor)
