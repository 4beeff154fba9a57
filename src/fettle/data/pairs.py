"""Sources with targets, for encoder-decoders: prompts with completions, instructions with answers, conversations' last turns.

The source is the prompt, or the conversation up to its last answer as the chat template renders it; where the tokenizer has
none, its turns one below the other. Source and target are dressed as the tokenizer dresses texts (T5: the end token behind
each; BART: a start token too). Only the last answer of a conversation is learned: an encoder reads all of its source both
ways, so that an answer within it has been seen already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fettle.core.batch import Example, Node
from fettle.core.errors import FettleError
from fettle.data.formats import Sample, detect
from fettle.data.forms import LABELLED
from fettle.data.template import Encoded, Encoder, weights_of
from fettle.data.tools import spelled_out

if TYPE_CHECKING:
    from fettle.data.spec import DataSpec


@dataclass(frozen=True)
class Dress:
    """Tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def on(self, tokens: Sequence[int]) -> list[int]:
        """The tokens with what is lacking of both."""
        found = list(tokens)
        if tuple(found[: len(self.before)]) != self.before:
            found = [*self.before, *found]
        if self.after and tuple(found[-len(self.after) :]) != self.after:
            found = [*found, *self.after]
        return found


def dress_of(tokenizer: Any, target: bool = False) -> Dress:
    """How a tokenizer dresses a source, or a target, which in a translator has a language of its own."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    worn = tokenizer(text_target="a")["input_ids"] if target else tokenizer("a")["input_ids"]
    at = next((i for i in range(len(worn)) if worn[i : i + len(plain)] == plain), 0)
    return Dress(tuple(worn[:at]), tuple(worn[at + len(plain) :]))


@dataclass(frozen=True)
class Pairs:
    """Examples of an encoder-decoder. `bound`: the most tokens of a source, and of a target."""

    source: Dress
    target: Dress
    bound: int | None = None
    longest: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, bound: int | None) -> Pairs:
        """The form for a tokenizer."""
        return cls(dress_of(tokenizer), dress_of(tokenizer, target=True), bound)

    @property
    def labels(self) -> bool:
        """False."""
        return False

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes."""
        return ["pairs", [self.source.before, self.source.after, self.target.before, self.target.after], self.bound]

    def format(self, spec: DataSpec, rows: Sequence[dict[str, Any]]) -> str:
        """As for causal language models; FettleError where rows are plain texts, or bring labels."""
        if spec.learn == "all":
            raise FettleError(
                f"{spec.path}: learn: all has no meaning for an encoder-decoder, which does not predict its source"
            )
        found = (
            "template"
            if spec.template is not None
            else detect(rows, spec.path)
            if spec.format == "auto"
            else spec.format
        )
        if found == "text" or found in LABELLED:
            raise FettleError(
                f"{spec.path}: rows of format: {found} have no source and target for an encoder-decoder; give it prompt and "
                "completion, instruction and output, or messages"
            )
        return found

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Source and target behind each other, cut where `split` says; all of the target is learned."""
        found: list[list[Encoded] | str] = ["a text without an answer, and an encoder-decoder needs both"] * len(
            samples
        )
        chats = [i for i, sample in enumerate(samples) if sample.kind == "chat"]
        for i, made in zip(chats, self._conversations(encoder, [samples[i] for i in chats]), strict=True):
            found[i] = made
        for i, sample in enumerate(samples):
            if sample.kind == "completion":
                found[i] = self._pair(encoder, sample.prompt, sample.completion, sample.weight)
        return found

    def _conversations(self, encoder: Encoder, samples: list[Sample]) -> list[list[Encoded] | str]:
        if not samples:
            return []
        spoken = [
            spelled_out(s.messages, s.tools, encoder.template.of(bool(s.tools)))
            if s.tools or _calls(s)
            else (list(s.messages), [])
            for s in samples
        ]
        sources = encoder.renders([(turns[:-1], tools) for turns, tools in spoken])
        found: list[list[Encoded] | str] = []
        for sample, (turns, _), source in zip(samples, spoken, sources, strict=True):
            if source.error:
                found.append(source.error)
            elif not sample.weights[-1]:
                found.append("its last answer has the weight 0, and no other answer can be learned")
            else:
                found.append(self._pair(encoder, source.text, str(turns[-1]["content"]), sample.weights[-1]))
        return found

    def _pair(self, encoder: Encoder, source: str, target: str, weight: float) -> list[Encoded] | str:
        if not source.strip():
            return "the prompt is empty, and the encoder would have nothing to read"
        read, written = self.source.on(encoder.ids(source)), self.target.on(encoder.ids(target))
        for what, part in (("source", read), ("target", written)):
            if self.bound is not None and len(part) > self.bound:
                return f"its {what} has {len(part)} tokens, and the model sees {self.bound} at most"
        tokens = np.array([*read, *written], dtype=np.int32)
        return [Encoded(tokens, ((len(read), len(tokens), weight),), split=len(read))]

    def example(self, encoded: Encoded, stop: int) -> Example:
        """The source, seen both ways, and the target below it."""
        tokens, split = encoded.tokens[:stop], encoded.split
        weights = weights_of(len(tokens), encoded.spans)
        source = Node(tokens[:split], weights[:split], causal=False)
        return Example((source, Node(tokens[split:], weights[split:], parent=0)))


def _calls(sample: Sample) -> bool:
    return any(m["role"] == "tool" or "tool_calls" in m for m in sample.messages)
