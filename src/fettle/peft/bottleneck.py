"""Bottleneck adapters: a small network in each block, with a path around it.

    f(x) = s (U act(D x + d) + u)          D [M, C], U [C, M]

    houlsby    h <- h + f(h)                 h: what the attention, and the feed-forward part, add to the residual sum;
                                             two a block (Houlsby et al. 2019, arXiv 1902.00751)
    pfeiffer   z <- z + f(z)                 z: the residual sum at the end of the block (pre-norm models);
               N(z) <- N(z + f(N(z)))        where a norm N ends the block (BERT), whose own weights are read twice;
                                             one a block (Pfeiffer et al. 2021, arXiv 2005.00247, as AdapterHub has it)
    parallel   h <- MLP(x) + f(x), s = 4     x: what the feed-forward part sees
                                             (He et al. 2022, arXiv 2110.04366)

C width, M bottleneck. U and u start at zero, so the model is unchanged at start. With cross-attention (T5) 'houlsby' has
a third adapter after it. act makes them non-linear: they cannot be merged, and cost time when the model answers.
A model's dropout that follows the attention or feed-forward part comes after an adapter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.blocks import Block, FeedForward, blocks, closing_norms
from fettle.models.surgery import attach, dropout_of, made_by, replace
from fettle.models.weight import place

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def bottleneck(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, act: str = "relu", scale: float = 1.0
) -> Tensor:
    """f(x) of x [.., C], in the type of x."""
    kind = x.dtype
    inner = ACTIVATIONS[act](F.linear(x, down.to(kind), down_bias.to(kind)))
    return F.linear(inner, up.to(kind), up_bias.to(kind)) * scale


class Bottleneck(nn.Module):
    """f, and its place around what a module computes."""

    def __init__(self, width: int, edit: Adapter, beside: bool, where: dict[str, Any]) -> None:
        super().__init__()
        self.edit, self.beside, self.enabled = edit, beside, True
        self.down = nn.Parameter(torch.empty(edit.size, width, **where))
        self.down_bias = nn.Parameter(torch.zeros(edit.size, **where))
        self.up = nn.Parameter(torch.zeros(width, edit.size, **where))
        self.up_bias = nn.Parameter(torch.zeros(width, **where))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        edit = self.edit
        return bottleneck(x, self.down, self.down_bias, self.up, self.up_bias, edit.activation, edit.factor)

    def around(self, x: Tensor, y: Tensor) -> Tensor:
        """y + f(y), or y + f(x) where it stands beside the module that made y of x."""
        if not self.enabled:
            return y
        return y + F.dropout(self(x if self.beside else y), dropout_of(self))


class AdaptedLinear(nn.Module):
    """The linear layer that ends an attention or a feed-forward part, and the adapter after it."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base, self.adapter, self.edit = base, adapter, adapter.edit
        self.seen: list[Tensor] = []  # what the feed-forward part saw, where the adapter stands beside it

    def forward(self, x: Tensor) -> Tensor:
        """x [.., I] -> [.., C]."""
        y = self.base(x)
        return self.adapter.around(self.seen.pop() if self.adapter.beside else x, y)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]

    def see(self, x: Tensor) -> None:
        """Keep the input of the feed-forward part until its last layer runs."""
        self.seen[:] = [x]


class AdaptedNorm(nn.Module):
    """The norm that ends a block, and the adapter between two uses of it."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base, self.adapter, self.edit = base, adapter, adapter.edit

    def forward(self, z: Tensor) -> Tensor:
        """z [.., C], the residual sum -> [.., C]."""
        if not self.adapter.enabled:
            return self.base(z)
        return self.base(self.adapter.around(self.base(z), z))


def _see(adapted: AdaptedLinear, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    adapted.see(args[0])


class Adapter(Edit):
    """Bottleneck adapters in every block; the base is frozen."""

    kind: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    size: int = Field(default=64, ge=1, description="width of the bottleneck")
    activation: Activation = "relu"
    scale: float | None = Field(default=None, description="factor of its output; 4 for parallel, else 1")
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def factor(self) -> float:
        """The factor of its output."""
        return self.scale if self.scale is not None else 4.0 if self.placement == "parallel" else 1.0

    def apply(self, model: nn.Module) -> None:
        """Put the adapters in. FettleError where the model's blocks are not understood or are narrower than `size`."""
        found = blocks(model)
        for block in found:
            if self.size > block.width:
                raise FettleError(
                    f"adapter.size: {self.size} is over the width of {block.name}, {block.width}; choose a smaller one"
                )
        if self.placement == "houlsby":
            for block in found:
                for attention in block.attentions:
                    self._after(model, block, attention.out)
                if block.mlp is not None:
                    self._after(model, block, block.mlp.leave or str(block.mlp.name))
        elif self.placement == "pfeiffer":
            for name, norm in closing_norms(model, found).items():
                self._at_end(model, next(b for b in found if b.name == name), norm)
        else:
            for block in found:
                if block.mlp is None:
                    raise FettleError(f"adapter: {block.name} has no feed-forward part to stand beside; use pfeiffer")
                self._beside(model, block, block.mlp)

    def _made(self, block: Block, near: nn.Module, beside: bool = False) -> Bottleneck:
        return Bottleneck(block.width, self, beside or self.placement == "parallel", place(near))

    def _after(self, model: nn.Module, block: Block, name: str) -> AdaptedLinear | None:
        module = model.get_submodule(name)
        if block.mlp is not None and name == block.mlp.name:  # experts: no linear layer ends them
            attach(module, self._made(block, module))
            return None
        replace(model, name, adapted := AdaptedLinear(module, self._made(block, module)))
        return adapted

    def _at_end(self, model: nn.Module, block: Block, norm: str | None) -> None:
        if norm is None:
            module = model.get_submodule(block.name)
            attach(module, self._made(block, module))
        else:
            module = model.get_submodule(norm)
            replace(model, norm, AdaptedNorm(module, self._made(block, module, beside=True)))

    def _beside(self, model: nn.Module, block: Block, mlp: FeedForward) -> None:
        if mlp.name is not None:
            module = model.get_submodule(mlp.name)
            attach(module, self._made(block, module))
        elif mlp.leave is not None and (adapted := self._after(model, block, mlp.leave)) is not None:
            model.get_submodule(mlp.enter[0]).register_forward_pre_hook(partial(_see, adapted))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The four weights of each adapter, by name."""
        return {
            f"{name}.{key}": p.detach()
            for name, module in made_by(model, self, Bottleneck)
            for key, p in module.named_parameters()
        }

    def merge(self, model: nn.Module) -> NoReturn:
        """Never exact: FettleError."""
        raise FettleError(
            f"adapter: a bottleneck with '{self.activation}' between its two layers is not linear, so it cannot be merged "
            "into the model's weights; keep the artifact, or tune with lora where plain weights are needed"
        )
