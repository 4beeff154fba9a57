"""Prompt tuning (Lester, Al-Rfou & Constant 2021, arXiv 2104.08691): vectors in front of the text's embeddings.

    model( [e_1 .. e_P ; E(x_1) .. E(x_T)] )       only e [P, C] trains

P virtual tokens, C width, E the model's embedding. The vectors begin as the embeddings of frequent words (`vocabulary`), of
the words of a text that says the task (`text`, repeated or cut to P), or uniform in [-0.5, 0.5] (`random`). Float32 masters.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models import prompt
from fettle.models.words import first_tokens

Start = Literal["vocabulary", "text", "random"]


class PromptTuning(Edit):
    """Trained vectors in front of every text; the base is frozen."""

    role = "prompts"
    kind: Literal["prompt_tuning"] = "prompt_tuning"
    tokens: int = Field(default=20, ge=1, description="virtual tokens")
    init: Start = Field(default="vocabulary", description="what the vectors begin as: frequent words, a text, or noise")
    text: str | None = Field(default=None, description="where init is text: words that say the task")

    @model_validator(mode="after")
    def _text_where_asked(self) -> PromptTuning:
        check_text(self.init, self.text)
        return self

    def apply(self, model: nn.Module) -> None:
        """Attach the vectors. FettleError where the model has a soft prompt already."""
        where = prompt.place(model)
        if self.init == "random":
            width = prompt.embeddings_of(model, [0]).shape[1]
            vectors = torch.rand(self.tokens, width, dtype=where["dtype"]).sub_(0.5).to(where["device"])
        else:
            vectors = prompt.embeddings_of(model, first_tokens(model, self.text, self.tokens, f"{self.kind}.text"))
        prompt.attach(model, prompt.SoftPrompt(self, vectors, self.tokens))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The vectors [P, C]."""
        return prompt.kept(model, self)

    def merge(self, model: nn.Module) -> None:
        """Always FettleError: a prompt is input."""
        raise prompt.cannot_merge(self)


def check_text(init: str, text: str | None) -> None:
    """ValueError where one of `init: text` and `text` comes without the other."""
    if (init == "text") != (text is not None):
        raise ValueError("'init: text' and the key 'text' belong together; give both or neither")
