"""What a model keeps of a conversation between two answers: the keys and values of the tokens that it has read.

A turn's prompt begins with most of what was read for the turn before, so only the rest has to be computed. What cannot be
gone on from exactly (states of linear attention, a window that has already slid past the point where two prompts part) is
computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any


class Memory:
    """The cache of one conversation with one model, whose weights stay as they are."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.past: Any = None

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """The cache of the longest known beginning of `prompt`, and its length, less than the prompt's; (None, 0) for none.

        The memory is empty until `keep`, so that whatever happens to the cache meanwhile, no half of it is found again.
        """
        (past, tokens), (self.past, self.tokens) = (self.past, self.tokens), (None, [])
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, prompt[:-1], strict=False)))
        if not shared or shared < len(tokens) and not _cropped(past, len(tokens) - shared):
            return None, 0
        return past, shared

    def keep(self, past: Any, tokens: list[int]) -> None:
        """Remember a cache that holds exactly `tokens`, and whatever an edit put in front of them."""
        if getattr(past, "layers", None) and all(_goes_on(layer) for layer in past.layers):
            self.past, self.tokens = past, tokens


def _goes_on(layer: Any) -> bool:
    """Whether several tokens can be added to a layer that has begun."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _cropped(past: Any, count: int) -> bool:
    """Forget the last `count` tokens; False where a layer cannot, and then nothing is changed."""
    if any(layer.is_sliding for layer in past.layers):
        return False
    for layer in past.layers:
        if layer.is_initialized:  # layers that share another's keys have none
            layer.keys, layer.values = layer.keys[..., :-count, :], layer.values[..., :-count, :]
    return True
