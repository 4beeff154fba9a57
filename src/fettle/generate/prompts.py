"""Prompts as token ids, by the same template and tokenizer rules that training uses (fettle.data.template)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from fettle.core import FettleError
from fettle.data.formats import Sample
from fettle.data.template import Encoder


class Prompter:
    """Renders and tokenizes for one tokenizer. Make it with `prompter`, which keeps it."""

    def __init__(self, tokenizer: Any):
        self.encoder = Encoder(tokenizer)
        self.source = tokenizer.chat_template
        self._end: int | None = None
        self._asked = False

    def chat_text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as text, up to where the model begins to answer."""
        return self.encoder.render([dict(m) for m in messages])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of `chat_text`."""
        return self.encoder.ids(self.chat_text(messages))

    def plain(self, text: str) -> list[int]:
        """A text as it stands, after the start token where the tokenizer puts one."""
        return [*self.encoder.prefix, *self.encoder.ids(text)]

    @property
    def template_name(self) -> str:
        """'tokenizer', or the named default that stands in for a missing template."""
        return self.encoder.template.name

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.encoder.template.text.encode()).hexdigest()

    @property
    def end_of_turn(self) -> int | None:
        """The special token that the template puts at the end of an answer; None where it puts none."""
        if not self._asked:
            self._asked, self._end = True, self._find_end()
        return self._end

    def _find_end(self) -> int | None:
        talk = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            (found,) = self.encoder.encode([Sample(messages=talk, weights=(0.0, 1.0))])
        except FettleError:  # no template, and nothing a default could end an answer with
            return None
        if isinstance(found, str) or not found or not found[-1].spans:
            return None
        last = int(found[-1].tokens[found[-1].spans[-1][1] - 1])
        return last if last in self.encoder.tokenizer.added_tokens_decoder else None


_kept: WeakKeyDictionary[Any, Prompter] = WeakKeyDictionary()


def prompter(tokenizer: Any) -> Prompter:
    """The Prompter of a tokenizer, made once for each chat template it has."""
    kept = _kept.get(tokenizer)
    if kept is None or kept.source != tokenizer.chat_template:
        kept = _kept[tokenizer] = Prompter(tokenizer)
    return kept
