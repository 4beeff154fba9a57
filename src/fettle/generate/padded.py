"""Generation with the cache of `transformers`, for models that the engine (engine.py) cannot serve, and for conversations.

Rows run together, padded on the left, and leave as they end. What the engine does not serve: encoder-decoders, models with
ALiBi and others that have no attention interface, models that carry a state.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fettle.core import FettleError
from fettle.generate.choose import Chooser
from fettle.generate.encdec import PairCache, beginning
from fettle.generate.memory import Memory
from fettle.generate.request import Limits, Request
from fettle.models import prompt

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def run(
    forest: Forest, requests: Sequence[Request], bounds: Limits, memory: Memory | None = None
) -> Iterator[tuple[Request, int]]:
    """Advance all requests together, one token each a step; yields (request, its new token) and drops the ended ones.

    A `memory` is for a single request.
    """
    sources = [r.prompt for r in requests] if forest.config.is_encoder_decoder else []
    for request in requests if sources else ():
        request.prompt = beginning(forest)  # from here on, what stands before the answer in the decoder
    was_training = forest.model.training
    forest.model.eval()
    live, chooser = list(requests), None
    cache = PairCache(forest, sources) if sources else PaddedCache(forest, [r.prompt for r in live], memory)
    try:
        while live:
            logits = cache.next_logits()
            if chooser is None:
                chooser = Chooser(bounds.sampling, logits, live)
            chosen, logps = chooser.choose(logits, [len(r.tokens) for r in live])
            for request, token, logp in zip(live, chosen.tolist(), logps.tolist(), strict=True):
                bounds.take(request, token, logp)
                yield request, token
            keep = [i for i, r in enumerate(live) if not r.reason]
            for target, source in enumerate(keep):
                if target != source:
                    chooser.move(source, target)
            live = [live[i] for i in keep]
            if live:
                cache.push(chosen, keep)
    finally:
        forest.model.train(was_training)
        if memory is not None and isinstance(cache, PaddedCache) and cache.read is not None:
            memory.keep(cache.past, cache.read)


def may_share(forest: Forest, lengths: Sequence[int], columns: int) -> int:
    """How many of the prompts, longest first, may run together: all, or only those of one length where none may be padded."""
    if forest.may_pad(columns):
        return len(lengths)
    return sum(length == lengths[0] for length in lengths)


class PaddedCache:
    """The model's key-value cache for B left-padded rows, of which some may leave."""

    def __init__(self, forest: Forest, prompts: Sequence[Sequence[int]], memory: Memory | None = None):
        from transformers import DynamicCache

        self.forest, self.model = forest, forest.model
        device = forest.device
        longest = max(map(len, prompts))
        pad = forest.tokenizer.pad_token_id if forest.tokenizer.pad_token_id is not None else 0
        rows = [[pad] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        self.tokens = torch.tensor(rows, dtype=torch.long, device=device)
        self.mask = torch.tensor(mask, dtype=torch.long, device=device)
        self.ragged = min(map(len, prompts)) < longest
        past, seen = memory.take(prompts[0]) if memory is not None else (None, 0)
        self.past = DynamicCache(config=self.model.config) if past is None else past
        self.tokens = self.tokens[:, seen:]
        self.read = list(prompts[0][:seen]) if memory is not None else None  # what `past` holds; None: nobody can tell
        names = inspect.signature(self.model.forward).parameters
        self.by_state = "past_key_values" not in names  # Mamba: a state for all that was read, and masks of what is new
        if self.by_state and prompt.active(self.model) is not None:
            raise FettleError(
                f"generate: {type(self.model).__name__} carries a state that does not tell whether it has read a soft prompt; "
                "score it with fettle eval, or tune it with lora, which also writes"
            )
        self.takes_positions, self.takes_keep = "position_ids" in names, "logits_to_keep" in names

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Logits [B, V] after the tokens that were not yet seen."""
        width = self.tokens.shape[1]
        given: dict[str, Any] = {"cache_params" if self.by_state else "past_key_values": self.past}
        if self.ragged:
            given["attention_mask"] = self.mask[:, -width:] if self.by_state else self.mask
        if self.takes_positions:
            given["position_ids"] = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        if self.takes_keep:
            given["logits_to_keep"] = 1
        read, self.read = self.read, None
        out = self.model(input_ids=self.tokens, use_cache=True, **given)
        if read is not None:
            self.read = [*read, *self.tokens[0].tolist()]
        return cast(Tensor, out.logits[:, -1])

    def push(self, chosen: Tensor, keep: list[int]) -> None:
        """Append one token to each row of `keep` and forget the others."""
        if len(keep) < len(chosen):
            rows = torch.tensor(keep, device=chosen.device)
            self.past.reorder_cache(rows)  # which layers of every kind have
            chosen, self.mask = chosen[rows], self.mask[rows]
            self.ragged = bool((self.mask == 0).any())
        self.tokens = chosen[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.tokens)], 1)
