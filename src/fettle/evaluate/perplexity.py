"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

    window k sees tokens [k S, k S + C); it scores those that no window before it scored (the last S, all C - 1 for the first)

C context, S stride. A number of perplexity means nothing without C, S and how documents were joined, so all stand in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orjson
import torch
from pydantic import Field, model_validator

from fettle.core import FettleError
from fettle.core.batch import Batch, Example, Node, pack
from fettle.evaluate.interval import Score, ratio_interval
from fettle.evaluate.tasks import Evaluation, sampled
from fettle.models.roles import evaluating

if TYPE_CHECKING:
    from fettle.models.forest import Forest

DEFAULT = 1024  # tokens of context, where neither the spec nor the model says less


class Perplexity(Evaluation):
    """Perplexity of a plain text file (one document) or a JSONL file with a `text` in each row."""

    kind: Literal["perplexity"] = "perplexity"
    context: int | None = Field(
        None, ge=2, description="tokens that a window sees; the model's context, at most 1024, where left out"
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens between windows; the context less one where left out (each token once, least work)",
    )
    join: Literal["stream", "documents"] = Field(
        "stream",
        description="'stream' joins documents by the end token into one text; 'documents' scores each by itself",
    )

    @model_validator(mode="after")
    def _stride_below_context(self) -> Perplexity:
        if self.stride is not None and self.context is not None and self.stride >= self.context:
            raise ValueError(
                f"stride {self.stride} is not below context {self.context}; windows have to overlap by a token at least"
            )
        return self

    def examples(self) -> list[str]:
        """The documents of the file, in order."""
        path = Path(self.path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FettleError(f"{path}: no such text file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise FettleError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        if path.suffix == ".jsonl":
            documents = [_text(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            documents = [text]
        if not any(documents):
            raise FettleError(f"{path}: no text in it")
        return sampled([d for d in documents if d], self.limit, self.seed)


def _text(line: str, where: str) -> str:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise FettleError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise FettleError(f"{where}: expected an object with a text 'text'")
    return str(row["text"])


@dataclass(frozen=True)
class Window:
    """Token ids of which the last `scored` count."""

    tokens: tuple[int, ...]
    scored: int


def windows(tokens: Sequence[int], context: int, stride: int) -> list[Window]:
    """Every token but the first is scored exactly once, by the window that sees most before it."""
    found, done = [], 1
    for start in range(0, max(1, len(tokens) - 1), stride):
        stop = min(start + context, len(tokens))
        if stop > done:
            found.append(Window(tuple(tokens[start:stop]), stop - done))
            done = stop
        if stop == len(tokens):
            break
    return found


def tokenized(forest: Forest, documents: Sequence[str], join: str) -> list[list[int]]:
    """The token streams to score. A start token stands first where the tokenizer has one, so that the first word counts too."""
    tokenizer = forest.tokenizer
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    bodies = [tokenizer.encode(d, add_special_tokens=False) for d in documents]
    if join == "documents":
        return [[*bos, *body] for body in bodies]
    between = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    joined = [token for i, body in enumerate(bodies) for token in ([*between, *body] if i else body)]
    return [[*bos, *joined]]


def windows_of(forest: Forest, spec: Perplexity) -> tuple[list[Window], dict[str, Any]]:
    """The windows of a text, and what they are: context, stride, join, documents, windows, tokens, bytes.

    FettleError where the model cannot see so much, or where there is nothing to score.
    """
    bound = forest.context
    context = spec.context or min(bound or DEFAULT, DEFAULT)
    if bound and context > bound:
        raise FettleError(
            f"{spec.path}: perplexity with context {context}, but the model sees {bound} tokens at most; lower context"
        )
    stride = spec.stride or context - 1
    if stride >= context:
        raise FettleError(f"{spec.path}: perplexity with stride {stride}, but the context is {context}; lower stride")
    documents = spec.examples()
    rows = [w for stream in tokenized(forest, documents, spec.join) for w in windows(stream, context, stride)]
    if not rows:
        raise FettleError(f"{spec.path}: not one token to score")
    about = {
        "context": context, "stride": stride, "join": spec.join, "documents": len(documents), "windows": len(rows),
        "tokens": sum(w.scored for w in rows), "bytes": sum(len(d.encode()) for d in documents),
    }  # fmt: skip
    return rows, about


def window_batch(window: Window, length: int, pad: int) -> Batch:
    """One window as a batch of `length` tokens, which learns what it scores."""
    weights = np.zeros(len(window.tokens), np.float32)
    weights[-window.scored :] = 1
    return pack([Example((Node(np.array(window.tokens, np.int32), weights),), "window")], length, pad)


def perplexity(
    forest: Forest, spec: Perplexity, progress: Callable[..., None] | None = None
) -> tuple[Score, dict[str, Any]]:
    """(perplexity with its interval over windows, what was measured and how)."""
    rows, about = windows_of(forest, spec)
    sums = window_losses(forest, rows, progress)
    counts = [w.scored for w in rows]
    nats = ratio_interval(sums, counts, spec.seed)
    total, size = math.fsum(sums), about["bytes"]
    about |= {"nats": total, "bits_per_byte": total / math.log(2) / size}
    low, high = (None if edge is None else math.exp(edge) for edge in (nats.low, nats.high))
    return Score(math.exp(nats.mean), low, high, nats.n), about


@torch.no_grad()
def window_losses(forest: Forest, rows: Sequence[Window], progress: Callable[..., None] | None = None) -> list[float]:
    """Sum of negative log-likelihoods of the scored tokens of each window, in nats. One window a batch of fixed length."""
    length = max(len(w.tokens) for w in rows)
    pad = forest.tokenizer.pad_token_id or 0
    if progress:
        progress(0, len(rows))
    sums = []
    with evaluating(forest.model):
        for window in rows:
            batch = window_batch(window, length, pad)
            sums.append(-forest.logps(batch.to(forest.device)).double().sum().item())
            if progress:
                progress(1)
    return sums
