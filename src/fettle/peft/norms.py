"""Norm tuning: only the scales (and biases) of the norms train (Zhao et al. 2023, arXiv 2312.11420, LayerNorm tuning).

    y = n(x) * w + b  ->  n(x) * (w + d_w) + (b + d_b)          n: the norm's own arithmetic; w, b, d_w, d_b [C]

d_w and d_b start at zero, in float32. The norm's own module computes with the changed weights, so every kind of norm
(LayerNorm, RMSNorm, Gemma's 1 + w) is served, and merging stores the same weights back.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.blocks import norms
from fettle.models.select import matches
from fettle.models.surgery import made_by, replace
from fettle.models.weight import innermost, place


class TunedNorm(nn.Module):
    """A norm, and the changes of its weights."""

    def __init__(self, base: nn.Module, edit: Norms) -> None:
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True
        own = dict(innermost(base).named_parameters(recurse=False))
        self.d_weight = nn.Parameter(torch.zeros(own["weight"].shape, **place(base)))
        biased = edit.biases and "bias" in own
        self.d_bias = nn.Parameter(torch.zeros(own["bias"].shape, **place(base))) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., C] -> [.., C]."""
        if not self.enabled:
            return self.base(x)
        inside = "".join("base." for _ in range(_depth(self.base)))
        return functional_call(self.base, {f"{inside}{key}": value for key, value in self.changed().items()}, (x,))

    def changed(self) -> dict[str, Tensor]:
        """The weights to compute with, in the norm's type."""
        norm = innermost(self.base)
        found = {"weight": norm.weight.to(self.d_weight.dtype) + self.d_weight}  # type: ignore[operator]
        if self.d_bias is not None:
            found["bias"] = norm.bias.to(self.d_bias.dtype) + self.d_bias  # type: ignore[operator]
        return {key: value.to(norm.weight.dtype) for key, value in found.items()}  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]


def _depth(module: nn.Module) -> int:
    return 1 + _depth(base) if isinstance(base := getattr(module, "base", None), nn.Module) else 0


class Norms(Edit):
    """Train the norms' weights; the base is frozen."""

    role = "updates"
    kind: Literal["norms"] = "norms"
    biases: bool = True
    targets: str | tuple[str, ...] | None = None

    def apply(self, model: nn.Module) -> None:
        """Wrap the norms. FettleError where there is none, or a target matches none."""
        found = norms(model)
        wanted = [self.targets] if isinstance(self.targets, str) else self.targets
        for pattern in wanted or ():
            if not any(matches(pattern, name) for name in found):
                raise FettleError(
                    f"norms.targets: '{pattern}' matches none of the {len(found)} norms, as {next(iter(found), '')}"
                )
        chosen = {n: m for n, m in found.items() if wanted is None or any(matches(p, n) for p in wanted)}
        if not chosen:
            raise FettleError(f"norms: {type(model).__name__} has no norm with a weight")
        for name, module in chosen.items():
            replace(model, name, TunedNorm(module, self))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The changes, by name."""
        return {f"{n}.{key}": p.detach() for n, m in self._ours(model) for key, p in m.named_parameters(recurse=False)}

    def merge(self, model: nn.Module) -> None:
        """Store the changed weights, rounded once to the norm's type."""
        for name, module in reversed(self._ours(model)):
            for key, value in module.changed().items():
                getattr(innermost(module.base), key).data.copy_(value.detach())
            replace(model, name, module.base)

    def _ours(self, model: nn.Module) -> list[tuple[str, TunedNorm]]:
        return made_by(model, self, TunedNorm)
