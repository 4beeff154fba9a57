"""Scores of models that give labels: accuracy and macro-F1 of texts, F1 of words and of the spans that their tags spell.

    F1 of a label = 2 tp / (2 tp + fp + fn)            macro-F1 = mean of it over the labels that the data or the model names
    F1 of spans   = 2 right / (named + there)          a span is right where its place and its type are (CoNLL 2003)

Tags spell spans where they read B-x and I-x (IOB2, arXiv cmp-lg/9505040; an I- that follows no span of its type begins one).
Intervals: bootstrap by row, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import orjson
import torch
from torch import Tensor

from fettle.core import FettleError
from fettle.core.batch import IGNORE, Example, in_rows, pack
from fettle.core.files import sha256
from fettle.data.forms import LABELLED, form_of
from fettle.data.labelled import Labelled
from fettle.data.tagged import Tagged
from fettle.data.template import Encoded, Encoder
from fettle.evaluate.interval import CELLS, RESAMPLES, SCORES, Score, mean_interval, ratio_interval
from fettle.evaluate.results import Result, Row
from fettle.evaluate.samples import Asked, read_samples
from fettle.evaluate.tasks import Evaluation
from fettle.models.roles import evaluating

if TYPE_CHECKING:
    from fettle.models.forest import Forest

ROW = 4096  # tokens of a batch, unless a text needs more


class Labels(Evaluation):
    """Labelled texts, {"text": ..., "label": ...}: accuracy and macro-F1, or errors where the label is a number to predict."""

    kind: Literal["classify"] = "classify"


class Tags(Evaluation):
    """Tagged words, {"tokens": [...], "tags": [...]}: F1 of spans or of tags, and accuracy by word."""

    kind: Literal["tag"] = "tag"


def columns_of(path: Path) -> type[Labels | Tags] | None:
    """The evaluation that a JSONL file's first row is for; None where it is another's."""
    try:
        with open(path, "rb") as handle:
            first = orjson.loads(next((line for line in handle if line.strip()), b"{}").removeprefix(b"\xef\xbb\xbf"))
    except (OSError, orjson.JSONDecodeError):
        return None  # whoever reads the file will say what is wrong with it
    if not isinstance(first, dict) or "prompt" in first or "messages" in first:
        return None
    if {"tokens", "tags"} <= first.keys():
        return Tags
    return Labels if "text" in first and first.keys() & {"label", "labels"} else None


def score_texts(forest: Forest, spec: Labels, advance: Callable[..., None] = lambda *_: None) -> Result:
    """Score every text of a file by the model's own head."""
    asked, form = labels_of(forest, spec)
    advance(0, len(asked))
    scores = torch.cat([scores for _, scores in _scored(forest, form, [a.encoded for a in asked], advance)]).numpy()
    right = np.array([a.encoded.labels for a in asked])
    names = list(form.names)
    if len(names) == 1:
        return _result(spec, _errors(asked, scores[:, 0], right[:, 0], spec.seed), asked, form, kind="regression")
    if isinstance(form, Labelled) and form.multi:
        return _result(spec, _several(asked, scores > 0, right > 0, names, spec.seed), asked, form)
    found, wanted = scores.argmax(1), right[:, 0].astype(int)
    rows = [
        _row(a, "accuracy", float(f == w), names[f], names[w]) for a, f, w in zip(asked, found, wanted, strict=True)
    ]
    scores_of = {
        "accuracy": mean_interval((found == wanted).astype(float).tolist(), spec.seed, bounds=SCORES),
        "macro_f1": macro_f1(wanted, found, spec.seed),
    }
    return _result(spec, (scores_of, rows), asked, form)


def score_tags(forest: Forest, spec: Tags, advance: Callable[..., None] = lambda *_: None) -> Result:
    """Score every word of a file by the model's own head."""
    asked, form = labels_of(forest, spec)
    advance(0, len(asked))
    names = form.names
    rows: list[Row] = []
    counts: list[tuple[int, ...]] = []
    found: list[str] = []
    for examples, scores in _scored(forest, form, [a.encoded for a in asked], advance):
        picked = iter(scores.argmax(1).tolist())
        for example in examples:
            marks = example.nodes[0].marks
            assert marks is not None
            answer = [names[next(picked)] for mark in marks if mark != IGNORE]
            wanted = [names[mark] for mark in marks if mark != IGNORE]
            same = sum(a == b for a, b in zip(answer, wanted, strict=True))
            counts.append((same, len(wanted), *span_counts(wanted, answer)))
            rows.append(
                _row(asked[len(rows)], "word_accuracy", same / max(len(wanted), 1), " ".join(answer), " ".join(wanted))
            )
            found += answer
    table = np.array(counts, dtype=float)
    words = ratio_interval(table[:, 0], table[:, 1], spec.seed)
    scores_of = {"word_accuracy": words}
    if any(name.startswith("B-") for name in names) and table[:, 3:].sum():
        scores_of = {"span_f1": _f1_interval(table[:, 2], table[:, 3] + table[:, 4], spec.seed), **scores_of}
    else:
        wanted_tags = [names.index(tag) for row in rows for tag in row.right.split(" ")] if rows else []
        scores_of["macro_f1"] = macro_f1(
            np.array(wanted_tags), np.array([names.index(tag) for tag in found]), spec.seed
        )
    return _result(spec, (scores_of, rows), asked, form)


# Rows in, scores out.


def labels_of(forest: Forest, spec: Labels | Tags) -> tuple[list[Asked], Labelled | Tagged]:
    """The rows of a file, encoded; FettleError names the rows that cannot be used."""
    format = "labelled" if isinstance(spec, Labels) else "tagged"
    task, form = LABELLED[format], form_of(forest)
    if forest.task != task or not isinstance(form, Labelled | Tagged):
        raise FettleError(
            f"{spec.path}: {format} rows need a model with task: {task}, and {forest.spec.path} is one with task: {forest.task}"
        )
    encoder = Encoder(forest.tokenizer, form=form)
    return read_samples(
        spec, format, lambda samples: [f if isinstance(f, str) else f[0] for f in form.encode(encoder, samples)]
    ), form


@torch.no_grad()
def _scored(
    forest: Forest, form: Labelled | Tagged, encoded: Sequence[Encoded], advance: Callable[..., None]
) -> Iterator[tuple[list[Example], Tensor]]:
    """Batches of examples, in order, with their scores in float32 on the CPU."""
    bound = form.longest or max(len(e.tokens) for e in encoded)
    examples = [form.example(e, min(len(e.tokens), bound)) for e in encoded]
    length = max(ROW, *map(len, examples))
    pad = forest.tokenizer.pad_token_id or 0
    with evaluating(forest.model):
        for group in in_rows(examples, length):
            batch = pack(group, length, pad).to(forest.device)
            yield group, forest.scores(batch).float().cpu()
            advance(len(group))


def _row(asked: Asked, metric: str, score: float, output: str, right: str) -> Row:
    return Row(asked.where, "", "", metric, score, output, right, prompt_tokens=len(asked.encoded.tokens))


def _result(
    spec: Evaluation,
    scored: tuple[dict[str, Score], list[Row]],
    asked: Sequence[Asked],
    form: Labelled | Tagged,
    kind: str = "task",
) -> Result:
    cut = sum(len(a.encoded.tokens) > (form.longest or len(a.encoded.tokens)) for a in asked)
    about = {"labels": list(form.names), "cut": cut}
    return Result(
        name=Path(spec.path).name, kind=kind, sha256=sha256(Path(spec.path)), settings=spec.model_dump(mode="json"),
        scores=scored[0], about=about, rows=tuple(scored[1]),
    )  # fmt: skip


def _errors(
    asked: Sequence[Asked], found: np.ndarray, wanted: np.ndarray, seed: int
) -> tuple[dict[str, Score], list[Row]]:
    errors = np.abs(found - wanted)
    rows = [
        _row(a, "absolute_error", float(e), f"{f:.4g}", f"{w:.4g}")
        for a, e, f, w in zip(asked, errors, found, wanted, strict=True)
    ]
    return {"absolute_error": mean_interval(errors, seed), "squared_error": mean_interval(errors**2, seed)}, rows  # type: ignore[arg-type]


def _several(
    asked: Sequence[Asked], found: np.ndarray, wanted: np.ndarray, names: list[str], seed: int
) -> tuple[dict[str, Score], list[Row]]:
    """Several labels a text: F1 over all of them (micro), and texts with exactly the right ones."""
    exact = (found == wanted).all(1)
    both, either = (found & wanted).sum(1), found.sum(1) + wanted.sum(1)

    def said(row: np.ndarray) -> str:
        return ", ".join(name for name, yes in zip(names, row, strict=True) if yes)

    rows = [
        _row(a, "accuracy", float(e), said(f), said(w)) for a, e, f, w in zip(asked, exact, found, wanted, strict=True)
    ]
    scores = {"accuracy": mean_interval(exact.astype(float).tolist(), seed, bounds=SCORES)}
    if either.sum():
        scores = {"micro_f1": _f1_interval(both, either, seed), **scores}
    return scores, rows


# Measures.


def _f1_interval(right: np.ndarray, named: np.ndarray, seed: int) -> Score:
    """2 right / named over the rows in which something is named, by the model or by the data."""
    rows = named > 0
    return ratio_interval(2 * right[rows], named[rows], seed)


def macro_f1(
    wanted: np.ndarray, found: np.ndarray, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Score:
    """The mean of F1 over labels, int [n] each, with its interval over resampled rows.

    Rows with the same two labels are drawn together, as in `ratio_interval`.
    """
    pairs, times = np.unique(np.stack([wanted, found], 1), axis=0, return_counts=True)
    labels = np.unique(pairs)
    of_wanted, of_found = (np.equal(pairs[:, k, None], labels[None, :]).astype(float) for k in (0, 1))
    parts = np.concatenate([of_wanted * of_found, of_wanted + of_found], 1)  # tp, and 2 tp + fp + fn, by label

    def f1(counts: np.ndarray) -> np.ndarray:
        both, all_of_it = np.split(counts @ parts, 2, axis=-1)
        seen = all_of_it > 0
        return (2 * both / np.where(seen, all_of_it, 1)).sum(-1) / np.maximum(seen.sum(-1), 1)

    n = int(times.sum())
    if n == 1:
        return Score(float(f1(times)), None, None, 1)
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // parts.size)
    drawn = [f1(rng.multinomial(n, times / n, size=min(step, resamples - i))) for i in range(0, resamples, step)]
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Score(float(f1(times)), float(low), float(high), n)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, stop, type) of every span that tags spell."""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and kind == name and bool(kind)
        if kind and not goes_on:
            found.add((start, i, kind))
            kind = ""
        if prefix in ("B", "I") and name and not goes_on:
            start, kind = i, name
    return found


def span_counts(wanted: Sequence[str], found: Sequence[str]) -> tuple[int, int, int]:
    """(right, named, there): spans that both have, that the model names, and that are there."""
    theirs, ours = spans(wanted), spans(found)
    return len(theirs & ours), len(ours), len(theirs)
