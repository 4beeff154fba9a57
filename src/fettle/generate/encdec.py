"""Generation with encoder-decoders: a source is read once, and the decoder writes with a cache of its own.

Shapes: B requests, L tokens of the longest source, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fettle.data.pairs import dress_of
from fettle.models.encdec import start_token

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def beginning(forest: Forest) -> list[int]:
    """What the decoder has before it writes: its start token, and a first token that the generation config forces."""
    forced = getattr(getattr(forest.model, "generation_config", None), "forced_bos_token_id", None)
    return [start_token(forest.model), *([forced] if isinstance(forced, int) else [])]


class PairCache:
    """Encoded sources and the decoder's key-value cache for B rows, of which some may leave."""

    def __init__(self, forest: Forest, sources: Sequence[Sequence[int]]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self.model = forest.model
        dress = dress_of(forest.tokenizer)
        rows = [torch.tensor(dress.on(source), device=forest.device) for source in sources]
        pad = forest.tokenizer.pad_token_id or 0
        self.sources = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows], device=forest.device)
        self.mask = (torch.arange(self.sources.shape[1], device=forest.device) < lengths[:, None]).long()
        self.tokens = torch.tensor([beginning(forest)] * len(rows), device=forest.device)
        config = self.model.config
        self.past = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self.states: Tensor | None = None

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Logits [B, V] after the tokens that were not yet seen."""
        from transformers.modeling_outputs import BaseModelOutput

        if self.states is None:
            encoder = self.model.get_encoder()
            self.states = encoder(input_ids=self.sources, attention_mask=self.mask).last_hidden_state
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states), attention_mask=self.mask,
            decoder_input_ids=self.tokens, past_key_values=self.past, use_cache=True,
        )  # fmt: skip
        return cast(Tensor, out.logits[:, -1])

    def push(self, chosen: Tensor, keep: list[int]) -> None:
        """Append one token to each row of `keep` and forget the others."""
        if len(keep) < len(chosen):
            rows = torch.tensor(keep, device=chosen.device)
            self.past.batch_select_indices(rows)
            chosen, self.mask = chosen[rows], self.mask[rows]
            self.states = None if self.states is None else self.states[rows]
        self.tokens = chosen[:, None]
