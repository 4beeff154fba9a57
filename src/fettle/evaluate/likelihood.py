"""Log-likelihoods of given answers: the prompt is computed once, and its choices are children of it in the forest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fettle.core import FettleError
from fettle.core.batch import IGNORE, Batch, Example, Node, in_rows, pack
from fettle.data.pairs import Dress, Pairs
from fettle.models.encdec import start_token
from fettle.models.roles import evaluating

if TYPE_CHECKING:
    from fettle.models.forest import Forest

ROW = 2048  # tokens of a batch, unless an example needs more
CHUNK = 256  # rows of logits at a time


@dataclass(frozen=True)
class Question:
    """A text before its continuations, as token ids: path j is `prompt + paths[j]`, of which the last `scored[j]` count."""

    prompt: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    scored: tuple[int, ...]
    where: str


def question(encode: Callable[[str], list[int]], text: str, choices: Sequence[str], where: str) -> Question:
    """Tokenize each `text + choice` as a whole; what differs from the tokens of `text` alone is scored.

    So a choice that merges with the end of the text is scored with the token that both share, as it would be in training.
    """
    alone, wholes = encode(text), [encode(text + choice) for choice in choices]
    starts = [_shared(alone, whole) for whole in wholes]
    return from_tokens([(whole[:n], whole[n:]) for whole, n in zip(wholes, starts, strict=True)], where)


def from_tokens(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], where: str) -> Question:
    """(context, continuation) token ids; the contexts may differ in length but share their beginning."""
    if any(not context for context, _ in pairs):
        raise FettleError(
            f"{where}: nothing stands before the answer; the first token cannot be scored without a start token"
        )
    shared = min(len(context) for context, _ in pairs)
    first = list(pairs[0][0][:shared])
    if any(list(context[:shared]) != first for context, _ in pairs):
        raise FettleError(f"{where}: the choices have different prompts")
    if not all(rest for _, rest in pairs):
        raise FettleError(f"{where}: a choice has no tokens")
    wholes = [[*context, *rest] for context, rest in pairs]
    return Question(
        tuple(first), tuple(tuple(w[shared:]) for w in wholes), tuple(len(rest) for _, rest in pairs), where
    )


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, at most one less than `b`, so that something is left to score."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return min(same, len(b) - 1)


def tree(asked: Question, name: str) -> Example:
    """The prompt less its last token, and a child for each path: that token, then the path."""
    *above, last = asked.prompt
    nodes = [Node(np.array(above, np.int32), np.zeros(len(above), np.float32))] if above else []
    for path, scored in zip(asked.paths, asked.scored, strict=True):
        nodes.append(_written([last, *path], scored, parent=0 if above else -1))
    return Example(tuple(nodes), name)


def pair_tree(asked: Question, name: str, source: Dress, target: Dress, start: int) -> Example:
    """For an encoder-decoder: the prompt as its source, and a child for each path, behind the decoder's start token."""
    read = source.on(asked.prompt)
    nodes = [Node(np.array(read, np.int32), np.zeros(len(read), np.float32), causal=False)]
    for path, scored in zip(asked.paths, asked.scored, strict=True):
        nodes.append(_written([start, *target.before, *path], scored, parent=0))
    return Example(tuple(nodes), name)


def _written(tokens: Sequence[int], scored: int, parent: int) -> Node:
    """A node that reads all tokens but the last, and predicts the last `scored`, each where the one before it stands."""
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[-scored:] = 1
    return Node(np.array(tokens[:-1], np.int32), weights, parent, marks=np.array(tokens[1:], np.int64))


def likelihoods(
    forest: Forest, questions: Sequence[Question], progress: Callable[[int], None] | None = None, *, top: bool = False
) -> list[list[tuple[float, bool]]]:
    """For each path of each question (sum of log-probabilities in nats, whether every token is the likeliest).

    The second is computed only where `top` is asked for, and False elsewhere. FettleError names a question over the context.
    """
    require_room(forest, questions)
    found: list[list[tuple[float, bool]]] = [[] for _ in questions]
    with evaluating(forest.model):
        for group, batch in _batches(forest, questions):
            sums, tops = _by_segment(forest, batch, top)
            scored = [s for s in range(len(batch.segments)) if batch.names[s] and s in sums]
            for s in scored:
                found[int(batch.names[s])].append((sums[s], tops[s]))
            if progress:
                progress(group)
    return found


def require_room(forest: Forest, questions: Sequence[Question]) -> None:
    """FettleError names a question that is longer than the model's context; the last token is predicted, never read."""
    bound = forest.context
    for asked in questions:
        read = len(asked.prompt) + max(map(len, asked.paths)) - 1
        if bound and read > bound:
            raise FettleError(
                f"{asked.where}: {read} tokens before the last, and the model sees {bound} at most; shorten the row or show "
                "fewer shots"
            )


def _batches(forest: Forest, questions: Sequence[Question]) -> Iterator[tuple[int, Batch]]:
    if forest.config.is_encoder_decoder:
        dress, start = Pairs.of(forest.tokenizer, None), start_token(forest.model)
        trees = [pair_tree(asked, str(i), dress.source, dress.target, start) for i, asked in enumerate(questions)]
    else:
        trees = [tree(asked, str(i)) for i, asked in enumerate(questions)]
    length = max(ROW, -(-max(map(len, trees), default=1) // 64) * 64)
    pad = forest.tokenizer.pad_token_id or 0
    for group in in_rows(trees, length):
        yield len(group), pack(group, length, pad).to(forest.device)


@torch.no_grad()
def _by_segment(forest: Forest, batch: Batch, top: bool) -> tuple[dict[int, float], dict[int, bool]]:
    """Sums of target log-probabilities by segment, for the segments that have targets."""
    positions = torch.nonzero(batch.targets != IGNORE)[:, 0]
    targets = batch.targets[positions]
    hidden = forest.hidden(batch)[positions]
    logps = forest.head.logps(hidden, targets).double().tolist()
    right = is_top(forest, hidden, targets).tolist() if top else [False] * len(logps)
    starts = torch.tensor([s.start for s in batch.segments])
    owner = (torch.searchsorted(starts, positions.cpu(), right=True) - 1).tolist()
    sums: dict[int, float] = {}
    tops: dict[int, bool] = {}
    for segment, logp, ok in zip(owner, logps, right, strict=True):
        sums[segment] = sums.get(segment, 0.0) + logp
        tops[segment] = tops.get(segment, True) and ok
    return sums, tops


def is_top(forest: Forest, hidden: Tensor, targets: Tensor) -> Tensor:
    """bool [N]: whether each target is the model's likeliest token after its hidden state [N, C]."""
    pieces = [
        forest.head.logits(hidden[i : i + CHUNK]).argmax(-1) == targets[i : i + CHUNK]
        for i in range(0, len(targets), CHUNK)
    ]
    return torch.cat(pieces)
