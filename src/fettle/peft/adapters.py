"""Several LoRAs on one base: switched by name, blended, or each row of a batch with its own.

    y = W x + sum_i w_i B_i A_i x                       one choice for the whole batch: `use`
    y_t = W x_t + B_g(t) A_g(t) x_t                     token t has adapter g(t), or none: `route`, `route_rows`

The base runs once over the batch. For the rest, tokens are sorted by adapter and cut into tiles of one adapter each, so that
every layer takes two batched products whatever the number of adapters, and skew among them costs at most a tile each.

Shapes: M tokens, K in, N out, G adapters, r the largest rank (smaller ones have zeros), n tiles of TILE rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from fettle.peft.combine import Updates
from fettle.peft.lora import low_rank

TILE = 64


@dataclass(frozen=True)
class Tiles:
    """Tokens sorted by adapter, in tiles.

    `rows` int64 [n * TILE]: the token of each row, where the last tile of an adapter repeats its first; `owner` int64 [n]:
    the adapter of each tile; `tokens` int64 [m]: those that have an adapter, and `places` [m] their rows.
    """

    rows: Tensor
    owner: Tensor
    tokens: Tensor
    places: Tensor

    @staticmethod
    def of(owners: np.ndarray, device: torch.device) -> Tiles:
        """From the adapter of each token, -1 for none."""
        rows: list[np.ndarray] = []
        owner: list[int] = []
        places = np.empty(len(owners), np.int64)
        for g in sorted(set(owners.tolist()) - {-1}):
            tokens = np.flatnonzero(owners == g)
            places[tokens] = TILE * len(owner) + np.arange(len(tokens))
            spare = -len(tokens) % TILE
            rows.append(np.concatenate([tokens, np.full(spare, tokens[0])]))
            owner += [g] * ((len(tokens) + spare) // TILE)
        chosen = np.flatnonzero(owners >= 0)
        arrays = np.concatenate(rows) if rows else chosen, np.array(owner, np.int64), chosen, places[chosen]
        return Tiles(*(torch.from_numpy(a).to(device) for a in arrays))


def routed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, tiles: Tiles) -> Tensor:
    """y + B_g A_g x of each token: y [M, N], x [M, K]; A [G, r, K], B [G, N, r]."""
    if not len(tiles.owner):
        return y
    cut = x.index_select(0, tiles.rows).view(len(tiles.owner), TILE, -1)
    h = torch.bmm(cut, a.index_select(0, tiles.owner).transpose(1, 2))
    up = torch.bmm(h, b.index_select(0, tiles.owner).transpose(1, 2)).flatten(0, 1)
    return y.index_add(0, tiles.tokens, up.index_select(0, tiles.places))


@dataclass
class Choice:
    """What is on at the moment: one blend for all tokens, or an adapter for each."""

    blend: dict[int, float] = field(default_factory=dict)
    tiles: Route[Tiles] | None = None


class SwitchedLinear(nn.Module):
    """Any linear layer with the low-rank updates of several adapters; which of them act, a shared choice says."""

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, choice: Choice) -> None:
        super().__init__()
        self.base, self.choice, self.enabled = base, choice, True
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        a, b, choice = self.a, self.b, self.choice
        if not self.enabled:
            return y
        if choice.tiles is not None:
            flat = routed(
                y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a.to(x.dtype), b.to(x.dtype),
                choice.tiles(x.shape[:-1], x.device),
            )  # fmt: skip
            return flat.view_as(y)
        if not choice.blend:
            return y
        some = list(choice.blend)
        parts = [b[g] if choice.blend[g] == 1 else b[g] * choice.blend[g] for g in some]
        return low_rank(y, x, a[some].flatten(0, 1), torch.cat(parts, 1), 1.0)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]


class Adapters:
    """Named LoRAs on one model; all are off at first. They do not train: combine them (combine.py) or tune a LoRA."""

    def __init__(self, forest: Forest, adapters: Mapping[str, Updates]) -> None:
        """FettleError where an adapter belongs to another base, or adapts an embedding or the head."""
        self.forest, self.names, self.choice = forest, tuple(adapters), Choice()
        self.routes = Routes(forest, self.names, Tiles.of, "adapters")
        every = linears(forest.model)
        self.layers: tuple[str, ...] = tuple(dict.fromkeys(n for updates in adapters.values() for n in updates))
        for name in self.layers:
            if name not in every:
                raise FettleError(
                    f"adapters: '{name}' is no linear layer of this model (embeddings and the head cannot be switched; "
                    f"merge such an adapter); {nearest(name, every)}"
                )
            found = [(g, updates[name]) for g, updates in enumerate(adapters.values()) if name in updates]
            inputs, outputs = in_out(every[name])
            rank = max(u.rank for _, u in found)
            like = found[0][1].a
            a = like.new_zeros(len(adapters), rank, inputs)
            b = like.new_zeros(len(adapters), outputs, rank)
            for g, update in found:
                if (len(update.b), update.a.shape[1]) != (outputs, inputs):
                    raise FettleError(
                        f"adapters: '{self.names[g]}' has {name} of {len(update.b)} x {update.a.shape[1]}, the model of "
                        f"{outputs} x {inputs}; it belongs to another base"
                    )
                a[g, : update.rank], b[g, :, : update.rank] = update.a, update.b
            replace(forest.model, name, SwitchedLinear(every[name], a, b, self.choice))
            forest.model.get_submodule(name).requires_grad_(False)

    def use(self, names: str | Mapping[str, float] | None) -> None:
        """One adapter for every token, a blend {name: weight}, or none."""
        wanted = {} if names is None else {names: 1.0} if isinstance(names, str) else names
        self.choice.tiles = None
        self.choice.blend = {self.routes.index(name): float(w) for name, w in wanted.items()}

    def route(self, batch: Batch, names: Sequence[str | None]) -> None:
        """An adapter, or none, for each segment of a forest batch, until the next choice.

        A segment's ancestors keep their own: give a whole path one adapter where it should be as if alone.
        """
        self.choice.tiles = self.routes.by_segment(batch, names)

    def route_rows(self, names: Sequence[str | None]) -> None:
        """An adapter, or none, for each row of plain batches [rows, length], as in generation, until the next choice."""
        self.choice.tiles = self.routes.by_row(names)

    def close(self) -> None:
        """Take the adapters off; the model is the base again."""
        for name in self.layers:
            replace(self.forest.model, name, self.forest.model.get_submodule(name).base)  # type: ignore[arg-type]
