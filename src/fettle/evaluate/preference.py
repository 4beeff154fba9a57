"""What a model prefers: how often it agrees with people, how sure it is, and how far it goes by length.

    reward of an answer       the head's score, of a reward model; the mean log-probability a token, of a language model
    accuracy                  the share of pairs whose better answer has the greater reward; a tie counts a half
    calibration error         sum_b n_b / n |share right - mean confidence|, confidence = sigmoid(|difference of rewards|),
                              over ten bins from 1/2 to 1 (Guo et al. 2017, arXiv 1706.04599, equation 3); the Brier score beside it
    prefers longer            the share of pairs in which the longer answer has the greater reward, beside that in which people
                              preferred it: a reward that goes by length is ahead (Singhal et al. 2023, arXiv 2310.03716)

A language model's differences of mean log-probabilities are no log-odds, so it has no calibration. In accuracy and Brier score a row
counts once, with the mean over its pairs; all intervals are by row. Rows are grouped by whether the better answer is the longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from fettle.core import FettleError
from fettle.core.batch import Example, in_rows, pack
from fettle.core.files import sha256
from fettle.data.formats import Sample, in_turns
from fettle.data.forms import form_of
from fettle.data.preference import Preference, compared
from fettle.data.read import read
from fettle.data.template import Encoded, Encoder
from fettle.evaluate.interval import SCORES, Score, grouped_interval, mean_interval
from fettle.evaluate.results import Result, Row
from fettle.evaluate.samples import Asked, read_samples
from fettle.evaluate.tasks import Evaluation
from fettle.models.roles import evaluating

if TYPE_CHECKING:
    from fettle.models.forest import Forest

ROW = 4096  # tokens of a batch, unless a prompt with its answers needs more
BINS = 10


class Preferences(Evaluation):
    """Preferences: rows with chosen and rejected answers, or rankings; accuracy, calibration and length bias."""

    kind: Literal["preference"] = "preference"
    chat: bool = Field(
        False,
        description="whether prompts that are texts are rendered by the chat template, as `chat` of training data says",
    )


@dataclass(frozen=True)
class Judged:
    """A row: where it stands, its answers' rewards and lengths in learned tokens, the best first, and their ranks."""

    where: str
    rewards: np.ndarray
    lengths: np.ndarray
    ranks: tuple[float, ...]

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """By pair, the better answer's reward and length less the worse one's."""
        better, worse = map(list, zip(*compared(self.ranks), strict=True))
        return self.rewards[better] - self.rewards[worse], self.lengths[better] - self.lengths[worse]


def holds_preferences(path: Path) -> bool:
    """Whether a file's first row compares answers."""
    try:
        first = next(iter(read(str(path))), None)
    except FettleError:
        return False  # whoever reads the file will say what is wrong with it
    keys = set() if first is None or first.value is None else first.value.keys()
    return {"chosen", "rejected"} <= keys or "answers" in keys


def score_preferences(forest: Forest, spec: Preferences, advance: Callable[..., None] = lambda *_: None) -> Result:
    """The rewards of every row's answers, and what they say of the model."""
    judged = list(_judged(forest, spec, advance))
    pairs = [j.pairs() for j in judged]
    differences = np.concatenate([difference for difference, _ in pairs])
    rows = [_row(one) for one in judged]
    scores = {"accuracy": mean_interval([r.score for r in rows], spec.seed, bounds=SCORES)}
    about: dict[str, Any] = {
        "pairs": len(differences),
        "reward": "score" if forest.task == "classify" else "mean log-probability",
    }
    if forest.task == "classify":
        error, about["calibration"] = calibration(differences)
        scores["calibration_error"] = Score(error, None, None, len(differences))
        scores["brier"] = mean_interval(
            [float(np.mean(_brier(difference))) for difference, _ in pairs], spec.seed, bounds=SCORES
        )
    uneven = [(np.sign(d[n != 0]), np.sign(n[n != 0])) for d, n in pairs if n.any()]
    if uneven:
        ours, people = (
            [(ahead * longer + 1) / 2 for ahead, longer in uneven],
            [(longer + 1) / 2 for _, longer in uneven],
        )
        scores["prefers_longer"] = grouped_interval(ours, spec.seed, bounds=SCORES)
        scores["people_prefer_longer"] = grouped_interval(people, spec.seed, bounds=SCORES)
        about["length_correlation"] = correlation(judged)
    found = Result.of_rows(
        name=Path(spec.path).name, sha256=sha256(Path(spec.path)), settings=spec.model_dump(mode="json"), rows=rows, about=about,
    )  # fmt: skip
    return Result(**{**found.__dict__, "scores": scores})


def calibration(differences: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """(the calibration error, by bin: mean confidence, share right, pairs) of differences of rewards [P], better less worse."""
    sure = 1 / (1 + np.exp(-np.abs(differences)))
    right = (np.sign(differences) + 1) / 2
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table = [
        {"confidence": float(sure[at].mean()), "right": float(right[at].mean()), "pairs": int(at.sum())}
        for at in (bins == b for b in range(BINS))
        if at.any()
    ]
    error = sum(row["pairs"] * abs(row["right"] - row["confidence"]) for row in table) / len(differences)
    return float(error), table


def _brier(differences: np.ndarray) -> np.ndarray:
    return np.square(1 / (1 + np.exp(differences)))


def correlation(judged: Sequence[Judged]) -> float | None:
    """Of reward and length, each less its mean over the prompt's answers; None where one of them does not vary."""
    rewards, lengths = (
        np.concatenate([x - x.mean() for x in some])
        for some in zip(*((j.rewards, j.lengths) for j in judged), strict=True)
    )
    spread = float(np.sqrt(np.square(rewards).sum() * np.square(lengths).sum()))
    return float((rewards * lengths).sum() / spread) if spread else None


def _row(one: Judged) -> Row:
    differences, longer = one.pairs()
    group = "" if len(longer) > 1 else ("lengths equal", "chosen longer", "chosen shorter")[int(np.sign(longer[0]))]
    shown = " ".join(f"{r:.3f}" for r in one.rewards)
    score = float(((np.sign(differences) + 1) / 2).mean())
    return Row(one.where, group, "", "preference", score, shown, " > ".join(f"{r:g}" for r in one.ranks))


def preferences_of(forest: Forest, spec: Preferences) -> tuple[list[Asked], Preference]:
    """The rows of a file, encoded; FettleError names the rows that cannot be used."""
    if forest.task not in ("causal", "classify") or forest.task == "classify" and forest.config.num_labels != 1:
        raise FettleError(
            f"{spec.path}: preferences need a language model or one with a head of one output, and {forest.spec.path} has "
            f"task: {forest.task}"
        )
    form = form_of(forest, "compared")
    assert isinstance(form, Preference)

    def encode(samples: Sequence[Sample]) -> list[Encoded | str]:
        return [_fitting(found, form.bound) for found in form.encode(Encoder(forest.tokenizer), samples)]

    return read_samples(spec, "preference", encode, *([in_turns] if spec.chat else [])), form


def _fitting(found: list[Encoded] | str, bound: int | None) -> Encoded | str:
    """A row's tokens, or why it has none."""
    if isinstance(found, str):
        return found
    longest = max(path_lengths(found[0]))
    if bound is not None and longest > bound:
        return f"an answer with its prompt has {longest} tokens, and the model sees {bound}"
    return found[0]


def _judged(forest: Forest, spec: Preferences, advance: Callable[..., None]) -> Iterator[Judged]:
    """Rows with the rewards of their answers."""
    asked, form = preferences_of(forest, spec)
    advance(0, len(asked))
    rewards = _rewards(forest, form, [a.encoded for a in asked], advance)
    for one, (figures, lengths) in zip(asked, rewards, strict=True):
        yield Judged(one.where, figures, lengths, one.encoded.labels[2:])


def path_lengths(encoded: Encoded) -> list[int]:
    """Tokens of the prompt with each of its answers."""
    ends = [*encoded.answers[1:], len(encoded.tokens)]
    return [max(encoded.split, 0) + stop - start for start, stop in zip(encoded.answers, ends, strict=True)]


@torch.no_grad()
def _rewards(
    forest: Forest, form: Preference, encoded: Sequence[Encoded], advance: Callable[..., None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rewards, lengths) of each example's answers, a row of examples at a time."""
    examples = [form.example(e, len(e.tokens)) for e in encoded]
    length = max(ROW, *map(len, examples))
    with evaluating(forest.model):
        for group in in_rows(examples, length):
            yield from _of_row(forest, group, length)
            advance(len(group))


def _of_row(forest: Forest, group: Sequence[Example], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    batch = pack(
        [Example(e.nodes, f"row {i}", e.extra) for i, e in enumerate(group)], length, forest.tokenizer.pad_token_id or 0
    )
    batch = batch.to(forest.device)
    sizes = [[int((n.weights > 0).sum()) for n in e.nodes if (n.weights > 0).any()] for e in group]
    if forest.task == "classify":
        flat = forest.scores(batch)[:, 0].double().cpu()
    else:
        parts = forest.logps(batch).double().cpu().split([n for some in sizes for n in some])
        flat = torch.stack([part.mean() for part in parts])
    for some, rewards in zip(sizes, flat.split([len(some) for some in sizes]), strict=True):
        yield rewards.numpy(), np.array(some, float)
