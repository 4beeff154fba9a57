"""LLM.int8: 8 bits for weights and activations, but for the activations that stick out (arXiv 2208.07339).

    y = s_x s_W (Q(x - o) Q(W)') + o W^',     o = x where |x| >= 6, else 0

A row of x and a row of W share a scale, the greatest size over 127; of x that is found without its outliers. Those are
few, and lie in few columns: they are multiplied in the layer's own type with the columns of W^ = s_W Q(W), so that they
neither lose bits nor take them from the rest. Nothing is looked at beforehand.

The paper takes a whole column of x where any token has an outlier in it; then an answer depends on what else is in the
batch. Here each token has its own outliers. The two differ by the rounding of the small values in outlying columns, and
not at all for one token alone.

Shapes: x [.., K], W [N, K].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.quantize.activations import Activations
from fettle.quantize.calibrate import round_blocks
from fettle.quantize.grid import Grid
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.packed import Quantized, blank, quantize

WEIGHTS = Grid(bits=8, narrow=True)  # +-127, a row


class LLMInt8(Edit):
    """Compute linear layers in 8 bits and outlying activations in full precision; nothing trains."""

    role = "quantizes"
    loftq: ClassVar[None] = None
    kind: Literal["llm_int8"] = "llm_int8"
    targets: str | tuple[str, ...] = "all-linear"
    threshold: float = Field(default=6.0, gt=0, description="from which size on an activation is an outlier")

    @property
    def activations(self) -> Activations:
        """The grid of a layer's input."""
        return Activations(bits=8, narrow=True, outliers=self.threshold)

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K]."""
        return quantize(weight, WEIGHTS)

    def apply(self, model: nn.Module) -> None:
        """Replace the targets, layer by layer."""
        quantize_linears(model, self)

    def calibrate(self, model: nn.Module, calibration: Any) -> None:
        """The same in a walk over text: what rounding does to every layer's output."""
        round_blocks(model, self, calibration)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Quantize again what an artifact keeps no codes of."""
        outline_linears(model, self, names or (), lambda w: blank(tuple(w.shape), WEIGHTS, device=w.device))
        quantize_linears(model, self, skip=names or ())

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Nothing: it is a function of the base alone, unless an edit before it scaled the weights."""
        return kept(model, self)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return kept(model, self)

    def merge(self, model: nn.Module) -> None:
        """Put dense weights back, in the model's type, so that later edits of the list can be folded into them."""
        dequantize_linears(model, self)


@torch.no_grad()
def llm_int8(x: Tensor, weight: Tensor, threshold: float = 6.0) -> Tensor:
    """The paper's product of x [.., K] and a plain weight [N, K], written out: [.., N] in float32. What the layer computes."""
    outliers = torch.where(x.abs() >= threshold, x, torch.zeros_like(x)).float()
    rest = x.float() - outliers
    s_x = (rest.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-38)
    s_w = (weight.float().abs().amax(1) / 127).clamp_min(1e-38)
    q_x, q_w = (rest / s_x).round(), (weight.float() / s_w[:, None]).round()
    columns = outliers.reshape(-1, x.shape[-1]).any(0).nonzero()[:, 0]
    small = (q_x.double() @ q_w.double().T).float() * s_x * s_w  # exact, as integers are
    return small + outliers[..., columns] @ (q_w * s_w[:, None])[:, columns].T
