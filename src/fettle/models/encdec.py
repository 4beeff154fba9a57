"""Forest batches on encoder-decoders (Raffel et al. 2019, arXiv 1910.10683; Lewis et al. 2019, arXiv 1910.13461).

A bidirectional root is what the encoder reads, its causal descendants are what the decoder writes:

    row        x1 .. xS           y1      ..   yN          x source, y target, d the decoder's start token
    state      -  .. s0           s1      ..   sN          s0 after d, s_i after y_i: s_i predicts y_{i+1}

so that a state stands where a prefix language model would have it, and logits, log-probabilities and objectives need not
know. s0 stands at the source's last token; a target that begins with d itself has s0 there, which is how several targets
of one source each predict their first token. A source is encoded once for all of its targets.

Shapes: T tokens of the row, N rows of a bucket, L their length, F rows of a soft prompt before a source, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import ancestors
from fettle.core.errors import FettleError
from fettle.models.paths import laid_out, span, stacked
from fettle.models.plan import Plan, rounded

Encode = Callable[[Tensor, Tensor], Tensor]  # ids int64 [N, L], real bool [N, L] -> states [N, F + L, C]
Decode = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # ids [N, L], states [N, F + S, C], real bool [N, F + S] -> [N, L, C]

# How a conversation reads where the tokenizer has no chat template: its turns one below the other, nothing added, as the
# models of this kind were pretrained and instructed.
JOIN = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Pair:
    """One source and one target: `source` a segment's index; `inputs` and `rows` places in the row, -1 for the start token.

    The state after `inputs[i]` belongs at `rows[i]`.
    """

    source: int
    inputs: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """The states of one source among all encoded rows: [first, first + size)."""

    first: int
    size: int


def hidden_of_pairs(
    tokens: Tensor, plan: Plan, encode: Encode, decode: Decode, start: int, bound: int | None = None
) -> Tensor:
    """[T, C]: the decoder's states of a row of `tokens` [T], laid out as above; zeros where nothing is predicted.

    `bound`: the most tokens that either half can see, if there is a most.
    """
    device = tokens.device
    pairs = pairs_of(tokens.cpu().numpy(), plan, start)
    states, found = _encoded(tokens, plan, sorted({pair.source for pair in pairs}), encode, bound)
    groups: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((rounded(len(pair.inputs), bound), rounded(found[pair.source].size)), []).append(pair)
    given = torch.cat([tokens, tokens.new_tensor([start])])  # place -1 is the start token
    pieces: list[Tensor] = []
    back = np.full(plan.length, -1)
    row = 0
    for (length, width), group in sorted(groups.items()):
        most = max(1, plan.length // max(length, width))
        for some in (group[i : i + most] for i in range(0, len(group), most)):
            index, _ = stacked([pair.inputs for pair in some], length)
            sources = [found[pair.source] for pair in some]
            keys, real = stacked([s.first + np.arange(s.size) for s in sources], width)
            read = states.index_select(0, torch.from_numpy(keys.ravel()).to(device)).view(*keys.shape, -1)
            out = decode(given[torch.from_numpy(index).to(device)], read, torch.from_numpy(real).to(device))
            for i, pair in enumerate(some):
                back[pair.rows] = row + i * length + np.arange(len(pair.rows))
            pieces.append(out.flatten(0, 1))
            row += index.size
    return laid_out(pieces, back, device)


def pairs_of(tokens: np.ndarray, plan: Plan, start: int) -> list[Pair]:
    """A pair for each path of a row; FettleError where a path is not a source with what is written after it."""
    parents = {segment.parent for segment in plan.segments}
    found = []
    for i, segment in enumerate(plan.segments):
        if i in plan.padding or i in parents or segment.stop == segment.start:
            continue
        source, *rest = ancestors(plan.segments, i)
        if plan.segments[source].causal or any(not plan.segments[k].causal for k in rest):
            raise FettleError(
                "an encoder-decoder reads a source (a root that sees both ways) and writes targets (causal segments below it); "
                "this batch holds other segments: plain texts have no source to read"
            )
        own = np.concatenate([np.zeros(0, np.int64), *(span(plan.segments[k]) for k in rest)])
        if len(own) and tokens[own[0]] == start:
            found.append(Pair(source, own, own))
        else:
            last = plan.segments[source].stop - 1
            found.append(Pair(source, np.array([-1, *own]), np.array([last, *own])))
    return found


def _encoded(
    tokens: Tensor, plan: Plan, sources: list[int], encode: Encode, bound: int | None
) -> tuple[Tensor, dict[int, Encoded]]:
    """The encoder's states of all sources as rows [R, C], and which of them belong to each."""
    groups: dict[int, list[int]] = {}
    for source in sources:
        groups.setdefault(rounded(len(span(plan.segments[source])), bound), []).append(source)
    pieces: list[Tensor] = []
    found: dict[int, Encoded] = {}
    row = 0
    for length, group in sorted(groups.items()):
        most = max(1, plan.length // length)
        for some in (group[i : i + most] for i in range(0, len(group), most)):
            index, real = (
                torch.from_numpy(a).to(tokens.device) for a in stacked([span(plan.segments[s]) for s in some], length)
            )
            states = encode(tokens[index], real)
            width = states.shape[1]
            for i, source in enumerate(some):
                found[source] = Encoded(row + i * width, width - length + len(span(plan.segments[source])))
            pieces.append(states.flatten(0, 1))
            row += len(some) * width
    if not pieces:
        raise FettleError("a batch without a segment that is not padding has nothing to compute")
    return torch.cat(pieces), found


def halves(model: Any) -> tuple[Encode, Decode]:
    """The two halves of a transformers encoder-decoder."""
    encoder, decoder = model.get_encoder(), model.get_decoder()

    def encode(ids: Tensor, real: Tensor) -> Tensor:
        return encoder(input_ids=ids, attention_mask=real.long()).last_hidden_state  # type: ignore[no-any-return]

    def decode(ids: Tensor, states: Tensor, real: Tensor) -> Tensor:
        return decoder(  # type: ignore[no-any-return]
            input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=real.long(), use_cache=False
        ).last_hidden_state

    return encode, decode


def start_token(model: Any) -> int:
    """The token that the decoder begins with; FettleError where no configuration says."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(decoder=True)):
        found = getattr(config, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise FettleError(
        f"{type(model).__name__}: neither the generation config nor the config names a decoder_start_token_id; set it in "
        "the model's config.json"
    )


def output_scale(config: Any) -> float:
    """The factor between a decoder's last state and its head: T5 with tied embeddings divides by the root of its width."""
    tied = config.model_type in ("umt5", "switch_transformers") and config.tie_word_embeddings
    return float(config.d_model) ** -0.5 if getattr(config, "scale_decoder_outputs", tied) else 1.0
