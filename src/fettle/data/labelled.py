"""Texts with labels: {"text": ..., "label": ...}, with "text_pair" where two texts are judged together.

A label is a name or a number; a list of them where a text may have several; any number where one output is to be predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fettle.core.batch import Example, Node
from fettle.data.formats import Sample
from fettle.data.forms import check_format, label_number
from fettle.data.template import Encoded, Encoder

if TYPE_CHECKING:
    from fettle.data.spec import DataSpec


@dataclass(frozen=True)
class Labelled:
    """Examples of a model with task: classify. One name means a number to predict.

    `causal` and `typed`: how the model reads; `end`: the special token that closes a text, which a cut keeps.
    """

    names: tuple[str, ...]
    multi: bool = False
    causal: bool = False
    typed: bool = False
    longest: int | None = None
    end: int | None = None

    @property
    def labels(self) -> bool:
        """True."""
        return True

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes."""
        return ["labelled", self.names, self.multi, self.typed]

    def format(self, spec: DataSpec, rows: Sequence[dict[str, Any]]) -> str:
        """'labelled', or 'template', whose part after '|||' is the label."""
        return check_format(spec, "labelled", rows, ({"text", "label"}, {"text", "labels"}), ("template",))

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Tokens as the tokenizer dresses a text or two, with the label beside them."""
        labels = [self.numbers(s.label if s.kind == "labelled" else s.completion or None) for s in samples]
        texts = [s.text if s.kind == "labelled" else s.prompt for s in samples]
        given = [(text, s.pair) if s.pair else text for text, s in zip(texts, samples, strict=True)]
        found: list[list[Encoded] | str] = []
        for sample, label, encoding in zip(samples, labels, encoder.fast.encode_batch(given), strict=True):
            if isinstance(label, str):
                found.append(label)
                continue
            split = encoding.type_ids.index(1) if self.typed and 1 in encoding.type_ids else -1
            tokens = np.array(encoding.ids, dtype=np.int32)
            found.append(
                [Encoded(tokens, ((0, 1, sample.weight),), split=split, labels=label)]
                if len(tokens)
                else "the text has no token"
            )
        return found

    def numbers(self, label: Any) -> tuple[float, ...] | str:
        """A label as numbers: (its number,), one 0 or 1 a name where several are allowed, or (a number,); or why it is none."""
        if label is None:
            return "the label is missing"
        if len(self.names) == 1:
            return _number(label)
        if not self.multi:
            if isinstance(label, list):
                return "the label is a list; say model.multi: true where a text may have several labels"
            found = label_number(label, self.names)
            return found if isinstance(found, str) else (float(found),)
        several = [label_number(one, self.names) for one in (label if isinstance(label, list) else [label])]
        if bad := next((one for one in several if isinstance(one, str)), None):
            return bad
        return tuple(float(i in several) for i in range(len(self.names)))

    def example(self, encoded: Encoded, stop: int) -> Example:
        """One segment with its label."""
        tokens, split = encoded.tokens[:stop].copy(), encoded.split
        if self.end is not None and stop < len(encoded.tokens):
            tokens[-1] = self.end
        types = (np.arange(len(tokens)) >= split).astype(np.int64) if split >= 0 else None
        ((_, _, weight),) = encoded.spans
        node = Node(tokens, np.zeros(len(tokens), np.float32), causal=self.causal, types=types)
        labels, weights = np.array(encoded.labels, np.float32), np.array(weight, np.float32)
        return Example((node,), extra={"labels": labels, "label_weights": weights})


def _number(label: Any) -> tuple[float, ...] | str:
    try:
        value = float(label)
    except (TypeError, ValueError):
        return f"the label must be a number to predict, found {label!r}"[:120]
    return (value,) if math.isfinite(value) else f"the label must be a finite number, found {label!r}"
