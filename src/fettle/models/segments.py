"""Attention over segments as a few batched matrix products: what is fast on a CPU.

Tiles of queries with the keys they see are gathered into buckets of equal padded shape, and each bucket is
softmax(Q K' scale) V in three batched products. One call of the CPU's
flash kernel a segment took 4.0 times the processor time, forward and backward, at the lengths of instruction data (T 2048,
bfloat16, one thread, torch 2.13; median ratio), most of it in the backward pass.

All tensors are tables of heads [T*H, D], token by token, so that one gather brings each bucket what its products need, and one
sum of bags (models/plan.py) brings what they give to where it belongs.

Shapes: T tokens, H query heads, K key heads, G = H / K, D head size; of a bucket: N tiles, L rows, S columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fettle.models.plan import Bucket, Plan, Tiling

KEEP = 512  # columns up to which the weights of a bucket are kept for the backward pass rather than computed again


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[1, H, T, D] from query [1, H, T, D], key and value [1, K, T, D]."""
    heads = query.shape[1], key.shape[1]
    return _Segments.apply(query, key, value, plan.tiling(window, heads, query.dtype, query.device), scale, softcap)  # type: ignore[no-any-return]


class _Segments(torch.autograd.Function):
    """With P = softmax(cap(Q K' scale)) and O = P V, in each tile:

    dV = P' dO, dP = dO V', dS = P * (dP - rowsum(P * dP)), dQ = dS K scale, dK = dS' Q scale.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, scale: float, softcap: float | None
    ) -> Tensor:
        tables = _table(query), _table(key), _table(value)
        kept: list[Tensor] = []
        out, pieces = _blank(tables[2], [len(bucket.queries) for bucket in tiling.buckets])
        for bucket, o in zip(tiling.buckets, pieces, strict=True):
            q, k, v = _gathered(tables, bucket)
            p, _ = _weights(q, k, bucket, scale, softcap)
            torch.bmm(p, v, out=o.view(*p.shape[:2], -1))
            if _keeps(bucket, softcap):
                kept.append(p)
        ctx.tiling, ctx.scale, ctx.softcap, ctx.heads = tiling, scale, softcap, (query.shape[1], key.shape[1])
        ctx.save_for_backward(*tables, *kept)
        return _heads(tiling.of_queries.sum(out), query.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_table, k_table, v_table, *kept = ctx.saved_tensors
        tiling, scale, softcap, heads = ctx.tiling, ctx.scale, ctx.softcap, ctx.heads
        o_table = _table(grads[0])
        d_q, to_q = _blank(q_table, [len(bucket.queries) for bucket in tiling.buckets])
        d_k, to_k = _blank(k_table, [len(bucket.keys) for bucket in tiling.buckets])
        d_v, to_v = _blank(v_table, [len(bucket.keys) for bucket in tiling.buckets])
        for i, bucket in enumerate(tiling.buckets):
            q, k, v = _gathered((q_table, k_table, v_table), bucket)
            d_o = o_table.index_select(0, bucket.queries).index_fill_(0, bucket.spare, 0).view(*q.shape[:2], -1)
            p, bent = (kept.pop(0), None) if _keeps(bucket, softcap) else _weights(q, k, bucket, scale, softcap)
            torch.bmm(p.transpose(1, 2), d_o, out=to_v[i].view(v.shape))
            d_p = torch.bmm(d_o, v.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_s = d_s if bent is None else d_s.mul_(1 - bent.square())
            _product(d_s, k, scale, to_q[i].view(q.shape))
            _product(d_s.transpose(1, 2), q, scale, to_k[i].view(k.shape))
        return (
            _heads(tiling.of_queries.sum(d_q), heads[0]), _heads(tiling.of_keys.sum(d_k), heads[1]),
            _heads(tiling.of_keys.sum(d_v), heads[1]), None, None, None,
        )  # fmt: skip


def _keeps(bucket: Bucket, softcap: float | None) -> bool:
    return bucket.shape[2] <= KEEP and softcap is None


def _weights(q: Tensor, k: Tensor, bucket: Bucket, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """P [N*K, G*L, S], and where scores are capped, the tanh of the cap at each."""
    n, length, width = bucket.shape
    if softcap is None:
        scores, bent = _product(q, k.transpose(1, 2), scale), None
    else:
        bent = _product(q, k.transpose(1, 2), scale / softcap).tanh_()
        scores = bent * softcap
    scores.view(n, -1, length, width)[..., width - bucket.bias.shape[-1] :].add_(bucket.bias)
    return scores.softmax(-1), bent


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """a b scale, for each of a batch."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale, out=out)


def _blank(like: Tensor, lengths: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A table to be filled, as wide as another, and its pieces for each bucket."""
    table = like.new_empty(sum(lengths), like.shape[1])
    return table, table.split(lengths) if lengths else ()


def _gathered(tables: tuple[Tensor, Tensor, Tensor], bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N*K, G*L, D], keys and values [N*K, S, D]: the query heads of one key head stand below each other."""
    query, key, value = tables
    _, _, width = bucket.shape
    k, v = (x.index_select(0, bucket.keys).view(-1, width, x.shape[1]) for x in (key, value))
    return query.index_select(0, bucket.queries).view(len(k), -1, query.shape[1]), k, v


def _table(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T*H, D]; no copy where the heads of a token already lie together, as projections leave them."""
    return x[0].transpose(0, 1).reshape(-1, x.shape[3])


def _heads(table: Tensor, heads: int) -> Tensor:
    """[T*H, D] -> [1, H, T, D], a view."""
    return table.view(-1, heads, table.shape[1]).transpose(0, 1)[None]
