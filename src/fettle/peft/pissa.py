"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024, arXiv 2404.02948); `init: pissa` of a LoRA.

    W = U S V',   A0 = sqrt(S_r / s) V_r',   B0 = U_r sqrt(S_r / s),   so that s B0 A0 is the best rank-r part of W
    y = (W - s B0 A0) x + s B A x = W x + s [B, -B0] [A; A0] x,   A and B start at A0 and B0

The paper subtracts the principal part from the base. Here the base stays as it is and the start is kept beside A and B,
frozen: the same function and the same gradients, but the base loses nothing to rounding, an artifact holds 2 r (N + K)
numbers rather than all of W, and what is merged or exported is the exact update s (B A - B0 A0), a LoRA of rank 2 r.

Shapes: W [N, K], A and A0 [r, K], B and B0 [N, r].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fettle.models.svd import principal as principal  # A0 and B0 of a weight


def without_start(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """([2 r, K], [N, 2 r]): the factors of B A - B0 A0."""
    return torch.cat([a, a0]), torch.cat([b, -b0], 1)
