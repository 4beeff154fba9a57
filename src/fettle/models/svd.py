"""The part of a matrix in its greatest singular values, as two factors."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def principal(weight: Tensor, rank: int, scale: float = 1.0, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """(A [r, K], B [N, r]) with s B A the part of W [N, K] in its `rank` greatest singular values; float32 or wider.

    The roots of the singular values go to each side. `iterations` None is exact; else that many power iterations of a
    randomised SVD (Halko et al. 2009, arXiv 0909.4061), faster by about min(N, K) / rank.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if iterations is None:
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(wide, min(rank + 8, *wide.shape), niter=iterations)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].T
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()
