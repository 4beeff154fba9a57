"""Experts as linear layers: what transformers holds as two stacks becomes three layers an expert, which every edit understands.

    gate_up [E, 2 I, C], down [E, C, I]    ->    experts.e.gate_proj, experts.e.up_proj, experts.e.down_proj
    y_t = sum_{e in top k of t} p_te W_down,e (act(W_gate,e x_t) * W_up,e x_t)

A stack is no linear layer, so quantizers and adapters pass it by; with `model: {experts: linear}` there are none. Merged exports
are stacked again. Each expert multiplies the tokens that came to it; while gradients are kept one that got none does too, so that
which weights have a gradient does not hang on the batch.

Shapes: T tokens, C width, I inner width, E experts, k of them a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fettle.core.errors import FettleError
from fettle.models.surgery import replace

_everywhere: ContextVar[bool] = ContextVar("fettle_experts_everywhere", default=False)
STACKS = {"gate_up_proj", "down_proj"}


class Expert(nn.Module):
    """One gated feed-forward part."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(w) for w in (gate, up, down))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """The experts of a block, in the place of their stacks."""

    def __init__(self, stacks: Any) -> None:
        gate, up = stacks.gate_up_proj.chunk(2, dim=1)
        super().__init__(Expert(*weights, stacks.act_fn) for weights in zip(gate, up, stacks.down_proj, strict=True))
        del stacks.gate_up_proj, stacks.down_proj
        object.__setattr__(self, "shell", stacks)  # to be filled again; not a part of this module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [T, C], the experts of each token [T, k] and their weights [T, k] -> [T, C]."""
        if _everywhere.get():
            top_k_index = torch.arange(len(self), device=top_k_index.device).expand(len(hidden_states), -1)
            top_k_weights = torch.full_like(top_k_index, 1 / len(self), dtype=top_k_weights.dtype)
        k = top_k_index.shape[1]
        place = top_k_index.flatten().argsort(stable=True)  # of the T k choices, expert by expert
        out = torch.zeros_like(hidden_states)
        for expert, chosen in zip(self, place.split(_loads(top_k_index, len(self))), strict=True):
            if len(chosen) or torch.is_grad_enabled():
                y = expert(hidden_states[chosen // k]) * top_k_weights.flatten()[chosen, None]
                out.index_add_(0, chosen // k, y.to(out.dtype))
        return out

    def stacked(self) -> nn.Module:
        """The module that stood here, with its stacks made again. FettleError where a layer is not plain."""
        for name, module in self.named_modules():
            if name.rpartition(".")[2].endswith("_proj") and type(module) is not nn.Linear:
                raise FettleError(f"experts: {name} is a {type(module).__name__}, which no stack can hold")
        shell: Any = self.shell
        experts: list[Any] = list(self)
        gate_up = [torch.cat([e.gate_proj.weight.data, e.up_proj.weight.data]) for e in experts]
        shell.gate_up_proj = nn.Parameter(torch.stack(gate_up), experts[0].up_proj.weight.requires_grad)
        shell.down_proj = nn.Parameter(
            torch.stack([e.down_proj.weight.data for e in experts]), experts[0].down_proj.weight.requires_grad
        )
        return shell  # type: ignore[no-any-return]


def expert_ends(model: nn.Module, name: str) -> list[str]:
    """The layers that end the experts inside of a module; none where they are stacked, or there are none."""
    inside = model.get_submodule(name).named_modules(prefix=name)
    return [f"{n}.{e}.down_proj" for n, module in inside if isinstance(module, Experts) for e in range(len(module))]


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it every token goes to every expert: for looking at layers, none of which a few tokens may then pass by."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


def unstack(model: nn.Module) -> None:
    """Put linear layers in the places of stacks. FettleError where there are none, or they are laid out otherwise."""
    found = [(name, m) for name, m in model.named_modules() if is_stacked(m)]
    if not found:
        raise FettleError(f"model.experts: {type(model).__name__} has no stacked experts; leave experts: linear out")
    for name, module in found:
        if not _understood(module):
            raise FettleError(
                f"model.experts: {name} ({type(module).__name__}) is laid out in a way that is not understood; leave experts: "
                "linear out, and its experts stay as they are"
            )
        replace(model, name, Experts(module))


def restack(model: nn.Module) -> None:
    """Put the stacks back that `unstack` took apart."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Experts)]:
        replace(model, name, module.stacked())


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds experts as stacks."""
    return "expert" in type(module).__name__.lower() and any(p.ndim == 3 for p in module.parameters(recurse=False))


def _understood(module: Any) -> bool:
    """Whether these are stacks [E, out, in] of gates before ups, without biases, gated as usual."""
    from transformers.integrations.moe import _default_apply_gate

    plain = not any(
        getattr(module, flag, False) for flag in ("has_bias", "is_transposed", "has_post_expert_norm")
    )  # fmt: skip
    usual = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    return (
        plain
        and usual
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and set(dict(module.named_parameters())) == STACKS
        and {name for name, _ in module.named_children()} == {"act_fn"}
    )


def _loads(index: Tensor, count: int) -> list[int]:
    """How many choices fell on each expert; in a rehearsal, where nobody can know, the same for all."""
    if isinstance(index, FakeTensor):
        return [index.numel() * (e + 1) // count - index.numel() * e // count for e in range(count)]
    return torch.bincount(index.flatten(), minlength=count).tolist()  # type: ignore[no-any-return]


def _linear(weight: Tensor) -> nn.Linear:
    """A layer with a copy of the weight [N, K], so that its stack can go."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return layer
