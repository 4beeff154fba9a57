"""LoftQ: quantize beside a low-rank update that makes up for the rounding (Li et al. 2023, arXiv 2310.08659).

    B_0 A_0 = 0;   Q_t = quant(W - B_(t-1) A_(t-1)),   B_t A_t = the best rank-r part of W - Q_t,   t = 1..T

The model starts at Q_t + B_t A_t, nearer to W than quant(W) alone, and a LoRA that starts at B_t and A_t trains from there:

    edits: [{kind: nf4, loftq: {rank: 16}}, {kind: lora, rank: 16, init: loftq}]

The quantizer does this, because it is the one that sees W: each layer is quantized and let go of before the next is read,
and only B and A stay beside it until the LoRA takes them. Works over every grid; the fewer the bits, the more it gives.

Q depends on a singular value decomposition, whose last bits differ from machine to machine, so an artifact keeps the
packed weights: they are the base that its LoRA belongs to. The paper takes t = T; rounding by the range of a group is no
projection, so that the error may rise again, and here the t of the least |W - Q_t - B_t A_t| is taken.

Shapes: W [N, K], A [r, K], B [N, r].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.core.spec import Spec
from fettle.models.svd import principal
from fettle.quantize.packed import Quantized

Quantizer = Callable[[Tensor], Quantized]
POWERS = 16  # power iterations of the randomised SVD, where that is asked for


class LoftQ(Spec):
    """A field of a quantizer: leave a low-rank residual to a LoRA of the same rank."""

    rank: int = Field(default=16, ge=1)
    iterations: int = Field(default=5, ge=1, description="T")
    fast: bool = Field(default=True, description="singular values by a randomised method; exact where false")

    def start(self, weight: Tensor, quantize: Quantizer) -> tuple[Quantized, tuple[Tensor, Tensor]]:
        """One weight packed, and its residual (B, A). FettleError where the rank is over its size."""
        if self.rank > min(weight.shape):
            raise FettleError(
                f"loftq: rank {self.rank} is over the size of the weight {tuple(weight.shape)}; choose a smaller rank"
            )
        packed, b, a = loftq(weight, quantize, self.rank, self.iterations, POWERS if self.fast else None)
        return packed, (b, a)


@torch.no_grad()
def loftq(
    weight: Tensor, quantize: Quantizer, rank: int, iterations: int = 5, powers: int | None = None
) -> tuple[Quantized, Tensor, Tensor]:
    """(Q_t, B_t, A_t) of a weight; B and A in float32 or wider. `powers` as in `principal`."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    update, least = torch.zeros_like(wide), torch.inf
    for _ in range(iterations):
        packed = quantize(wide - update)
        left = wide - packed.values(wide.dtype)
        a, b = principal(left, rank, iterations=powers)
        update = b @ a
        if (error := float((left - update).norm())) < least:
            least, best = error, (packed, b, a)
    return best
