"""The generation engine: R rows advance together, one token a step, and a row whose answer ends goes to the next request.

    waiting ── read: prompts packed in one row, each once ── place: copied into the rows of its answers ─┐
       ▲                                                                                                  ▼
       └──────────── a row is free ◄── the answer ends ◄── choose ◄── logits ◄── step: one token a row ◄──┘

A prompt is read without its last token, which is the first that its rows step over: so every token of an answer comes from a
step, and the n answers to one prompt share all that was read. Reading runs a forest batch, in which nothing is padded. Rows in
use are always the first ones: what no longer waits for anything takes no part in a step.

Shapes: R rows that there is room for, B rows in use, H query heads, K key heads, G = H / K, D size of a key, E size of a value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.batch import Example, Node, pack
from fettle.generate.cache import Cache, Layer, Name, Names
from fettle.generate.choose import Chooser
from fettle.generate.request import Limits, Request
from fettle.models import attention, prompt
from fettle.models.plan import rounded
from fettle.models.proof import PROVEN, TOLERANCE
from fettle.models.scores import first_position
from fettle.models.still import still

if TYPE_CHECKING:
    from fettle.models.forest import Forest

AHEAD = {"cpu": 512, "cuda": 4096}  # tokens of prompts that are read at once, and then wait for rows


def obstacle(forest: Forest) -> str | None:
    """Why the engine cannot serve a model, which padded.py then does; None where it can. The one place that decides."""
    if forest.config.is_encoder_decoder:
        return "is an encoder-decoder"
    if forest.backend == "paths":
        return "has no attention interface, behind which the cache stands"
    if forest.config.model_type not in PROVEN and not _tried(forest):
        return "computes something else, a token at a time, than for a whole text"
    return None


_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _tried(forest: Forest) -> bool:
    """Whether an architecture nobody tried here gives the same logits by steps as in a batch; tried once a model."""
    if forest.model not in _found:
        apart, was_training = float("inf"), forest.model.training
        forest.model.eval()
        try:
            apart = _apart(forest)
        except (FettleError, RuntimeError, TypeError, ValueError):  # whatever a model may say of what it does not take
            pass
        finally:
            forest.model.train(was_training)
        _found[forest.model] = apart <= TOLERANCE.get(forest.dtype, 0.2)
    return _found[forest.model]


@torch.no_grad()
def _apart(forest: Forest) -> float:
    """How far the logits of a few steps lie from those of the same text in a batch, as a share of their spread."""
    tokens = np.random.default_rng(0).integers(0, forest.config.get_text_config().vocab_size, 12)
    node = Node(tokens.astype(np.int32), np.zeros(len(tokens), np.float32))
    whole = forest.logits(
        pack([Example((node,), "a text")], rounded(len(tokens)), 0), torch.arange(5, len(tokens))
    ).float()
    rows, found = Rows(forest, [Request(0, tokens[:6].tolist(), 0, len(tokens))], 1), []
    for token in (*tokens[6:].tolist(), 0):
        found.append(rows.step())
        rows.push([token])
    return float((torch.cat(found).float() - whole).abs().max() / whole.std())


def run(forest: Forest, requests: Sequence[Request], bounds: Limits, rows: int) -> Iterator[Request]:
    """Answer the requests, up to `rows` at once and in their order; yields each as it ends."""
    most = max(r.most for r in requests)
    was_training = forest.model.training
    forest.model.eval()
    try:
        table = Rows(forest, requests, rows)
        chooser: Chooser | None = None
        while table.live:
            logits = table.step()
            if chooser is None:
                chooser = Chooser(bounds.sampling, logits, table.live, most)
            chosen, logps = chooser.choose(logits, [len(r.tokens) for r in table.live])
            tokens = chosen.tolist()
            for request, token, logp in zip(table.live, tokens, logps.tolist(), strict=True):
                bounds.take(request, token, logp)
            table.push(tokens)
            yield from table.turn_over(chooser)
    finally:
        forest.model.train(was_training)


@dataclass(frozen=True)
class Beginning:
    """What was read of a prompt: for each layer its keys [K, n, D] and values [K, n, E], a soft prompt's in front."""

    states: tuple[tuple[Layer, Tensor, Tensor], ...]
    length: int


class Rows:
    """Rows of a cache, the requests that they belong to, and those that wait. `live[b]` is the request of row b < B."""

    def __init__(self, forest: Forest, requests: Sequence[Request], rows: int) -> None:
        self.forest, self.head = forest, forest.head
        self.body = forest.model.base_model
        self.front = prompt.active(forest.model)
        self.shift = 0 if self.front is None else self.front.length
        self.first = first_position(forest.model)
        # A finished mask, so that transformers makes none; `Step` attends by what it knows itself.
        self.mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=forest.device)
        self.derived: dict[Hashable, object] = {}  # by layers, of their weights
        self.waiting = deque(requests)
        self.answers: dict[tuple[int, ...], int] = {}  # how many rows each prompt still goes to
        for request in requests:
            key = tuple(request.prompt)
            self.answers[key] = self.answers.get(key, 0) + 1
        self.read: dict[tuple[int, ...], Beginning] = {}
        rows = min(rows, len(requests))
        self.cache = Cache(rows, self.shift + max(len(r.prompt) + r.most for r in requests))
        self.live: list[Request] = []
        self.tokens = np.zeros(rows, np.int64)  # the next token of each row
        self.places = np.zeros(rows, np.int64)  # where it stands, a soft prompt counted
        while len(self.live) < rows and self.waiting:
            self.live.append(self.waiting[0])
            self._place(len(self.live) - 1)

    def step(self) -> Tensor:
        """Logits [B, V] after the next token of each row in use, whose keys and values are then in the cache.

        Where none wait for the rows that ended, steps become a quarter as large, and a quarter again: every size costs a CPU's
        matrix library time and memory once. The rows that fill one up are nobody's.
        """
        count, size = len(self.live), self.cache.rows
        while size >= 4 * count:
            size = -(-size // 4)
        self.tokens[count:size] = self.places[count:size] = 0
        self.cache.fit(rounded(int(self.places[:count].max()) + 1))
        device = self.forest.device
        tokens, places = (torch.from_numpy(a[:size].copy()).to(device) for a in (self.tokens, self.places))
        step = Step(self.cache, places)
        at = places[:, None] + self.first
        with torch.no_grad(), self._without_front(), attention.stepping(step), still(self.derived):
            out = self.body(input_ids=tokens[:, None], position_ids=at, attention_mask=self.mask, use_cache=False)
            return self.head.logits(out.last_hidden_state[:count, 0])

    @contextmanager
    def _without_front(self) -> Iterator[None]:
        """Within it the soft prompt, which is in the cache, does not put itself before each new token."""
        if self.front is None:
            yield
            return
        self.front.enabled = False
        try:
            yield
        finally:
            self.front.enabled = True

    def push(self, tokens: Sequence[int]) -> None:
        """What each row in use goes on with."""
        self.tokens[: len(tokens)] = tokens
        self.places[: len(tokens)] += 1

    def turn_over(self, chooser: Chooser) -> Iterator[Request]:
        """The requests that have ended; their rows go to those that wait, and where none does, to the last rows in use."""
        ended = [row for row, request in enumerate(self.live) if request.reason]
        for row in reversed(ended):
            yield self.live[row]
            if self.waiting:
                self.live[row] = self.waiting[0]
                self._place(row)
                chooser.place(row, self.live[row])
                continue
            last = self.live.pop()
            if row < len(self.live):
                source = len(self.live)
                self.live[row] = last
                self.tokens[row], self.places[row] = self.tokens[source], self.places[source]
                self.cache.move(source, row)
                chooser.move(source, row)

    def _place(self, row: int) -> None:
        """Give a row to the request that waits first."""
        request = self.waiting[0]
        key = tuple(request.prompt)
        if key not in self.read and (len(key) > 1 or self.shift):
            self._read()
        self.waiting.popleft()
        self.tokens[row], self.places[row] = key[-1], self.shift + len(key) - 1
        self.answers[key] -= 1
        beginning = self.read.get(key) if self.answers[key] else self.read.pop(key, None)
        if beginning is not None:
            self.cache.fit(max(self.cache.places, rounded(beginning.length + 1)))
            for layer, keys, values in beginning.states:
                layer.place(row, keys, values)

    @torch.no_grad()
    def _read(self) -> None:
        """Read the prompt that waits first, and those behind it that fit into a row of AHEAD tokens, each once."""
        keys: list[tuple[int, ...]] = []
        room = AHEAD.get(self.forest.device.type, 512)
        for request in self.waiting:
            key = tuple(request.prompt)
            if key in self.read or key in keys or len(key) == 1 and not self.shift:
                continue
            if keys and len(key) > room:
                break
            keys.append(key)
            room -= len(key)
        parts = [np.array(key[:-1] or key, np.int32) for key in keys]
        examples = [Example((Node(part, np.zeros(len(part), np.float32)),), "prompt") for part in parts]
        batch = pack(examples, rounded(sum(map(len, parts))), 0)
        found: dict[Name, tuple[Tensor, Tensor, int | None]] = {}
        names = Names()

        def keep(module: nn.Module, key: Tensor, value: Tensor, window: int | None) -> None:
            found[names.next(module)] = key, value, window

        with attention.keeping(keep):
            self.forest.hidden(batch)
        for key, segment in zip(keys, batch.segments, strict=False):
            self.read[key] = self._beginning(found, segment.start, len(key) - 1)

    def _beginning(self, found: dict[Name, tuple[Tensor, Tensor, int | None]], start: int, length: int) -> Beginning:
        """Of what the layers made of a row: the soft prompt in front, and the `length` tokens from `start`."""
        states = []
        for name, (key, value, window) in found.items():
            layer = self.cache.layer(name, key, value, window)
            at = slice(self.shift + start, self.shift + start + length)
            if self.shift:
                keys, values = (torch.cat([x[0, :, : self.shift], x[0, :, at]], 1) for x in (key, value))
            else:
                keys, values = key[0, :, at], value[0, :, at]
            states.append((layer, keys, values))
        return Beginning(tuple(states), self.shift + length)


class Step:
    """What attention does for one token a row: write its key and value at `places` [B], and attend to all before it."""

    def __init__(self, cache: Cache, places: Tensor) -> None:
        self.cache, self.places = cache, places
        self.rows = torch.arange(len(places), device=places.device)
        self.names = Names()
        self.biases: dict[tuple[int, int], Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """[B, 1, H, E] from query [B, H, 1, D], key [B, K, 1, D], value [B, K, 1, E]."""
        if query.shape[2] != 1 or len(query) != len(self.places):
            raise FettleError(f"{type(module).__name__} does not take one token a row, which generation is made of")
        layer = self.cache.layer(self.names.next(module), key, value, window)
        layer.write(self.rows, self.places, key[:, :, 0], value[:, :, 0])
        keys, values = layer.read(len(query))
        q = query.reshape(len(keys), -1, query.shape[3])
        bias = self._bias(layer.heads, keys.shape[1], q.dtype)
        if softcap is None:
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=scale)
        else:
            scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap).add_(bias)
        return torch.bmm(scores.softmax(-1), values).view(len(query), 1, query.shape[1], -1)

    def _bias(self, heads: int, slots: int, dtype: torch.dtype) -> Tensor:
        """[B*K, 1, S]: -inf where a slot holds nothing of the row's."""
        if (heads, slots) not in self.biases:
            empty = torch.arange(slots, device=self.places.device) > self.places[:, None]
            bias = torch.zeros(empty.shape, dtype=dtype, device=empty.device).masked_fill_(empty, -torch.inf)
            self.biases[heads, slots] = bias.repeat_interleave(heads, 0)[:, None]
        return self.biases[heads, slots]
