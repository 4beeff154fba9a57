"""Log-probabilities of targets without the logits of everything.

Shapes: N targets, C width, V vocabulary, n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20  # of float32 logits alive at once


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden state into logits: softcap(module(x) * scale)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft cap of raw logits, in their own dtype."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, V]."""
        return self.finish(self.module(hidden))

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities float32 [N] of targets int64 [N] after hidden [N, C], a chunk of rows at a time."""
        if _is_plain(self.module):
            weight, bias = self.module.weight, self.module.bias
            return _ChunkedLogps.apply(hidden, weight, bias, targets, self)  # type: ignore[no-any-return]
        rows = chunk_rows(hidden.shape[0], self.module_out(hidden))
        pieces = [
            checkpoint(self._piece, hidden[i : i + rows], targets[i : i + rows], use_reentrant=False)
            for i in range(0, hidden.shape[0], rows)
        ]
        return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)

    def _piece(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(self.logits(hidden))
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    def module_out(self, hidden: Tensor) -> int:
        """V, asked of a module that is not a plain linear layer."""
        with torch.no_grad():
            return int(self.module(hidden[:1]).shape[-1])


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows a chunk: as many as CHUNK_BYTES of float32 logits allow, the same for every chunk but the last."""
    most = max(16, CHUNK_BYTES // (4 * vocabulary))
    return most if rows > most else max(rows, 1)


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is nn.Linear and not hooked


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(cap(x W' + b))[target]; the backward pass computes each chunk's logits again.

    With p = softmax(z), the gradient of the log-probability of t by the logits is onehot(t) - p. The log-sum-exp
    is kept from the forward pass, so the second computation needs no reduction over V.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        n, wide = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        picked, lse = hidden.new_empty(n, dtype=wide), hidden.new_empty(n, dtype=wide)
        rows = chunk_rows(n, weight.shape[0])
        for i in range(0, n, rows):
            at = slice(i, i + rows)
            logits = head.finish(nn.functional.linear(hidden[at], weight, bias)).to(wide)
            lse[at] = logits.logsumexp(1)
            picked[at] = logits.gather(1, targets[at, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.head = head
        return picked - lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        head: Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if wants_bias else None
        rows = chunk_rows(hidden.shape[0], weight.shape[0])
        for i in range(0, hidden.shape[0], rows):
            at = slice(i, i + rows)
            logits = head.finish(nn.functional.linear(hidden[at], weight, bias)).to(lse.dtype)
            slope = 1.0 if head.softcap is None else 1 - (logits / head.softcap).square_()  # of the cap, at each logit
            d = logits.sub_(lse[at, None]).exp_().neg_()
            d.scatter_add_(1, targets[at, None], torch.ones_like(d[:, :1]))
            d.mul_(grad[at, None] * head.scale)
            d = d.mul_(slope) if head.softcap is not None else d
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d, weight, out=d_hidden[at])
            if d_weight is not None:
                d_weight += d.t() @ hidden[at]
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None
