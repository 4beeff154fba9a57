"""TinyTL: biases and lite residual modules train, so that few activations are kept (Cai et al. 2020, arXiv 2007.11622).

    y = W x + b + d                     d [N] trains: its gradient is a sum of the output's, and W, frozen, needs no x
    z = block(x) + U relu(G P x)        the lite residual of each block

P means of `pool` neighbouring channels [C] -> [C/p]; G [g, M/g, C/(p g)] a linear layer in g groups; U [C, M], zero at
start. Of a lite residual the backward pass keeps P x and the M outputs of G after relu: C/p + M numbers a token, where
LoRA keeps the inputs of all layers it adapts.

The paper's residual halves the resolution of an image, convolves in groups without the wide inside of its blocks, and
scales up again. Text has no resolution to halve: a mean over neighbouring tokens would have to keep to the past, to the
path within a forest batch, and to what a cache holds of earlier tokens when the model answers. So a token's residual
depends on that token alone, and what is halved is its channels. Norms' biases train too, their scales do not.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.blocks import Block, blocks
from fettle.models.surgery import attach, made_by
from fettle.models.weight import place
from fettle.peft.bitfit import Biased, every_bias, put_biases


def lite(x: Tensor, grouped: Tensor, up: Tensor, pool: int) -> Tensor:
    """U relu(G P x): x [.., C], G [g, M/g, C/(p g)], U [C, M] -> [.., C]."""
    groups, _, width = grouped.shape
    pooled = x.reshape(-1, groups, width, pool).mean(-1)
    inner = torch.einsum("tgc,gmc->tgm", pooled, grouped.to(x.dtype)).flatten(1).relu()
    return F.linear(inner, up.to(x.dtype)).view_as(x)


class Lite(nn.Module):
    """The lite residual of one block."""

    def __init__(self, width: int, edit: TinyTL, where: dict[str, Any]) -> None:
        super().__init__()
        self.edit, self.enabled = edit, True
        groups = edit.groups
        inside = width // (edit.pool * groups)
        self.grouped = nn.Parameter(torch.empty(groups, edit.size // groups, inside, **where))
        self.up = nn.Parameter(torch.zeros(width, edit.size, **where))
        bound = 1 / math.sqrt(inside)
        nn.init.uniform_(self.grouped, -bound, bound)

    def around(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output y, and the residual of its input x."""
        return y + lite(x, self.grouped, self.up, self.edit.pool) if self.enabled else y


class TinyTL(Edit):
    """Train biases and lite residuals; the base is frozen."""

    role = "updates"
    kind: Literal["tinytl"] = "tinytl"
    size: int = Field(default=64, ge=1, description="outputs of the grouped layer of a residual")
    groups: int = Field(default=2, ge=1)
    pool: int = Field(default=2, ge=1, description="channels that are averaged into one")
    biases: bool = True
    add: bool = Field(default=True, description="give a bias to the linear layers that have none")

    def apply(self, model: nn.Module) -> None:
        """Put residuals and biases in. FettleError where the sizes do not divide."""
        for block in blocks(model):
            self._check(block)
            module = model.get_submodule(block.name)
            attach(module, Lite(block.width, self, place(module)))
        if self.biases:
            put_biases(model, every_bias(model, self.add), self)

    def _check(self, block: Block) -> None:
        if block.width % (self.pool * self.groups) or self.size % self.groups:
            raise FettleError(
                f"tinytl: the width of {block.name}, {block.width}, must divide by pool x groups ({self.pool} x {self.groups}), "
                f"and size ({self.size}) by groups"
            )

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The residuals' weights and the changes of the biases, by name."""
        return {
            f"{name}.{key}": p.detach()
            for name, module in made_by(model, self, (Lite, Biased))
            for key, p in module.named_parameters(recurse=False)
        }

    def merge(self, model: nn.Module) -> NoReturn:
        """Never exact: FettleError."""
        raise FettleError(
            "tinytl: its residuals are not linear, so they cannot be merged into the model's weights; keep the artifact, "
            "or tune with bitfit or lora where plain weights are needed"
        )
