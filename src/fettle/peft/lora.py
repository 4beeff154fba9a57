"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and rsLoRA's scale (Kalajdzievski 2023, arXiv 2312.03732).

    y = W x + s B (A dropout(x)),    s = alpha / r   (rsLoRA: alpha / sqrt(r))

            x [.., K] ──┬── W [N, K], frozen ───────────────┬── y [.., N]
                        └── A [r, K] ── B [N, r] ── * s ────┘

K in, N out, r rank. A starts uniform as `nn.Linear` does, B at zero, so the model is unchanged at start.
A and B are float32 masters whatever the base's type: an update of 1e-5 is lost in bf16's 8 bits.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.select import linears
from fettle.models.surgery import replace
from fettle.models.weight import in_out, read_weight, write_weight


class LowRank(torch.autograd.Function):
    """s B A x for one linear; keeps x (which the base's caller keeps anyway) and the small A x, nothing of width N."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """x [M, K]; a [r, K] and b [N, r], float32; returns [M, N] in x's type."""
        h = x @ a.to(x.dtype).T
        ctx.save_for_backward(x, h, a, b)
        ctx.scale = scale
        return h @ (b.to(x.dtype).T * scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of x in its type, of a and b in float32."""
        x, h, a, b = ctx.saved_tensors
        down = grad @ (b.to(grad.dtype) * ctx.scale)
        grad_x = down @ a.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_a = (down.T @ x).to(a.dtype) if ctx.needs_input_grad[1] else None
        grad_b = (grad.T @ h).to(b.dtype) * ctx.scale if ctx.needs_input_grad[2] else None
        return grad_x, grad_a, grad_b, None


class LoRALinear(nn.Module):
    """Any linear layer plus a low-rank update that trains."""

    def __init__(self, base: nn.Module, edit: LoRA) -> None:
        super().__init__()
        inputs, outputs = in_out(base)
        device = next(base.parameters()).device
        rank = edit.rank
        self.base, self.edit, self.rank, self.scale, self.dropout = base, edit, rank, edit.scale, edit.dropout
        self.enabled = True
        self.a = nn.Parameter(torch.empty(rank, inputs, device=device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        if not self.enabled:
            return y
        flat = F.dropout(x, self.dropout, self.training).reshape(-1, x.shape[-1])
        return y + LowRank.apply(flat, self.a, self.b, self.scale).view_as(y)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]

    def delta(self) -> Tensor:
        """s B A, float32 [N, K]."""
        return (self.b @ self.a) * self.scale


class LoRA(Edit):
    """Low-rank updates beside linear layers; the base is frozen."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="numerator of the scale; twice the rank where left out")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of B A."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where one matches nothing or is smaller than the rank."""
        for name, base in linears(model, self.targets).items():
            if self.rank > min(in_out(base)):
                raise FettleError(
                    f"lora: rank {self.rank} is over the size of {name} {in_out(base)}; choose a smaller rank"
                )
            replace(model, name, LoRALinear(base, self))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Every A and B, by name."""
        return {f"{n}.{ab}": getattr(m, ab).detach() for n, m in self._wrapped(model) for ab in ("a", "b")}

    def merge(self, model: nn.Module) -> None:
        """W + s B A, summed in float32, rounded once to the base's type; the wrapper goes."""
        for name, module in reversed(self._wrapped(model)):  # from the inside out
            with torch.no_grad():
                write_weight(module.base, read_weight(module.base).float() + module.delta())
            replace(model, name, module.base)

    def _wrapped(self, model: nn.Module) -> list[tuple[str, LoRALinear]]:
        return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear) and m.edit == self]
