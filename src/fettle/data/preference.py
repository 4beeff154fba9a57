"""Preferences as trees: the prompt once, and below it every answer, so that what is common is computed once.

    prompt, one token short ──┬── its last token + answer 1 (the best)
                              ├── its last token + answer 2
                              └── ...

A position predicts one token, and so the prompt is cut one token short and that token stands at the head of every answer
(core/batch.py). What answers have in common is found in their tokens, since a tokenizer may join the end of the prompt with the
beginning of an answer; what follows the last learned token of an answer is left out.

A batch brings of its examples: `ranks` [E, MOST], 1 for the best answer and 0 where there is none, in the order of the answers in
the row; `margin` [E]; `example_weights` [E].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fettle.core.batch import Example, Node
from fettle.core.errors import FettleError
from fettle.data.formats import Sample
from fettle.data.ranked import LABELS, MOST
from fettle.data.template import Encoded, Encoder, Span, weights_of

if TYPE_CHECKING:
    from fettle.data.spec import DataSpec
    from fettle.data.store import Store


@dataclass(frozen=True)
class Preference:
    """Examples of objectives that learn from preferences; `compared`: from answers to one prompt that are better and worse.

    `bound`: the most tokens of a prompt with one answer, where the model sees no more.
    """

    compared: bool = True
    bound: int | None = None
    longest: int | None = None

    @property
    def labels(self) -> bool:
        """False: the parts of a template are a prompt and an answer."""
        return False

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes."""
        return ["preference", self.compared, MOST]

    def format(self, spec: DataSpec, rows: Sequence[dict[str, Any]]) -> str:
        """'preference'; FettleError where the rows are no preferences, or not of the kind that is learned from."""
        if spec.long == "truncate":
            raise FettleError(
                f"{spec.path}: long: truncate would cut answers that are compared, and an answer without its end is another one; "
                "raise batch.tokens, or say long: drop"
            )
        if spec.format not in ("auto", "preference") or spec.template is not None:
            raise FettleError(
                f"{spec.path}: the objective learns from preferences, and format: {spec.format} has none; leave the format out"
            )
        paired = any({"chosen", "rejected"} <= row.keys() or "answers" in row for row in rows)
        judged = any(row.keys() & set(LABELS) for row in rows)
        if spec.format == "auto" and rows and not (paired or judged):
            columns = ", ".join(sorted({str(key) for row in rows for key in row})) or "none"
            raise FettleError(
                f"{spec.path}: the objective learns from preferences: rows with 'chosen' and 'rejected', with 'answers' and 'ranks', "
                f"or with a 'label'; found the columns {columns}"
            )
        if self.compared and judged and not paired:
            raise FettleError(
                f"{spec.path}: the rows judge one answer each, and the objective compares answers; take objective: {{kind: kto}}"
            )
        return "preference"

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Each sample's tree, laid out as one sequence, or why there is none."""
        plain = encoder.plain()
        made = iter(plain.encode([answer for sample in samples for answer in sample.answers]))
        return [self._tree(sample, [next(made) for _ in sample.answers]) for sample in samples]

    def _tree(self, sample: Sample, made: Sequence[list[Encoded] | str]) -> list[Encoded] | str:
        if self.compared and len(made) == 1:
            return "it judges one answer, and the objective compares answers"
        if not sample.weight:
            return "its weight is 0, so nothing would be learned"
        paths: list[Encoded] = []
        for found in made:
            if isinstance(found, str):
                return found
            if len(found) != 1:
                return "the chat template rewrites earlier turns, so an answer of several turns is no single text"
            if not found[0].learned:
                return "an answer has no token"
            paths.append(found[0])
        if len({path.tokens[: path.spans[-1][1]].tobytes() for path in paths}) < len(paths):
            return "two answers are the same tokens"
        joined = joined_at(paths)
        return [replace(joined, labels=(sample.weight, sample.margin, *sample.ranks))]

    def example(self, encoded: Encoded, stop: int) -> Example:
        """The prompt, and the answers below it."""
        return tree(encoded)

    def unseen(self, store: Store) -> np.ndarray | None:
        """bool [n]: examples in which a prompt with an answer is longer than the model can see; None where there is no bound."""
        if self.bound is None or not len(store.answers):
            return None
        of, starts = np.diff(store.answer_offsets), np.asarray(store.answers, np.int64)
        ends = np.append(starts[1:], 0)
        ends[store.answer_offsets[1:] - 1] = store.lengths  # an example's last answer ends with it
        paths = ends - starts + np.repeat(np.maximum(store.splits, 0), of)
        return np.maximum.reduceat(paths, store.answer_offsets[:-1]) > self.bound

    def counted(self, store: Store, examples: np.ndarray) -> str:
        """How many pairs are compared, or how many answers are desired, as a table says it."""
        if self.compared:
            return f"{sum(len(compared(store.labels_of(int(i))[2:])) for i in examples):,} pairs"
        return "{:,} answers, {:,} of them desired".format(*judged(store, examples))

    def one_kind(self, sources: Iterable[tuple[Store, np.ndarray]]) -> list[str]:
        """A note where all sources together have no desired answer, or no other one."""
        if self.compared:
            return []
        answers, desired = map(sum, zip(*(judged(*source) for source in sources), strict=True))
        if 0 < desired < answers:
            return []
        return [
            f"data: {desired:,} of {answers:,} answers are desired; the objective learns how desired answers differ from others, "
            "so give it both kinds"
        ]


def judged(store: Store, examples: np.ndarray) -> tuple[int, int]:
    """How many answers some examples have, and how many of those are desired."""
    ranks = [rank for i in examples for rank in store.labels_of(int(i))[2:]]
    return len(ranks), ranks.count(1)


def compared(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) of all answers with different ranks."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if 0 < a < b]


def joined_at(paths: Sequence[Encoded]) -> Encoded:
    """One sequence of what the paths have in common, up to a token before the first that is learned, and of their rests."""
    if len(paths) == 1:
        (path,) = paths
        return replace(path, tokens=path.tokens[: path.spans[-1][1]], answers=(0,))
    common = min(max(path.spans[0][0] - 1, 0) for path in paths)
    for path in paths[1:]:
        differ = np.flatnonzero(path.tokens[:common] != paths[0].tokens[:common])
        common = int(differ[0]) if len(differ) else common
    parts, spans, starts = [paths[0].tokens[:common]], [], []
    at = common
    for path in paths:
        stop = path.spans[-1][1]
        starts.append(at)
        spans += [(a - common + at, b - common + at, w) for a, b, w in path.spans]
        parts.append(path.tokens[common:stop])
        at += stop - common
    return Encoded(np.concatenate(parts), tuple(spans), split=common, answers=tuple(starts))


def tree(encoded: Encoded) -> Example:
    """The example of a sequence that `joined_at` made."""
    tokens, split, starts = encoded.tokens, encoded.split, encoded.answers
    nodes = [Node(tokens[:split], np.zeros(split, np.float32))] if split > 0 else []
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        spans: list[Span] = [(a - start, b - start, 1.0) for a, b, _ in encoded.spans if start <= a < stop]
        nodes.append(Node(tokens[start:stop], weights_of(stop - start, spans), parent=0 if split > 0 else -1))
    weight, margin, *ranks = encoded.labels
    extra = {
        "ranks": np.array([*ranks, *[0] * (MOST - len(ranks))], np.float32),
        "margin": np.array(margin, np.float32),
        "example_weights": np.array(weight, np.float32),
    }
    return Example(tuple(nodes), extra=extra)
