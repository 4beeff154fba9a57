"""Several LoRAs made into one: sums, TIES (Yadav et al. 2023, arXiv 2306.01708), DARE (Yu et al. 2023, arXiv 2311.03099).

    sum   D = sum_i w_i D_i, which is the LoRA [w_1 B_1, w_2 B_2, ..] [A_1; A_2; ..], exact, of rank sum_i r_i
    TIES  keep the share `density` of each D_i that is greatest in size; elect for each entry the sign of their sum;
          D = mean over those i whose entry has that sign of w_i D_i
    DARE  keep a random share `density` of each D_i, divided by it; D = sum_i w_i D_i, or TIES's election

D_i = B_i A_i [N, K], the scale in B. TIES and DARE are of full rank, so their result is cut to the best of a given rank, as a
sum may be. The mean of the A's times the mean of the B's, which is often called a weighted sum, is none of these.

Shapes: of one weight W [N, K]: A [r, K], B [N, r].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.surgery import replace
from fettle.models.svd import principal
from fettle.peft.adalora import AdaLoRALinear
from fettle.peft.lora import LoRA, LoRALinear


class Update(NamedTuple):
    """B A [N, K], to be added to one weight."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]

    @property
    def rank(self) -> int:
        """r."""
        return len(self.a)

    def dense(self) -> Tensor:
        """B A."""
        return self.b @ self.a


Updates = dict[str, Update]  # of a model, by the name of the layer


def summed(adapters: Sequence[Updates], weights: Sequence[float], rank: int | None = None) -> Updates:
    """The weighted sum, exact; or its best approximation of `rank`."""
    exact = _by_layer(adapters, weights, lambda _, found, w: concatenated(found, w))
    return exact if rank is None else {name: compressed(update, rank) for name, update in exact.items()}


def ties(adapters: Sequence[Updates], weights: Sequence[float], rank: int, density: float = 0.2) -> Updates:
    """Trim, elect signs, take the mean of those that agree."""

    def merge(_: str, found: list[Update], w: list[float]) -> Update:
        return Update(*principal(elected([trimmed(u.dense(), density) for u in found], w), _fit(found, rank)))

    return _by_layer(adapters, weights, merge)


def dare(
    adapters: Sequence[Updates], weights: Sequence[float], rank: int, density: float = 0.5, seed: int = 0
) -> Updates:
    """Drop at random and rescale, then sum."""
    return _dare(adapters, weights, rank, density, seed, blended)


def dare_ties(
    adapters: Sequence[Updates], weights: Sequence[float], rank: int, density: float = 0.5, seed: int = 0
) -> Updates:
    """Drop at random and rescale, then elect signs and take the mean of those that agree."""
    return _dare(adapters, weights, rank, density, seed, elected)


def _dare(
    adapters: Sequence[Updates], weights: Sequence[float], rank: int, density: float, seed: int,
    join: Callable[[Sequence[Tensor], Sequence[float]], Tensor],
) -> Updates:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def merge(_: str, found: list[Update], w: list[float]) -> Update:
        return Update(*principal(join([thinned(u.dense(), density, generator) for u in found], w), _fit(found, rank)))

    return _by_layer(adapters, weights, merge)


def concatenated(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """sum_i w_i B_i A_i as one update of rank sum_i r_i."""
    scaled = [w * u.b for u, w in zip(updates, weights, strict=True)]
    return Update(torch.cat([u.a for u in updates]), torch.cat(scaled, 1))


def compressed(update: Update, rank: int) -> Update:
    """The best update of at most `rank` (Eckart and Young 1936), without forming B A."""
    if rank >= update.rank:
        return update
    q_b, r_b = torch.linalg.qr(update.b)
    q_a, r_a = torch.linalg.qr(update.a.T)
    a, b = principal(r_b @ r_a.T, rank)
    return Update(a @ q_a.T, q_b @ b)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The share `density` of the entries that is greatest in size; zeros for the rest."""
    flat = delta.flatten()
    top = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, top, flat[top]).view_as(delta)


def thinned(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A random share `density` of the entries, divided by it; zeros for the rest. Drawn on the CPU, the same everywhere."""
    keep = torch.bernoulli(torch.full(delta.shape, density, dtype=delta.dtype), generator=generator)
    return delta * keep.to(delta.device) / density


def blended(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i D_i."""
    return torch.stack([w * d for d, w in zip(deltas, weights, strict=True)]).sum(0)


def elected(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """At each entry, the mean of w_i D_i over those D_i whose sign is that of sum_i D_i."""
    stack = torch.stack(list(deltas))
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    return blended(list(stack * agree), weights) / agree.sum(0).clamp_min(1)


def _fit(updates: Sequence[Update], rank: int) -> int:
    return min(rank, len(updates[0].b), updates[0].a.shape[1])


def _by_layer(
    adapters: Sequence[Updates], weights: Sequence[float], merge: Callable[[str, list[Update], list[float]], Update]
) -> Updates:
    """`merge` for each layer over the adapters that have it; the others add nothing there."""
    if not adapters or len(adapters) != len(weights):
        raise FettleError(f"adapters: {len(adapters)} to combine with {len(weights)} weights; give one weight for each")
    made: Updates = {}
    for name in dict.fromkeys(name for updates in adapters for name in updates):
        there = [(updates[name], w) for updates, w in zip(adapters, weights, strict=True) if name in updates]
        if len({(len(u.b), u.a.shape[1]) for u, _ in there}) > 1:
            raise FettleError(f"adapters: {name} has another size in each; they belong to different bases")
        made[name] = merge(name, [u for u, _ in there], [w for _, w in there])
    return made


@torch.no_grad()
def updates_of(model: nn.Module) -> Updates:
    """What the LoRAs (and AdaLoRAs) of a model add to its weights, as copies; those around one layer make one update.

    FettleError for DoRA, which does not add but rescales.
    """
    found: Updates = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoRALinear | AdaLoRALinear):
            continue
        if isinstance(module, LoRALinear) and module.magnitude is not None:
            raise FettleError(
                f"adapters: {name} is a DoRA, which rescales the weight rather than adding to it; merge it"
            )
        a, b = module.factors()
        used = a.abs().amax(1) > 0  # triplets that AdaLoRA gave up take no rank
        update = Update(a[used].detach().clone(), (b[:, used] * module.scale).detach())
        layer = re.sub(r"(\.base)+$", "", name)
        found[layer] = concatenated([found[layer], update], [1.0, 1.0]) if layer in found else update
    return found


def unwrap(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Take the LoRAs of some edits off a model; the base is as it was before them."""
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, LoRALinear | AdaLoRALinear) and any(module.edit is edit for edit in edits):
            replace(model, name, module.base)


@torch.no_grad()
def install(model: nn.Module, updates: Mapping[str, Update]) -> LoRA:
    """Put updates on a model as one LoRA, and return the edit, so that an artifact or an export can hold them."""
    some = {name: u for name, u in updates.items() if u.rank}
    if not some:
        raise FettleError("adapters: the updates are empty; there is nothing to install")
    ranks = {name: u.rank for name, u in some.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    edit = LoRA(
        rank=usual, alpha=float(usual), targets=tuple(some), ranks=other, alphas={n: float(r) for n, r in other.items()}
    )
    edit.apply(model)
    for name, update in some.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear) and math.isclose(layer.scale, 1.0)
        layer.a.copy_(update.a)
        layer.b.copy_(update.b)
    return edit
