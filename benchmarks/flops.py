"""Model FLOPs of a training step: what the mathematics asks for, whatever an implementation does.

A weight W of a linear layer costs 2 FLOPs a token forward, 2 for the gradient of its input, 2 for its own if it trains:

    full    6 N_body T + 6 N_head L + A            N_body weights of the layers' linear maps, N_head of the output head,
    LoRA    4 N_body T + 4 N_head L + 6 N_ab T + A     N_ab of the adapters; embeddings cost none
    A     = 12 C_attn layers  sum_s n_s (n_s + 1) / 2     T useful tokens, L of them learned (the head's loss reads no other),
                                                          n_s tokens of segment s, C_attn heads times head size

A counts the two products of attention, forward (2 x 2 FLOPs a pair of positions and channel) and backward (twice that),
over the pairs that causal attention sees. Padding, recomputation, norms and activations count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Weights of a model by what they cost."""

    body: int  # of the linear layers below the head
    head: int
    layers: int
    attention: int  # heads times head size
    adapter: int = 0

    @classmethod
    def of(cls, model: Any, adapter: int = 0) -> Shape:
        """Of a transformers model."""
        from torch import nn

        head = model.get_output_embeddings()
        body = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * size
        return cls(body, head.weight.numel(), config.num_hidden_layers, width, adapter)

    def plain(self) -> dict[str, int]:
        """As JSON writes it."""
        return asdict(self)


def step_flops(shape: Shape, full: bool, lengths: Sequence[int], learned: int) -> int:
    """Of one optimizer step over segments of these lengths, `learned` of whose tokens are targets."""
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    each = 6 if full else 4
    linear = each * (shape.body * tokens + shape.head * learned) + 6 * shape.adapter * tokens
    return linear + 12 * shape.attention * shape.layers * pairs
