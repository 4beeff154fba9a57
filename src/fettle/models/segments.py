"""Attention over segments as a few batched matrix products: what is fast on a CPU.

Tiles of queries with the keys they see are gathered into buckets of equal padded shape, and each bucket is
softmax(Q K' scale) V in three batched products. One call of the CPU's
flash kernel a segment took 4.0 times the processor time, forward and backward, at the lengths of instruction data (T 2048,
bfloat16, one thread, torch 2.13; median ratio), most of it in the backward pass.

Shapes: T tokens, H query heads, K key heads, G = H / K, D head size; of a bucket: N tiles, L rows, S columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fettle.models.plan import Bucket, Plan, Tiling

Heads = tuple[int, int]  # K, G
KEEP = 512  # columns up to which the weights of a bucket are kept for the backward pass rather than computed again


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[1, H, T, D] from query [1, H, T, D], key and value [1, K, T, D]."""
    return _Segments.apply(query, key, value, plan.tiling(window, query.dtype, query.device), scale, softcap)  # type: ignore[no-any-return]


class _Segments(torch.autograd.Function):
    """With P = softmax(cap(Q K' scale)) and O = P V, in each tile:

    dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)), dQ = dS K scale, dK = dS' Q scale.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, scale: float, softcap: float | None
    ) -> Tensor:
        heads = key.shape[1], query.shape[1] // key.shape[1]
        q_rows, k_rows, v_rows = _rows(query), _rows(key), _rows(value)
        outs: list[Tensor] = []
        kept: list[Tensor] = []
        for bucket in tiling.buckets:
            q, k, v = _queries(q_rows, bucket, heads), _keys(k_rows, bucket, heads), _keys(v_rows, bucket, heads)
            p, _ = _weights(q, k, bucket, scale, softcap)
            outs.append(_query_rows(torch.bmm(p, v), bucket, heads))
            if _keeps(bucket, softcap):
                kept.append(p)
        ctx.tiling, ctx.scale, ctx.softcap, ctx.heads = tiling, scale, softcap, heads
        ctx.save_for_backward(q_rows, k_rows, v_rows, *kept)
        width = query.shape[1] * value.shape[3]
        return _heads(_placed(outs, tiling.back, v_rows, width), query.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_rows, k_rows, v_rows, *kept = ctx.saved_tensors
        tiling, scale, softcap, heads = ctx.tiling, ctx.scale, ctx.softcap, ctx.heads
        o_rows = _rows(grads[0])
        d_q: list[Tensor] = []
        d_k: list[Tensor] = []
        d_v: list[Tensor] = []
        for bucket in tiling.buckets:
            q, k, v = _queries(q_rows, bucket, heads), _keys(k_rows, bucket, heads), _keys(v_rows, bucket, heads)
            d_o = _queries(o_rows, bucket, heads, blank=True)
            p, bent = (kept.pop(0), None) if _keeps(bucket, softcap) else _weights(q, k, bucket, scale, softcap)
            d_v.append(_key_rows(torch.bmm(p.transpose(1, 2), d_o), bucket))
            d_p = torch.bmm(d_o, v.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_s = d_s if bent is None else d_s.mul_(1 - bent.square())
            d_q.append(_query_rows(torch.bmm(d_s, k).mul_(scale), bucket, heads))
            d_k.append(_key_rows(torch.bmm(d_s.transpose(1, 2), q).mul_(scale), bucket))
        return (
            _heads(_placed(d_q, tiling.back, q_rows, q_rows.shape[1]), grads[0].shape[1]),
            _heads(_summed(d_k, tiling, k_rows), heads[0]),
            _heads(_summed(d_v, tiling, v_rows), heads[0]),
            None, None, None,
        )  # fmt: skip


def _keeps(bucket: Bucket, softcap: float | None) -> bool:
    return bucket.shape[2] <= KEEP and softcap is None


def _weights(q: Tensor, k: Tensor, bucket: Bucket, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """P [N*K, G*L, S], and where scores are capped, the tanh of the cap at each."""
    n, length, width = bucket.shape
    g = q.shape[1] // length
    bias = bucket.bias.expand(n, len(q) // n * g, length, width).reshape(len(q), g * length, width)
    if softcap is None:
        return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1), None
    bent = torch.bmm(q, k.transpose(1, 2)).mul_(scale / softcap).tanh_()
    return (bent * softcap).add_(bias).softmax(-1), bent


def _rows(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T, H*D]; no copy where the heads of a token already lie together, as projections leave them."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[T, H*D] -> [1, H, T, D], a view."""
    return rows.view(len(rows), heads, -1).transpose(0, 1)[None]


def _queries(rows: Tensor, bucket: Bucket, heads: Heads, blank: bool = False) -> Tensor:
    """[T, H*D] -> [N*K, G*L, D]: the query heads of one key head stand below each other. `blank`: zeros in spare rows."""
    n, length, _ = bucket.shape
    taken = rows.index_select(0, bucket.queries)
    if blank:
        taken.index_fill_(0, bucket.spare, 0)
    return taken.view(n, length, *heads, -1).permute(0, 2, 3, 1, 4).reshape(n * heads[0], heads[1] * length, -1)


def _query_rows(x: Tensor, bucket: Bucket, heads: Heads) -> Tensor:
    """[N*K, G*L, D] -> [N*L, H*D]."""
    n, length, _ = bucket.shape
    return x.view(n, *heads, length, -1).permute(0, 3, 1, 2, 4).reshape(n * length, -1)


def _keys(rows: Tensor, bucket: Bucket, heads: Heads) -> Tensor:
    """[T, K*D] -> [N*K, S, D]."""
    n, _, width = bucket.shape
    taken = rows.index_select(0, bucket.keys)
    return taken.view(n, width, heads[0], -1).transpose(1, 2).reshape(n * heads[0], width, -1)


def _key_rows(x: Tensor, bucket: Bucket) -> Tensor:
    """[N*K, S, D] -> [N*S, K*D]."""
    n, _, width = bucket.shape
    return x.view(n, -1, width, x.shape[-1]).transpose(1, 2).reshape(n * width, -1)


def _placed(pieces: list[Tensor], back: Tensor, like: Tensor, width: int) -> Tensor:
    """Rows of all buckets -> [T, width], zeros where a token is in none."""
    return torch.cat([*pieces, like.new_zeros(1, width)]).index_select(0, back)


def _summed(pieces: list[Tensor], tiling: Tiling, like: Tensor) -> Tensor:
    """Rows of the keys of all buckets -> [T, K*D], summed in float32 where a token is a key of several tiles."""
    if tiling.key_back is not None:
        return _placed(pieces, tiling.key_back, like, like.shape[1])
    total = like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
    for piece, bucket in zip(pieces, tiling.buckets, strict=True):
        total.index_add_(0, bucket.keys, piece.to(total.dtype))
    return total.to(like.dtype)
