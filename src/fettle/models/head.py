"""Log-probabilities of targets without the logits of everything.

Shapes: N targets, C width, V vocabulary, n rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20  # of float32 logits alive at once
ROUND = 64  # rows are made up to a multiple of it: the matrix library keeps memory for every number that it meets
KEEP_BYTES = 64 << 20  # of slopes [N, V] kept for the backward pass of a head that trains; more are computed again


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden state into logits: softcap(module(x) * scale + bias)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    # [1, V], or [1, 1] of 0 where the module adds it itself; never trained: what BART and its kin add
    bias: Tensor | None = None

    def finish(self, logits: Tensor) -> Tensor:
        """Scale, bias and soft cap of raw logits, in their own dtype."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, V]."""
        return self.finish(self.module(hidden))

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities float32 [N] of targets int64 [N] after hidden [N, C], a chunk of rows at a time."""
        count, up = len(hidden), -len(hidden) % ROUND
        if up:
            hidden, targets = nn.functional.pad(hidden, (0, 0, 0, up)), nn.functional.pad(targets, (0, up))
        return self._logps(hidden, targets)[:count]

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if _is_plain(self.module):
            weight, bias = self.module.weight, self.module.bias
            trains = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (weight, bias))
            function = _TrainedHead if trains else _FrozenHead
            return function.apply(hidden, weight, bias, targets, self)  # type: ignore[no-any-return]
        pieces = [
            checkpoint(self._piece, hidden[at], targets[at], use_reentrant=False)
            for at in chunks(len(hidden), self.vocabulary(hidden), hidden.device)
        ]
        return torch.cat(pieces) if pieces else hidden.sum(1).to(_wide(hidden.dtype))  # empty, and still in the graph

    def _piece(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _picked(self.logits(hidden), targets)

    def vocabulary(self, hidden: Tensor) -> int:
        """V, asked of a module that is not a plain linear layer."""
        with torch.no_grad():
            return int(self.module(hidden[:1]).shape[-1])


def chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Rows cut so that a chunk's float32 logits stay near CHUNK_BYTES, with enough rows that its products are worth it."""
    least = 256 if device.type == "cpu" else 1024
    size = max(least, CHUNK_BYTES // (4 * vocabulary) // 64 * 64)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [n] of targets, computed in float32 or wider."""
    return logits.log_softmax(-1, dtype=_wide(logits.dtype)).gather(1, targets[:, None])[:, 0]


def _slope(logits: Tensor, logps: Tensor, targets: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """[n, V]: the gradient of each row's log-probability by the raw logits, but for `scale`: onehot - softmax.

    At the target it is 1 - p, taken from the exact log-probability: p itself may round to 1.
    """
    d = torch.softmax(logits, -1, out=out).neg_()
    d[torch.arange(len(d), device=d.device), targets] = torch.expm1(logps).neg_().to(d.dtype)  # scatter_ copies d
    return d if head.softcap is None else d.mul_(1 - (logits / head.softcap).square_())


class _FrozenHead(torch.autograd.Function):
    """log softmax(cap(x W' + b))[target], where only x has a gradient.

    A row's gradient is its cotangent times one direction, (onehot - p) W, which the forward pass can compute while the
    logits are there: the backward pass is a multiplication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        logps = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in chunks(len(hidden), len(weight), hidden.device):
            logits = head.finish(nn.functional.linear(hidden[at], weight, bias))
            logps[at] = _picked(logits, targets[at])
            if direction is not None:
                torch.mm(_slope(logits, logps[at], targets[at], head), weight, out=direction[at])
        ctx.scale = head.scale
        ctx.save_for_backward(direction)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grad[:, None] * (direction * ctx.scale)).to(direction.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """The same where the head itself has a gradient: with slopes d [N, V] and a row's cotangent g,

    dx = g (d W), dW = d' (g x), db = d' g. Slopes are kept where they are few; else each chunk's are computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        logps = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        keeps = len(hidden) * len(weight) * hidden.element_size() <= KEEP_BYTES
        slopes = hidden.new_empty(len(hidden), len(weight)) if keeps else None
        for at in chunks(len(hidden), len(weight), hidden.device):
            logits = head.finish(nn.functional.linear(hidden[at], weight, bias))
            logps[at] = _picked(logits, targets[at])
            if slopes is not None:
                _slope(logits, logps[at], targets[at], head, slopes[at])
        ctx.save_for_backward(hidden, weight, bias, targets, logps, slopes)
        ctx.head = head
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logps, slopes = ctx.saved_tensors
        head: Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = d_bias = None
        g = (grad * head.scale)[:, None]
        scaled = (g * hidden).to(hidden.dtype)
        whole = [slice(0, len(hidden))]
        for at in chunks(len(hidden), len(weight), hidden.device) if slopes is None else whole:
            d = slopes
            if d is None:
                logits = head.finish(nn.functional.linear(hidden[at], weight, bias))
                d = _slope(logits, logps[at], targets[at], head)
            if d_hidden is not None:
                torch.mm(d, weight, out=d_hidden[at])
            if wants_weight:
                d_weight = _plus(d_weight, d.t() @ scaled[at])
            if wants_bias:
                d_bias = _plus(d_bias, (d.t() @ g[at].to(d.dtype))[:, 0])
        d_hidden = None if d_hidden is None else (g * d_hidden).to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum of several parts is float32 or wider."""
    return part if total is None else total.to(_wide(part.dtype)).add_(part)
