"""From a stream of tokens to text that is never half a character and never runs past a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer shows for bytes that are not yet a character


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first place where any of the stop texts begins."""
    found = [at for s in stop if s and (at := text.find(s)) >= 0]
    return text[: min(found)] if found else text


class TextOut:
    """Decodes token by token.

    A token is decoded together with the ones before it, since spaces and multi-byte characters depend on them;
    what could be the beginning of a stop text is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(s for s in stop if s)
        self.tokens: list[int] = []
        self.start = self.read = 0  # tokens [start, read) are shown; they give the rest its context
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """Whatever was held back; an unfinished character shows as the tokenizer shows it."""
        return "" if self.stopped else self._release(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        shown = self._decode(self.tokens[self.start : self.read])
        both = self._decode(self.tokens[self.start :])
        if len(both) <= len(shown) or both.endswith(BROKEN) and not final:
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return both[len(shown) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, piece: str, final: bool) -> str:
        text = self.held + piece
        cut = cut_at(text, self.stop)
        if len(cut) < len(text):
            self.stopped, self.held = True, ""
            return cut
        keep = 0 if final else max((_overlap(text, s) for s in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
