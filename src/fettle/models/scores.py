"""Scores of texts and words: what a model's own head makes of the states of a forest batch.

The body runs over the forest; the head then runs as the architecture wrote it, on the one state a text is judged by, with
the body replaced by its result. So any head works that looks at one state (or, as ModernBERT's may, at the mean of all).

    encoders   the first token of each text        decoders   the last token of each leaf of the forest

Shapes: E texts, N labelled words, C width, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.models.tasks import is_encoder
from fettle.models.weight import is_linear


def scored(batch: Batch) -> list[int]:
    """The segments that get a score: those of examples that nothing stands below."""
    parents = {segment.parent for segment in batch.segments}
    return [i for i, name in enumerate(batch.names) if name and i not in parents]


def pooled(model: Any, hidden: Tensor, batch: Batch) -> Tensor:
    """[E, C]: of the states [T, C] of a row, the one that each text is judged by."""
    segments = [batch.segments[i] for i in scored(batch)]
    if any(s.stop == s.start for s in segments):
        raise FettleError("an example without a token cannot be scored")
    config = model.config
    if is_encoder(config) and getattr(config, "classifier_pooling", "cls") == "mean":
        owner = torch.cat([torch.full((s.stop - s.start,), i) for i, s in enumerate(segments)])
        places = torch.cat([torch.arange(s.start, s.stop) for s in segments])
        sums = hidden.new_zeros(len(segments), hidden.shape[1]).index_add(
            0, owner.to(hidden.device), hidden[places.to(hidden.device)]
        )
        return sums / torch.tensor([s.stop - s.start for s in segments], device=hidden.device)[:, None]
    at = [s.start if is_encoder(config) else s.stop - 1 for s in segments]
    return hidden[torch.tensor(at, device=hidden.device)]


def text_scores(model: Any, states: Tensor) -> Tensor:
    """[E, L]: the head's logits for texts judged by `states` [E, C]."""
    return _through_head(model, states[:, None])


def word_scores(model: Any, states: Tensor) -> Tensor:
    """[N, L]: the head's logits for words with `states` [N, C]."""
    return _through_head(model, states[None])[0]


def _through_head(model: Any, states: Tensor) -> Tensor:
    """Logits of a model whose body gives `states` [B, n, C]."""
    shape = states.shape[:2]
    ids = torch.zeros(shape, dtype=torch.long, device=states.device)
    with _given(model, states):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]


class _Given(nn.Module):
    """A body that has run already."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@contextmanager
def _given(model: Any, states: Tensor) -> Iterator[None]:
    """Within it, the model's body is its result. A decoder's head counts padding to find the last token, and needs its id."""
    body, text = model.base_model, model.config.get_text_config()
    output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=states, pooler_output=_pool(body, states))
    pad = text.pad_token_id
    setattr(model, model.base_model_prefix, _Given(output))
    text.pad_token_id = 0 if pad is None else pad
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, body)
        text.pad_token_id = pad


def _pool(body: Any, states: Tensor) -> Tensor | None:
    """What a body's pooler makes of `states` [B, n, C]; None where it has none."""
    pooler = getattr(body, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    if is_linear(pooler):  # ALBERT's
        return body.pooler_activation(pooler(states[:, 0]))  # type: ignore[no-any-return]
    return pooler(states)  # type: ignore[no-any-return]


def first_position(model: Any) -> int:
    """The position of a text's first token: RoBERTa and its kin begin after the padding's."""
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0
