"""Text for edits: a model carries the tokenizer it was loaded with, so that an edit can begin from words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fettle.core.errors import FettleError

_NAME = "fettle_words"
COMMON = 5000  # random words are drawn among the first ids, which are those of the most frequent tokens


@dataclass(frozen=True)
class _Words:
    """A tokenizer as an attribute of a model. Copies of the model share it."""

    tokenizer: Any

    def __deepcopy__(self, memo: Any) -> _Words:
        return self


def lend(model: nn.Module, tokenizer: Any) -> None:
    """Let edits of `model` use this tokenizer."""
    setattr(model, _NAME, _Words(tokenizer))


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that the model was loaded with, to read or to enlarge; None where there is none."""
    words = getattr(model, _NAME, None)
    return None if words is None else words.tokenizer


def tokens_of(model: nn.Module, text: str, what: str) -> list[int]:
    """The token ids of a text, without special tokens around it. FettleError where the model has no tokenizer.

    `what` names the key that the text stands in, for errors.
    """
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        raise FettleError(
            f"{what}: the text needs a tokenizer, and this model was loaded without one; load it with one"
        )
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise FettleError(f"{what}: {text!r} holds no token; write a word, or leave the key out")
    return ids


def first_tokens(model: nn.Module, text: str | None, count: int, what: str) -> list[int]:
    """`count` token ids to begin from: those of a text, repeated or cut; without one, random frequent tokens."""
    if text is None:
        vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        return torch.randint(min(COMMON, vocabulary), (count,)).tolist()
    ids = tokens_of(model, text, what)
    return [ids[i % len(ids)] for i in range(count)]
