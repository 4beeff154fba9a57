"""P-tuning (Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385): vectors in front of the text, made by a small network.

    [e_1 .. e_P] = MLP( BiLSTM( u_1 .. u_P ) ),    MLP(h) = relu(h A' + a) B' + b

u [P, C] and the network's weights train; the LSTM ties the virtual tokens to each other while they are learned. Only the
vectors e [P, C] are kept: an opened artifact has no LSTM. P virtual tokens, C width, M the LSTM's width, so that h is [P, 2M].
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


class PromptEncoder(nn.Module):
    """u, a bidirectional LSTM, and an MLP of two layers."""

    def __init__(self, edit: PTuning, width: int, where: dict[str, Any]) -> None:
        super().__init__()
        hidden = edit.hidden or max(1, width // 2)
        self.inputs = nn.Parameter(torch.randn(edit.tokens, width, dtype=where["dtype"]).to(where["device"]))
        lstm = nn.LSTM(
            width, hidden, edit.layers, dropout=edit.dropout, bidirectional=True, batch_first=True, dtype=where["dtype"]
        )
        self.lstm = lstm.to(where["device"])
        self.up, self.up_shift = linear_start(2 * hidden, 2 * hidden, where)
        self.down, self.down_shift = linear_start(2 * hidden, width, where)

    def forward(self) -> Tensor:
        """[P, C]."""
        h = self.lstm(self.inputs[None])[0][0]
        return F.linear(F.relu(F.linear(h, self.up, self.up_shift)), self.down, self.down_shift)


class PTuning(Edit):
    """Trained vectors in front of every text, computed by an LSTM and an MLP while they are learned; the base is frozen."""

    role = "prompts"
    kind: Literal["p_tuning"] = "p_tuning"
    tokens: int = Field(default=20, ge=1, description="virtual tokens")
    hidden: int | None = Field(default=None, ge=1, description="the LSTM's width; half the model's where left out")
    layers: int = Field(default=2, ge=1, description="layers of the LSTM")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="between the layers of the LSTM")

    def apply(self, model: nn.Module) -> None:
        """Attach the encoder. FettleError where the model has a soft prompt already."""
        width = prompt.embeddings_of(model, [0]).shape[1]
        encoder = PromptEncoder(self, width, prompt.place(model))
        prompt.attach(model, prompt.SoftPrompt(self, encoder, self.tokens))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The vectors [P, C] that the encoder computes."""
        return prompt.kept(model, self)

    def settle(self, model: nn.Module) -> None:
        """Replace the encoder by the vectors it computes."""
        prompt.settle(model, self)

    def merge(self, model: nn.Module) -> None:
        """Always FettleError: a prompt is input."""
        raise prompt.cannot_merge(self)
