"""Attention over a forest on a GPU: variable-length flash attention for rows of plain documents, FlexAttention for trees.

Shapes: T tokens, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fettle.core.errors import FettleError
from fettle.models.plan import Plan


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[1, H, T, D] by FlexAttention, compiled on a GPU; on a CPU forward only."""
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise FettleError(
            "model.attention: 'flex' cannot train on a CPU (FlexAttention has no backward pass there); use 'segments'"
        )
    mask = plan.keep(("flex", window, query.device), lambda: block_mask(plan, window, query.device))
    run = _compiled() if query.device.type == "cuda" else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, _cap(softcap), mask, scale, grouped)  # type: ignore[no-any-return, operator]


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[1, H, T, D] by variable-length flash attention; FlexAttention where a batch has parents or sees ahead."""
    if query.device.type != "cuda":
        raise FettleError("model.attention: 'varlen' needs a CUDA GPU; use 'segments' on a CPU")
    plain = plan.is_flat and all(segment.causal for segment in plan.segments)
    if not plain or softcap is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return attend_flex(query, key, value, plan, scale, window, softcap)
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = plan.keep(("varlen", query.device), lambda: _bounds(plan, query.device))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(0, 1)[None]  # type: ignore[union-attr]


def block_mask(plan: Plan, window: int | None, device: torch.device) -> BlockMask:
    """The forest as a FlexAttention block mask.

    Numbering the segments in the order of a walk that goes down first, those below segment s are the numbers
    [enter[s], leave[s]), so that "k is q or above q" is two comparisons.
    """
    segment, causal, enter, leave = (x.to(device) for x in _walk(plan))
    at = plan.positions.to(device)
    reach = plan.length + 1 if window is None else window

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        below = (enter[k] <= enter[q]) & (enter[q] < leave[k])
        order = (segment[q] != segment[k]) | ~causal[q] | (k <= q)
        return below & order & (at[q] - at[k] < reach)

    return create_block_mask(sees, None, None, plan.length, plan.length, device)


def _walk(plan: Plan) -> tuple[Tensor, ...]:
    """By token: its segment, whether that is causal, and the numbers at which a walk enters and leaves it; each [T]."""
    children: dict[int, list[int]] = {}
    for i, segment in enumerate(plan.segments):
        children.setdefault(segment.parent, []).append(i)
    enter, leave = [0] * len(plan.segments), [0] * len(plan.segments)
    clock, stack = 0, [(i, False) for i in reversed(children.get(-1, []))]
    while stack:
        i, done = stack.pop()
        if done:
            leave[i] = clock
            continue
        enter[i], clock = clock, clock + 1
        stack.append((i, True))
        stack += [(c, False) for c in reversed(children.get(i, []))]
    lengths = torch.tensor([s.stop - s.start for s in plan.segments])
    by_segment = (
        torch.arange(len(plan.segments)), torch.tensor([s.causal for s in plan.segments]), torch.tensor(enter), torch.tensor(leave),
    )  # fmt: skip
    return tuple(x.repeat_interleave(lengths) for x in by_segment)


def _bounds(plan: Plan, device: torch.device) -> tuple[Tensor, int]:
    stops = [0] + [segment.stop for segment in plan.segments]
    return torch.tensor(stops, dtype=torch.int32, device=device), max(
        b - a for a, b in zip(stops, stops[1:], strict=False)
    )


@cache
def _cap(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def bend(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return bend


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
