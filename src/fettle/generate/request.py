"""What is asked of a model, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fettle.core import FettleError, Spec
from fettle.generate.prompts import prompter
from fettle.generate.text import TextOut, cut_at

if TYPE_CHECKING:
    from fettle.models.forest import Forest

Reason = Literal["end", "stop", "length", "context", "filter"]


class Sampling(Spec):
    """How tokens are chosen. The order is that of transformers: penalties, temperature, top_k, top_p, min_p."""

    max_tokens: int = Field(256, ge=1, description="most new tokens of an answer")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that together reach this probability")
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens less likely than this share of the likeliest one's probability"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1 makes tokens seen before less likely")
    presence_penalty: float = Field(0.0, description="taken off the logits of tokens that the answer has already")
    stop: tuple[str, ...] = Field((), description="texts that end an answer; they are not part of it")
    seed: int = Field(0, ge=0, description="request i draws from (seed, i)")


@dataclass(frozen=True)
class Completion:
    """An answer. `tokens` ends with the end token where there was one; `text` has neither that nor the stop text.

    `logps` are the model's own log-probabilities of `tokens`, before temperature, penalties and filters. An endpoint
    (remote.py) gives no token ids, and log-probabilities only where it was asked for them.
    `reason`: 'end' an end token, 'stop' a stop text, 'length' max_tokens, 'context' the model's context is full, 'filter' an
    endpoint held the answer back.
    """

    tokens: tuple[int, ...]
    text: str
    logps: tuple[float, ...]
    reason: Reason


@dataclass
class Request:
    """One answer on its way: what the model reads, how much it may write, what it wrote, and why it ended."""

    index: int
    prompt: list[int]
    seed: int
    most: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    reason: Reason | None = None


@dataclass
class Limits:
    """What ends an answer, for every request of a run: `bound` is the most tokens that a text may have."""

    ends: frozenset[int]
    sampling: Sampling
    bound: int | None
    tokenizer: Any
    tails: dict[int, TextOut] = field(default_factory=dict)  # by request, where there are stop texts

    def take(self, request: Request, token: int, logp: float) -> None:
        """Append a token to an answer and say whether that ends it. FettleError where the model computed no number."""
        if logp != logp:
            raise FettleError(
                f"generate: after {len(request.prompt) + len(request.tokens)} tokens of request {request.index} the model gives "
                "no numbers (nan); its weights, or its arithmetic in few bits, are broken"
            )
        request.tokens.append(token)
        request.logps.append(logp)
        request.reason = self._reason(request, token)

    def _reason(self, request: Request, token: int) -> Reason | None:
        if token in self.ends:
            return "end"
        if self.sampling.stop:
            tail = self.tails.setdefault(request.index, TextOut(self.tokenizer, self.sampling.stop))
            tail.push(token)
            if tail.stopped:
                return "stop"
        if len(request.tokens) >= request.most:
            return "length"
        return "context" if self.bound and len(request.prompt) + len(request.tokens) >= self.bound else None

    def completion(self, request: Request) -> Completion:
        """The answer of a request that has ended."""
        assert request.reason is not None
        shown = [t for t in request.tokens if t not in self.ends]
        text = cut_at(self.tokenizer.decode(shown, skip_special_tokens=True), self.sampling.stop)
        return Completion(tuple(request.tokens), text, tuple(request.logps), request.reason)


def limits(forest: Forest, sampling: Sampling, ends: frozenset[int] | None = None) -> Limits:
    """What ends the answers of a model; `ends` in place of `end_tokens`. FettleError where it writes no text."""
    if forest.task != "causal":
        raise FettleError(f"{type(forest.model).__name__} gives labels and writes no text; score it with fettle eval")
    return Limits(end_tokens(forest) if ends is None else ends, sampling, forest.context, forest.tokenizer)


def end_tokens(forest: Forest) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, the tokenizer, and the chat template's end of turn."""
    found: set[int] = set()
    sources: list[Any] = [getattr(forest.model, "generation_config", None), forest.config, forest.tokenizer]
    for value in (getattr(source, "eos_token_id", None) for source in sources):
        found |= {value} if isinstance(value, int) else set(value or ())
    if (turn := prompter(forest.tokenizer).end_of_turn) is not None:
        found.add(turn)
    return frozenset(found)


def check_prompts(forest: Forest, requests: Sequence[Request]) -> None:
    """FettleError where a prompt is empty, or fills the context."""
    bound = forest.context
    for r in requests:
        if not r.prompt:
            raise FettleError(
                f"generate: prompt {r.index} is empty; give at least one token (the tokenizer's start token)"
            )
        if bound and len(r.prompt) >= bound:
            raise FettleError(
                f"generate: prompt {r.index} has {len(r.prompt)} tokens and the model of {forest.spec.path} sees {bound} at most; "
                "shorten it"
            )
