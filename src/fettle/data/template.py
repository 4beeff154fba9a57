"""Samples to tokens and weights: the mask comes from the rendered text itself, never from looking for strings in it.

A learned stretch of a conversation is what a `{% generation %}` block of the template wrote; without such blocks it is
the difference between the rendering up to the answer, with the generation prompt, and the rendering up to and with
the answer. Where a template rewrites earlier turns (reasoning dropped from the history, say), such a turn becomes an
example of its own, rendered as the model would see it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fettle.core.batch import Node
from fettle.core.errors import FettleError
from fettle.data.formats import Sample
from fettle.data.render import Job, Rendering, worker
from fettle.data.templates import Template, chat_template, marks
from fettle.data.tools import spelled_out

if TYPE_CHECKING:
    from fettle.data.forms import Form

NOW = "2025-01-01T12:00:00"  # the date in templates that print one: training data must not depend on the day
Span = tuple[int, int, float]  # start, stop, weight


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and the spans [start, stop) of them that are learned, each with its weight.

    `split` is where a second part begins (a target, a second text), -1 where there is none; `labels` are those of the
    text (one span) or of its words (a span each). Of a prompt with answers, `answers` is where each of them begins, and
    `labels` are what is said of them (preference.py).
    """

    tokens: np.ndarray  # int32 [n]
    spans: tuple[Span, ...]
    name: str = ""  # '' for a row's only example, '#2' for what belongs to its second
    split: int = -1
    labels: tuple[float, ...] = ()
    answers: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """How many targets of a weight over 0 it has: tokens, or spans with a label."""
        spans = [(start, stop) for start, stop, weight in self.spans if weight > 0]
        return len(spans) if self.labels and not self.answers else sum(stop - max(start, 1) for start, stop in spans)

    @property
    def node(self) -> Node:
        """As a segment of a batch; its first token is never learned, since nothing stands before it."""
        return Node(self.tokens, weights_of(len(self.tokens), self.spans))


def weights_of(length: int, spans: Sequence[Span]) -> np.ndarray:
    """float32 [length]: each token's weight as a target."""
    weights = np.zeros(length, dtype=np.float32)
    for start, stop, weight in spans:
        weights[start:stop] = weight
    weights[:1] = 0
    return weights


@dataclass
class _Text:
    """A text to encode, with what is learned of it in characters."""

    sample: int
    text: str
    spans: list[Span] = field(default_factory=list)
    name: str = ""


class Encoder:
    """Encodes samples with one tokenizer. `learn` is 'assistant', 'last' or 'all'."""

    def __init__(
        self, tokenizer: Any, learn: str = "assistant", now: str | None = NOW, form: Form | None = None
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise FettleError(
                f"{type(tokenizer).__name__} is a slow tokenizer without offsets; fettle needs a fast one (tokenizer.json)"
            )
        from tokenizers import Tokenizer

        self.tokenizer, self.learn, self.now, self.form = tokenizer, learn, now, form
        description = backend.to_str()
        self.fast = Tokenizer.from_str(description)  # a copy: whatever padding or truncation is set must not apply
        self.fast.no_padding()
        self.fast.no_truncation()
        self.special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str | list)}
        self.hash = hashlib.sha256(description.encode()).hexdigest()
        self.eos = tokenizer.eos_token_id
        plain = self.fast.encode("a", add_special_tokens=False).ids
        dressed = tokenizer("a")["input_ids"]
        at = next((i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain), 0)
        self.prefix = list(dressed[:at])  # put before a text by the tokenizer itself (a begin-of-text token)
        self._template: Template | None = None
        self._marks = {
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content.startswith("<")
        }

    def learning(self, learn: str) -> Encoder:
        """The same encoder, learning something else."""
        other = copy(self)
        other.learn = learn
        return other

    def plain(self) -> Encoder:
        """The same encoder for a causal language model, which learns what assistants say."""
        other = copy(self)
        other.form, other.learn = None, "assistant"
        return other

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes, for the key of a cache."""
        try:
            template = [self.template.name, self.template.text, self.template.tools_text]
        except FettleError:  # no template, and no default fits: no conversation can be encoded either
            template = []
        form = [self.form.identity()] if self.form is not None else []
        return [self.hash, self.special, self.prefix, self.eos, self.learn, self.now, template, *form]

    def control_tokens(self) -> re.Pattern[str] | None:
        """What finds a control token of the tokenizer in a text."""
        names = sorted(
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special and not t.content.isspace()
        )
        return re.compile("|".join(map(re.escape, names))) if names else None

    @property
    def template(self) -> Template:
        """The chat template, asked for only where there is a conversation."""
        if self._template is None:
            self._template = chat_template(self.tokenizer)
        return self._template

    def encode(self, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Each sample's examples (more than one only where the template rewrites history), or why there are none."""
        if self.form is not None:
            return self.form.encode(self, samples)
        out: list[list[Encoded] | str] = [[] for _ in samples]
        texts: list[_Text] = []
        chats = [i for i, sample in enumerate(samples) if sample.kind == "chat"]
        for i, found in zip(chats, self._conversations([samples[i] for i in chats]), strict=True):
            if isinstance(found, str):
                out[i] = found
            else:
                texts += [
                    _Text(i, text, spans, f"#{n}" if len(found) > 1 else "") for n, (text, spans) in enumerate(found, 1)
                ]
        raw = [_Text(i, s.text) for i, s in enumerate(samples) if s.kind == "text"]
        for i, sample in enumerate(samples):
            if sample.kind == "completion":
                texts.append(_Text(i, sample.prompt + sample.completion, [self._completion(sample)]))
        self._plain(raw, samples, out)
        self._masked(texts, samples, out)
        return out

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), prompt: bool = True
    ) -> str:
        """A conversation as text, by default up to where the model begins to answer; FettleError where the template fails."""
        (found,) = self.renders([(messages, tools)], prompt)
        if found.error:
            raise FettleError(f"the chat template '{self.template.name}': {found.error}")
        return found.text

    def renders(
        self, talks: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]], prompt: bool = True
    ) -> list[Rendering]:
        """Many conversations, each with its tools, as texts or reasons why there is none."""
        jobs = []
        for messages, tools in talks:
            text = self.template.of(bool(tools))
            turns, left = spelled_out(messages, tools, text)
            jobs.append(Job(text, {"messages": turns, "tools": left or None, "add_generation_prompt": prompt}))
        return self._rendered(jobs)

    def _rendered(self, jobs: Sequence[Job]) -> list[Rendering]:
        try:
            return worker(self.now).render(jobs, self._shared())
        except FettleError as error:
            source = self.tokenizer.name_or_path if self.template.name == "tokenizer" else self.template.name
            raise FettleError(f"{source}: {str(error).replace('the template', 'the chat template', 1)}") from None

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered text, with nothing put before or after it."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def _shared(self) -> dict[str, Any]:
        named = {"bos_token": "", "eos_token": ""} if self.template.name != "tokenizer" else {}
        return {**named, **self.special, "documents": None}

    def _completion(self, sample: Sample) -> Span:
        start = 0 if self.learn == "all" else len(sample.prompt)
        return (start, len(sample.prompt) + len(sample.completion), sample.weight)

    def _conversations(self, samples: list[Sample]) -> list[list[tuple[str, list[Span]]] | str]:
        """Each conversation's texts with their learned characters, or the reason why there are none."""
        if not samples:
            return []
        samples = [self._spelled_out(sample) for sample in samples]
        jobs = []
        for sample in samples:
            text = self.template.of(bool(sample.tools))
            cut = self.learn != "all" and not marks(text)
            wanted = [i for i, w in enumerate(self._turn_weights(sample)) if w] if cut else []
            cuts = [c for i in wanted for c in ((i, True), (i + 1, False))]
            context = {"messages": sample.messages, "tools": sample.tools or None, "add_generation_prompt": False}
            jobs.append(Job(text, context, cuts))
        found = self._rendered(jobs)
        return [self._spans(sample, rendering) for sample, rendering in zip(samples, found, strict=True)]

    def _spelled_out(self, sample: Sample) -> Sample:
        """The sample with functions and calls as text where the template does not know them."""
        if not sample.tools and all(m["role"] != "tool" and "tool_calls" not in m for m in sample.messages):
            return sample
        turns, tools = spelled_out(sample.messages, sample.tools, self.template.of(bool(sample.tools)))
        spoken = iter([w for m, w in zip(sample.messages, sample.weights, strict=True) if m["role"] == "assistant"])
        weights = tuple(next(spoken) if m["role"] == "assistant" else 0.0 for m in turns)
        return replace(sample, messages=tuple(turns), tools=tuple(tools), weights=weights)

    def _turn_weights(self, sample: Sample) -> list[float]:
        if self.learn != "last":
            return list(sample.weights)
        last = max(i for i, w in enumerate(sample.weights) if w)
        return [w if i == last else 0.0 for i, w in enumerate(sample.weights)]

    def _spans(self, sample: Sample, found: Rendering) -> list[tuple[str, list[Span]]] | str:
        if found.error:
            return found.error
        if self.learn == "all":
            return [(found.text, [(0, len(found.text), sample.weight)])]
        weights = self._turn_weights(sample)
        template = self.template.of(bool(sample.tools))
        if any("reasoning_content" in m for m in sample.messages) and not (
            "reasoning" in template or "thinking" in template
        ):
            return "an answer comes with reasoning, which the chat template does not write"
        if marks(template):
            return self._marked(sample, found, weights)
        whole: list[Span] = []
        alone: list[tuple[str, list[Span]]] = []
        turns = [w for w in weights if w]
        for weight, before, after in zip(turns, found.cuts[::2], found.cuts[1::2], strict=True):
            if isinstance(before, int) and isinstance(after, int) and before <= after:
                whole.append((before, self._end(found.text, before, after), weight))
                continue
            text = after if isinstance(after, str) else found.text[:after]
            prompt = before if isinstance(before, str) else found.text[:before]
            if not text.startswith(prompt):
                return (
                    f"the chat template asks for an answer after {prompt[-40:]!r} but writes answers otherwise, so what the "
                    "model says cannot be told from the text; give the tokenizer a chat template with {% generation %} blocks"
                )
            alone.append((text, [(len(prompt), self._end(text, len(prompt), len(text)), weight)]))
        return alone + ([(found.text, whole)] if whole else [])

    def _marked(self, sample: Sample, found: Rendering, weights: list[float]) -> list[tuple[str, list[Span]]] | str:
        spoken = [w for m, w in zip(sample.messages, weights, strict=True) if m["role"] == "assistant"]
        if len(spoken) == len(found.spans):
            return [(found.text, [(a, b, w) for (a, b), w in zip(found.spans, spoken, strict=True) if w])]
        if len(set(spoken)) > 1:
            return f"{len(found.spans)} generation blocks for {len(spoken)} assistant turns, whose weights differ"
        return [(found.text, [(a, b, spoken[0]) for a, b in found.spans])]

    def _end(self, text: str, start: int, stop: int) -> int:
        """Where an answer ends: after its end-of-turn token; space that the template puts behind that is not learned."""
        kept = text[start:stop].rstrip()
        if any(kept.endswith(mark) for mark in self._marks):
            return start + len(kept)
        return stop

    def _plain(self, texts: list[_Text], samples: Sequence[Sample], out: list[list[Encoded] | str]) -> None:
        """Raw documents: the whole text and the end-of-text token, all of it learned."""
        if not texts:
            return
        end = [self.eos] if self.eos is not None else []
        for item, encoding in zip(
            texts, self.fast.encode_batch_fast([t.text for t in texts], add_special_tokens=False), strict=True
        ):
            tokens = np.array(self.prefix + encoding.ids + end, dtype=np.int32)
            out[item.sample] = [Encoded(tokens, _kept([(1, len(tokens), samples[item.sample].weight)]))]

    def _masked(self, texts: list[_Text], samples: Sequence[Sample], out: list[list[Encoded] | str]) -> None:
        """Texts with learned characters: a token is learned where it holds one of them."""
        if not texts:
            return
        for item, encoding in zip(
            texts, self.fast.encode_batch([t.text for t in texts], add_special_tokens=False), strict=True
        ):
            before, after = [], []
            if samples[item.sample].kind == "completion":
                before, after = self.prefix, [self.eos] if self.eos is not None else []
            tokens = np.array(before + encoding.ids + after, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            spans = [token_span(offsets, span, len(before)) for span in item.spans]
            if after and spans:
                spans[-1] = (spans[-1][0], len(tokens), spans[-1][2])
            found = out[item.sample]
            assert isinstance(found, list)
            found.append(Encoded(tokens, _kept(spans), item.name))


def _kept(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The spans of which anything is learned."""
    return tuple((start, stop, weight) for start, stop, weight in spans if start < stop and weight > 0)


def token_span(offsets: np.ndarray, span: Span, shift: int = 0) -> Span:
    """Characters to tokens: from the first token that ends after the start to the last that begins before the end.

    offsets int64 [n, 2]. A character that byte-level BPE splits gives several tokens the same offsets; all of them count.
    """
    start, stop, weight = span
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], stop, side="left"))
    return (first + shift, max(first, last) + shift, weight)


def encode(sample: Sample, tokenizer: Any, learn: str = "assistant") -> list[Encoded]:
    """One sample's examples; FettleError where it has none. For many, keep an Encoder."""
    (found,) = Encoder(tokenizer, learn).encode([sample])
    if isinstance(found, str):
        raise FettleError(found)
    return found
