"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

    W' = m / ||V|| * V,    V = W + s B A,    ||V|| the norm of each row    (equation 5)
    y = W' x + bias = bias + c (z - bias),    c = m / ||V||,    z = W x + bias + s B A x

The direction of each output's weights is what LoRA makes of it, its length m trains by itself. The norm counts as a
constant in the backward pass (section 4.3), and as ||W||^2 + 2 s <W A', B> + s^2 <B A A', B> by rows, so V is never formed.

Shapes: W [N, K], A [r, K], B [N, r], m and ||V|| [N], z [.., N]. m starts at ||W||, so the model is unchanged at start.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row, in the type of a and b."""
    own = torch.linalg.vector_norm(weight, dim=1, dtype=a.dtype).square()
    cross = ((weight @ a.T.to(weight.dtype)).to(a.dtype) * b).sum(1)
    low = ((b @ (a @ a.T)) * b).sum(1)
    return (own + 2 * scale * cross + scale**2 * low).clamp_min(torch.finfo(a.dtype).tiny).sqrt()


def rescale(z: Tensor, bias: Tensor | None, magnitude: Tensor, norms: Tensor) -> Tensor:
    """bias + m / ||V|| (z - bias), in the type of z."""
    c = (magnitude / norms).to(z.dtype)
    return c * z if bias is None else torch.lerp(bias.to(z.dtype), z, c)
