"""P-tuning v2 (Liu et al. 2022, arXiv 2110.07602): deep prompts, trained keys and values in every layer, without a network.

    attention_l(q, [K_l ; K(x)], [V_l ; V(x)])       K_l, V_l [K, P, D] of each layer train, and nothing else

P virtual tokens, L layers, K key heads (of grouped queries too), D head size; kept as one table [P, L 2 K D]. The table begins
as the keys and values that the model itself computes for frequent words (`vocabulary`) or for a text (`text`, repeated or cut
to P), so that the tuned model starts out as the base with these words before every text; or normal (`random`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models import prompt
from fettle.models.words import first_tokens
from fettle.peft.prompt_tuning import Start, check_text


class PTuningV2(Edit):
    """A trained prefix of keys and values; the base is frozen."""

    role = "prompts"
    kind: Literal["p_tuning_v2"] = "p_tuning_v2"
    tokens: int = Field(default=20, ge=1, description="virtual tokens")
    init: Start = Field(default="vocabulary", description="what the table begins as: frequent words, a text, or noise")
    text: str | None = Field(default=None, description="where init is text: words that say the task")

    @model_validator(mode="after")
    def _text_where_asked(self) -> PTuningV2:
        check_text(self.init, self.text)
        return self

    def apply(self, model: nn.Module) -> None:
        """Attach the table. FettleError where the model has no cache to put it in, or a soft prompt already."""
        random = self.init == "random"
        ids = [0] if random else first_tokens(model, self.text, self.tokens, f"{self.kind}.text")
        states = prompt.states_of(model, ids, self.kind)
        _, layers, _, heads, size = states.shape
        table = states.flatten(1)
        if random:
            table = torch.randn(self.tokens, table.shape[1], dtype=table.dtype).to(table.device)
        prompt.attach(model, prompt.SoftPrompt(self, table, self.tokens, (layers, heads, size)))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The table [P, L 2 K D]."""
        return prompt.kept(model, self)

    def merge(self, model: nn.Module) -> None:
        """Always FettleError: a prefix is input."""
        raise prompt.cannot_merge(self)
