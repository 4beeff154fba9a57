"""Words with tags: {"tokens": ["Ada", "lives", "here"], "tags": ["B-PER", "O", "O"]}.

A word's tag is learned at its first piece; its other pieces, and special tokens, are seen and not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from fettle.core.batch import IGNORE, Example, Node
from fettle.data.formats import Sample
from fettle.data.forms import check_format, label_number
from fettle.data.template import Encoded, Encoder

if TYPE_CHECKING:
    from fettle.data.spec import DataSpec


@dataclass(frozen=True)
class Tagged:
    """Examples of a model with task: tag. `causal`: how the model reads; `end`: the special token that a cut keeps."""

    names: tuple[str, ...]
    causal: bool = False
    longest: int | None = None
    end: int | None = None

    @property
    def labels(self) -> bool:
        """True."""
        return True

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes."""
        return ["tagged", self.names]

    def format(self, spec: DataSpec, rows: Sequence[dict[str, Any]]) -> str:
        """'tagged'."""
        return check_format(spec, "tagged", rows, ({"tokens", "tags"},))

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Tokens as the tokenizer dresses the words, a span of one token for the first piece of each, and its tag."""
        spaced = needs_spaces(encoder)
        given = [[f" {w}" if i and spaced else w for i, w in enumerate(s.words)] for s in samples]
        encodings = encoder.fast.encode_batch(given, is_pretokenized=True)
        return [self._one(sample, encoding) for sample, encoding in zip(samples, encodings, strict=True)]

    def _one(self, sample: Sample, encoding: Any) -> list[Encoded] | str:
        numbers = []
        for number, tag in enumerate(sample.tags, 1):
            found = label_number(tag, self.names)
            if isinstance(found, str):
                return f"tag {number}: {found}"
            numbers.append(float(found))
        first: dict[int, int] = {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None:
                first.setdefault(word, place)
        for i, word in enumerate(sample.words):
            if i not in first:
                return f"word {i + 1} ('{word[:20]}') has no token in this tokenizer"
        spans = tuple((first[i], first[i] + 1, sample.weight) for i in range(len(sample.words)))
        return [Encoded(np.array(encoding.ids, dtype=np.int32), spans, labels=tuple(numbers))]

    def example(self, encoded: Encoded, stop: int) -> Example:
        """One segment whose words are marked with their tags."""
        tokens = encoded.tokens[:stop].copy()
        marks, weights = np.full(len(tokens), IGNORE, np.int64), np.zeros(len(tokens), np.float32)
        for (place, _, weight), label in zip(encoded.spans, encoded.labels, strict=True):
            if place < len(tokens):
                marks[place], weights[place] = int(label), weight
        if self.end is not None and stop < len(encoded.tokens):
            tokens[-1], marks[-1], weights[-1] = self.end, IGNORE, 0
        return Example((Node(tokens, weights, causal=self.causal, marks=marks),))


def needs_spaces(encoder: Encoder) -> bool:
    """Whether words lose the space before them when they come one by one: byte-level tokenizers that put none themselves."""
    outer = orjson.loads(encoder.fast.to_str()).get("pre_tokenizer") or {}
    inner = outer.get("pretokenizers", [outer])
    return any(p.get("type") == "ByteLevel" and not p.get("add_prefix_space") for p in inner)
