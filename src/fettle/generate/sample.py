"""Generation: batches of prompts of uneven lengths, left-padded, with the key-value cache of `transformers`.

Greedy text equals `model.generate` of transformers and does not depend on which other prompts share the batch (in 16 bits,
up to two tokens that rounding makes equally likely).
What is sampled for request i depends on (seed, i) alone, since each request has its own random numbers.

Shapes: B requests in the batch, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fettle.core import FettleError, Spec
from fettle.generate.encdec import PairCache, beginning
from fettle.generate.memory import Memory
from fettle.generate.prompts import prompter
from fettle.generate.text import TextOut, cut_at
from fettle.models import prompt
from fettle.models.forest import context_length as context_length

if TYPE_CHECKING:
    from fettle.models.forest import Forest

Reason = Literal["end", "stop", "length", "context"]


class Sampling(Spec):
    """How tokens are chosen. The order is that of transformers: penalty, temperature, top_k, top_p, min_p."""

    max_tokens: int = Field(256, ge=1, description="most new tokens of an answer")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that together reach this probability")
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens less likely than this share of the likeliest one's probability"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 makes tokens seen before less likely")
    stop: tuple[str, ...] = Field((), description="texts that end an answer; they are not part of it")
    seed: int = Field(0, ge=0, description="request i draws from (seed, i)")


@dataclass(frozen=True)
class Completion:
    """An answer. `tokens` ends with the end token where there was one; `text` has neither that nor the stop text.

    `logps` are the model's own log-probabilities of `tokens`, before temperature, penalty and filters.
    `reason`: 'end' an end token, 'stop' a stop text, 'length' max_tokens, 'context' the model's context is full.
    """

    tokens: tuple[int, ...]
    text: str
    logps: tuple[float, ...]
    reason: Reason


def end_tokens(forest: Forest) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, the tokenizer, and the chat template's end of turn."""
    found: set[int] = set()
    sources: list[Any] = [getattr(forest.model, "generation_config", None), forest.config, forest.tokenizer]
    for value in (getattr(source, "eos_token_id", None) for source in sources):
        found |= {value} if isinstance(value, int) else set(value or ())
    if (turn := prompter(forest.tokenizer).end_of_turn) is not None:
        found.add(turn)
    return frozenset(found)


def generate(
    forest: Forest,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] | None = None,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer each prompt (token ids), in order. `progress(n)` is called when n more requests are answered.

    `batch_tokens` bounds the cache: requests run together while count x (longest prompt + max_tokens) stays below it.
    `seeds` gives each request its own number in place of its index.
    """
    sampling = sampling or Sampling()
    if seeds is not None and len(seeds) != len(prompts):
        raise FettleError(f"generate: {len(seeds)} seeds for {len(prompts)} prompts; give one each")
    ends = end_tokens(forest)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    done: dict[int, Completion] = {}
    while order:
        size = max(1, batch_tokens // (len(prompts[order[0]]) + sampling.max_tokens))
        if not forest.may_pad(len(prompts[order[0]]) + sampling.max_tokens):
            size = min(size, sum(len(prompts[i]) == len(prompts[order[0]]) for i in order))
        group, order = order[:size], order[size:]
        numbers = [seeds[i] if seeds is not None else i for i in group]
        requests = [Request(i, list(prompts[i]), number) for i, number in zip(group, numbers, strict=True)]
        for request, _ in run(forest, requests, sampling, ends):
            if request.reason:
                done[request.index] = _completion(forest, request, sampling, ends)
                if progress:
                    progress(1)
    return [done[i] for i in range(len(prompts))]


def stream(
    forest: Forest, prompt: Sequence[int], sampling: Sampling | None = None, memory: Memory | None = None
) -> Iterator[str]:
    """The answer to one prompt, piece by piece; never half a character, never a part of a stop text.

    With a `memory` of the turns before, only what they did not hold is computed.
    """
    sampling = sampling or Sampling()
    ends = end_tokens(forest)
    out = TextOut(forest.tokenizer, sampling.stop)
    for request, token in run(forest, [Request(0, list(prompt), 0)], sampling, ends, memory):
        if token not in ends and (piece := out.push(token)):
            yield piece
        if request.reason and (rest := out.finish()):
            yield rest


@dataclass
class Request:
    """One prompt on its way: what it has, and why it ended."""

    index: int
    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    reason: Reason | None = None


def run(
    forest: Forest, requests: Sequence[Request], sampling: Sampling, ends: frozenset[int], memory: Memory | None = None
) -> Iterator[tuple[Request, int]]:
    """Advance all requests together, one token each a step; yields (request, its new token) and drops the ended ones.

    A `memory` is for a single request.
    """
    bound = forest.context
    if forest.task != "causal":
        raise FettleError(f"{type(forest.model).__name__} gives labels and writes no text; score it with fettle eval")
    for request in requests:
        _check_prompt(forest, request, bound)
    sources = [r.prompt for r in requests] if forest.config.is_encoder_decoder else []
    for request in requests if sources else ():
        request.prompt = beginning(forest)  # from here on, what stands before the answer in the decoder
    model = forest.model
    was_training = model.training
    model.eval()
    tails = {id(r): TextOut(forest.tokenizer, sampling.stop) for r in requests} if sampling.stop else {}
    draws = {id(r): _draws(sampling, r.seed) for r in requests}
    live = list(requests)
    cache = PairCache(forest, sources) if sources else Cache(forest, [r.prompt for r in live], memory)
    try:
        while live:
            logits_BV = cache.next_logits()
            chosen = choose(logits_BV, live, sampling, draws)
            logps = torch.log_softmax(logits_BV.float(), -1).gather(1, chosen[:, None])[:, 0]
            for request, token, logp in zip(live, chosen.tolist(), logps.tolist(), strict=True):
                request.tokens.append(token)
                request.logps.append(logp)
                request.reason = _reason(request, token, ends, sampling, bound, tails.get(id(request)))
                yield request, token
            keep = [i for i, r in enumerate(live) if not r.reason]
            live = [live[i] for i in keep]
            if live:
                cache.push(chosen, keep)
    finally:
        model.train(was_training)
        if memory is not None and isinstance(cache, Cache) and cache.read is not None:
            memory.keep(cache.past, cache.read)


class Cache:
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


def choose(logits_BV: Tensor, live: Sequence[Request], sampling: Sampling, draws: dict[int, np.ndarray]) -> Tensor:
    """The next token of each request, int64 [B]."""
    scores = logits_BV.float()
    if sampling.repetition_penalty != 1.0:
        scores = penalised(scores, [r.prompt + r.tokens for r in live], sampling.repetition_penalty)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    probabilities = filtered(scores / sampling.temperature, sampling).softmax(-1).double()
    drawn = torch.tensor([draws[id(r)][len(r.tokens)] for r in live], dtype=torch.float64, device=scores.device)
    reached = probabilities.cumsum(-1)
    return torch.searchsorted(reached, (drawn * reached[:, -1])[:, None], right=True)[:, 0].clamp_max(
        scores.shape[-1] - 1
    )


def penalised(scores_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858): scores of seen tokens move towards being less likely."""
    scores_BV = scores_BV.clone()
    for row, tokens in zip(scores_BV, seen, strict=True):
        index = torch.tensor(sorted(set(tokens)), device=row.device)
        row[index] = torch.where(row[index] < 0, row[index] * penalty, row[index] / penalty)
    return scores_BV


def filtered(scores_BV: Tensor, sampling: Sampling) -> Tensor:
    """Scores with -inf at the tokens that top_k, top_p and min_p drop, in that order; one token always stays."""
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        least = scores_BV.topk(sampling.top_k, -1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = torch.sort(scores_BV, -1, descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= sampling.top_p)
        scores_BV = scores_BV.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0:
        share = scores_BV.softmax(-1)
        scores_BV = scores_BV.masked_fill(share < sampling.min_p * share.amax(-1, keepdim=True), -torch.inf)
    return scores_BV


def _draws(sampling: Sampling, seed: int) -> np.ndarray:
    return np.random.default_rng([sampling.seed, seed]).random(sampling.max_tokens if sampling.temperature else 0)


def _check_prompt(forest: Forest, request: Request, bound: int | None) -> None:
    if not request.prompt:
        raise FettleError(
            f"generate: prompt {request.index} is empty; give at least one token (the tokenizer's start token)"
        )
    if bound and len(request.prompt) >= bound:
        raise FettleError(
            f"generate: prompt {request.index} has {len(request.prompt)} tokens and the model of {forest.spec.path} "
            f"sees {bound} at most; shorten it"
        )


def _reason(
    request: Request, token: int, ends: frozenset[int], sampling: Sampling, bound: int | None, tail: TextOut | None
) -> Reason | None:
    if token in ends:
        return "end"
    if tail is not None:
        tail.push(token)
        if tail.stopped:
            return "stop"
    if len(request.tokens) >= sampling.max_tokens:
        return "length"
    return "context" if bound and len(request.prompt) + len(request.tokens) >= bound else None


def _completion(forest: Forest, request: Request, sampling: Sampling, ends: frozenset[int]) -> Completion:
    shown = [t for t in request.tokens if t not in ends]
    text = forest.tokenizer.decode(shown, skip_special_tokens=True)
    text = cut_at(text, sampling.stop)
    assert request.reason is not None
    return Completion(tuple(request.tokens), text, tuple(request.logps), request.reason)
