"""Hard-soft hybrid templates: fixed words with trained tokens among them, in front of every text.

    template "<soft:5> Answer the question: <soft:3>"   ->   [e_1 .. e_5 ; E(Answer the question:) ; e_6 .. e_8 ; E(x)]

Only e [S, C] trains; the words are the model's own embeddings E, looked up anew in each pass. P = S + the words' tokens.
The idea of anchors among virtual tokens is P-tuning's (Liu et al. 2021, arXiv 2103.10385, section 3.2); hybrid templates as a
class of their own: PTR (Han et al. 2021, arXiv 2105.11259) and PPT (Gu et al. 2021, arXiv 2109.04332). Trained tokens begin
as frequent words.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models import prompt
from fettle.models.words import first_tokens, tokens_of

SOFT = re.compile(r"<soft(?::(\d+))?>")


def parts(template: str) -> list[str | int]:
    """A template cut into texts and numbers of trained tokens; spaces around a mark only separate it from the words.

    ValueError where nothing trains, or a mark asks for no token.
    """
    found: list[str | int] = []
    at = 0
    for mark in SOFT.finditer(template):
        found += [template[at : mark.start()].strip(), int(mark[1] or 1)]
        at = mark.end()
    found.append(template[at:].strip())
    if 0 in found or not any(isinstance(part, int) for part in found):
        raise ValueError(
            f"the template {template!r} trains nothing; write <soft:5> where five trained tokens belong, <soft> for one"
        )
    return [part for part in found if part]


class HybridPrompt(Edit):
    """A template of words and trained vectors in front of every text; the base is frozen."""

    role = "prompts"
    kind: Literal["hybrid_prompt"] = "hybrid_prompt"
    template: str = Field(description="words, with <soft:n> where n trained tokens belong")

    @field_validator("template")
    @classmethod
    def _trains(cls, template: str) -> str:
        parts(template)
        return template

    def apply(self, model: nn.Module) -> None:
        """Attach the template. FettleError where the model has no tokenizer, or a soft prompt already."""
        words: list[int] = []
        for part in parts(self.template):
            words += [-1] * part if isinstance(part, int) else tokens_of(model, part, f"{self.kind}.template")
        vectors = prompt.embeddings_of(model, first_tokens(model, None, words.count(-1), self.kind))
        places = torch.tensor(words, device=vectors.device)
        prompt.attach(model, prompt.SoftPrompt(self, vectors, len(words), words=places))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained vectors [S, C]."""
        return prompt.kept(model, self)

    def merge(self, model: nn.Module) -> None:
        """Always FettleError: a prompt is input."""
        raise prompt.cannot_merge(self)
