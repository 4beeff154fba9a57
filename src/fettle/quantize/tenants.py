"""Many fine-tunes on one base, each as its signs and scales (BitDelta, arXiv 2402.10193, section 3.3).

    y_t = W x_t + s_g(t) S_g(t) x_t                     token t has tenant g(t), or none

The base runs once over the batch, whatever tenants its rows have; each tenant's signs then meet its own tokens only. In memory a
tenant takes a bit a weight: the signs are multiplied as they are packed (signs.py).

Shapes: G tenants, M tokens, W [N, K], signs uint8 [G, N, ceil(K / 8)], scales [G].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.models.forest import Forest
from fettle.models.routing import Route, Routes
from fettle.models.select import linears
from fettle.models.surgery import replace
from fettle.models.weight import in_out
from fettle.quantize.signs import times_signs


class Signed(NamedTuple):
    """s S, of one weight."""

    signs: Tensor  # uint8 [N, ceil(K / 8)]
    scale: Tensor  # scalar


Delta = Mapping[str, Signed]  # of a model, by the name of the layer
Groups = list[tuple[int, Tensor]]  # a tenant, and int64 [m]: its tokens


@dataclass
class Choice:
    """Who has a token at the moment: one tenant has all, or each its own."""

    everywhere: int | None = None
    groups: Route[Groups] | None = None


class TenantLinear(nn.Module):
    """Any linear layer with the signs of several tenants; whose act, a shared choice says."""

    signs: Tensor
    scales: Tensor

    def __init__(self, base: nn.Module, signs: Tensor, scales: Tensor, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice, self.enabled = base, choice, True
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        if not self.enabled or self.choice.everywhere is None and self.choice.groups is None:
            return y  # type: ignore[no-any-return]
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if self.choice.groups is None:
            return (out + self._of(int(self.choice.everywhere or 0), flat)).view_as(y)
        for tenant, tokens in self.choice.groups(x.shape[:-1], x.device):
            out = out.index_add(0, tokens, self._of(tenant, flat.index_select(0, tokens)))
        return out.view_as(y)

    def _of(self, tenant: int, x: Tensor) -> Tensor:
        return times_signs(x, self.signs[tenant]) * self.scales[tenant].to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]


class Tenants:
    """Named deltas on one model; all are off at first. They do not train: an edit of kind bitdelta does."""

    def __init__(self, forest: Forest, deltas: Mapping[str, Delta]) -> None:
        """FettleError where a delta belongs to another base."""
        self.forest, self.names, self.choice = forest, tuple(deltas), Choice()
        self.routes = Routes(forest, self.names, groups_of, "tenants")
        every = linears(forest.model)
        self.layers: tuple[str, ...] = tuple(dict.fromkeys(n for delta in deltas.values() for n in delta))
        for name in self.layers:
            if name not in every:
                raise FettleError(f"tenants: '{name}' is no linear layer of this model; {nearest(name, every)}")
            inputs, outputs = in_out(every[name])
            packed = outputs, -(-inputs // 8)
            device = forest.device
            signs = torch.zeros(len(deltas), *packed, dtype=torch.uint8, device=device)
            scales = torch.zeros(len(deltas), device=device)
            for g, (tenant, delta) in enumerate(deltas.items()):
                if name not in delta:
                    continue
                if tuple(delta[name].signs.shape) != packed:
                    raise FettleError(
                        f"tenants: '{tenant}' has signs of {tuple(delta[name].signs.shape)} for {name}, which needs {packed}; it "
                        "belongs to another base"
                    )
                signs[g], scales[g] = delta[name].signs, delta[name].scale
            replace(forest.model, name, TenantLinear(every[name], signs, scales, self.choice))
            forest.model.get_submodule(name).requires_grad_(False)

    def use(self, name: str | None) -> None:
        """One tenant for every token, or the base alone."""
        self.choice.groups, self.choice.everywhere = None, None if name is None else self.routes.index(name)

    def route(self, batch: Batch, names: Sequence[str | None]) -> None:
        """A tenant, or none, for each segment of a forest batch, until the next choice.

        A segment's ancestors keep their own: give a whole path one tenant where it should be as if alone.
        """
        self.choice.groups = self.routes.by_segment(batch, names)

    def route_rows(self, names: Sequence[str | None]) -> None:
        """A tenant, or none, for each row of plain batches [rows, length], as in generation, until the next choice."""
        self.choice.groups = self.routes.by_row(names)

    def bytes_of(self, name: str) -> int:
        """What a tenant takes in memory."""
        self.routes.index(name)
        layers = (self.forest.model.get_submodule(layer) for layer in self.layers)
        return sum(m.signs[0].numel() + m.scales.element_size() for m in layers)  # type: ignore[union-attr, operator, index]

    def close(self) -> None:
        """Take them off; the model is the base again."""
        for name in self.layers:
            replace(self.forest.model, name, self.forest.model.get_submodule(name).base)  # type: ignore[arg-type]


def groups_of(owners: np.ndarray, device: torch.device) -> Groups:
    """The tokens of each owner, from the owner of each token, -1 for none."""
    return [(int(g), torch.from_numpy(np.flatnonzero(owners == g)).to(device)) for g in np.unique(owners[owners >= 0])]
