"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values in front of the text in every layer.

    attention_l(q, [K_l ; K(x)], [V_l ; V(x)]),    [K_1 V_1 .. K_L V_L](p) = MLP(u_p) = tanh(u_p A' + a) B' + b

u [P, C] and the MLP train, because keys and values trained directly were unstable in the paper; the MLP is dropped when the
prefix is saved. P virtual tokens, C width, M the MLP's hidden width, and for each token L 2 K D numbers: L layers, K key
heads (of grouped queries too), D head size. Without the MLP the method is `p_tuning_v2`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models import prompt
from fettle.models.prompt import linear_start


class PrefixEncoder(nn.Module):
    """u and an MLP of two layers."""

    def __init__(self, edit: PrefixTuning, widths: tuple[int, int], where: dict[str, Any]) -> None:
        super().__init__()
        width, out = widths
        self.inputs = nn.Parameter(torch.randn(edit.tokens, width, dtype=where["dtype"]).to(where["device"]))
        self.up, self.up_shift = linear_start(width, edit.hidden, where)
        self.down, self.down_shift = linear_start(edit.hidden, out, where)

    def forward(self) -> Tensor:
        """[P, L 2 K D]."""
        return F.linear(torch.tanh(F.linear(self.inputs, self.up, self.up_shift)), self.down, self.down_shift)


class PrefixTuning(Edit):
    """A trained prefix of keys and values, computed by an MLP while it is learned; the base is frozen."""

    role = "prompts"
    kind: Literal["prefix_tuning"] = "prefix_tuning"
    tokens: int = Field(default=20, ge=1, description="virtual tokens")
    hidden: int = Field(default=512, ge=1, description="the MLP's hidden width")

    def apply(self, model: nn.Module) -> None:
        """Attach the prefix. FettleError where the model has no cache to put it in, or a soft prompt already."""
        _, layers, _, heads, size = prompt.states_of(model, [0], self.kind).shape
        width = prompt.embeddings_of(model, [0]).shape[1]
        encoder = PrefixEncoder(self, (width, layers * 2 * heads * size), prompt.place(model))
        prompt.attach(model, prompt.SoftPrompt(self, encoder, self.tokens, (layers, heads, size)))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The keys and values [P, L 2 K D] that the MLP computes."""
        return prompt.kept(model, self)

    def settle(self, model: nn.Module) -> None:
        """Replace the MLP by the keys and values it computes."""
        prompt.settle(model, self)

    def merge(self, model: nn.Module) -> None:
        """Always FettleError: a prefix is input."""
        raise prompt.cannot_merge(self)
