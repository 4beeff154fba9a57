"""Attention over a forest of segments, registered with transformers' attention interface.

While `Forest.hidden` runs, the mask function of transformers returns the batch's `Plan` instead of a mask; it travels
through the layers (and through gradient checkpointing) in the place of the mask and tells the attention function who
sees whom. Generation attends by a `Step`, which keeps keys and values itself (generate/engine.py). Outside of both, the
same names behave as 'sdpa'.

Shapes: T tokens, H query heads, K key heads, D head size. Tensors arrive as [1, H or K, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fettle.core.errors import FettleError
from fettle.models.gpu import attend_flex, attend_varlen
from fettle.models.plan import Plan
from fettle.models.segments import attend

CACHE = "fettle_cache"  # on a layer: a module (key, value) -> (key, value), what its cache would hand back


class Step(Protocol):
    """One pass over tokens whose keys and values somebody keeps: it attends for every layer, by itself."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """[B, T, H, E] from query [B, H, T, D], key [B, K, T, D] and value [B, K, T, E] of one layer."""
        ...


_current: ContextVar[Plan | None] = ContextVar("fettle_plan", default=None)
_step: ContextVar[Step | None] = ContextVar("fettle_step", default=None)
Keeper = Callable[[nn.Module, Tensor, Tensor, int | None], None]
_keeper: ContextVar[Keeper | None] = ContextVar("fettle_keeper", default=None)
Backend = Callable[..., Tensor]
BACKENDS: dict[str, Backend] = {}


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """Within it, `keeper` gets each attention module's keys and values [1, K, T, D] of a forest batch, unrounded, and its window."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Within it, every layer of a model whose attention is one of ours attends by `step`, whatever its mask."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


@contextmanager
def running(plan: Plan) -> Iterator[None]:
    """Within it, models whose attention is one of ours attend by `plan`."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)


def in_forest() -> bool:
    """Whether a forest batch is running."""
    return _current.get() is not None


def _mask(*args: Any, **kwargs: Any) -> Any:
    plan = _current.get()
    return sdpa_mask(*args, **kwargs) if plan is None else plan


def backend(name: str) -> Callable[[Backend], Backend]:
    """Register a function (query, key, value, plan, scale, window, softcap) -> [1, H, T, D] as 'fettle_<name>'."""

    def register(function: Backend) -> Backend:
        def forward(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
            scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **other: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            cache, plan = getattr(module, CACHE, None), attention_mask
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if isinstance(plan, Plan) and plan.states is not None:
                key, value = with_states(module, key, value, plan.states)
            if (step := _step.get()) is not None:  # its own cache rounds what it holds
                refuse_unknown(module, other)
                return step.attend(module, query, key, value, scale, sliding_window, softcap), None
            made = key, value
            if cache is not None:
                key, value = cache(key, value)
            if not isinstance(plan, Plan):
                if softcap is not None:
                    return _capped(query, key, value, plan, scaling, softcap), None
                return sdpa_attention_forward(module, query, key, value, plan, dropout, scaling, **other)
            refuse_unknown(module, other)
            if (keeper := _keeper.get()) is not None:
                keeper(module, *made, sliding_window)
            chosen = BACKENDS["dense"] if dropout else function
            extra = {"dropout": dropout} if dropout else {}
            out = chosen(query, key, value, plan, scale, sliding_window, softcap, **extra)
            return out.transpose(1, 2).contiguous(), None

        BACKENDS[name] = function
        AttentionInterface.register(f"fettle_{name}", forward)
        AttentionMaskInterface.register(f"fettle_{name}", _mask)
        return function

    return register


def refuse_unknown(module: nn.Module, other: dict[str, Any]) -> None:
    """FettleError where a layer asks its attention for something that changes the result and is not built here."""
    for key in ("s_aux", "position_bias", "head_mask", "cache"):
        if other.get(key) is not None:
            raise FettleError(
                f"{type(module).__name__} passes '{key}' to its attention, which a forest batch does not support"
            )


def with_states(module: nn.Module, key: Tensor, value: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, K, T, D] with those of the first P tokens replaced by this layer's `states` [layers, 2, K, P, D]."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise FettleError(
            f"{type(module).__name__} does not know its layer, so a prefix's keys and values cannot be handed to it; "
            "use a prompt_tuning edit, which works on the embeddings, or model.attention: paths"
        )
    own, length = states[layer].to(key.dtype), states.shape[3]
    if own.shape[1::2] != key.shape[1::2] or own.shape[3] != value.shape[3]:
        raise FettleError(
            f"{type(module).__name__} of layer {layer} has {key.shape[1]} key heads of {key.shape[3]}, the prefix "
            f"{own.shape[1]} of {own.shape[3]}; it was made for another model"
        )
    return tuple(torch.cat([new[None], old[:, :, length:]], 2) for new, old in zip(own, (key, value), strict=True))  # type: ignore[return-value]


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    key, value = repeat(key, query.shape[1]), repeat(value, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)).float() * cap
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(
            key.shape[2] - query.shape[2]
        )
    if mask is not None:  # the least number rather than -inf: the rows of left padding see nothing at all
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(query.dtype) @ value).transpose(1, 2).contiguous()


def repeat(x: Tensor, heads: int) -> Tensor:
    """Key heads repeated for each query head of their group: [1, K, T, D] -> [1, H, T, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@backend("dense")
def dense(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The reference: one mask [T, T]."""
    key, value = repeat(key, query.shape[1]), repeat(value, query.shape[1])
    mask = plan.mask(window, query.device)
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    scores = (
        torch.tanh(
            (query @ key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * (scale / softcap)
        )
        * softcap
    )
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


backend("segments")(attend)
backend("flex")(attend_flex)
backend("varlen")(attend_varlen)
