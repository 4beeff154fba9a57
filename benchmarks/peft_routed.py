"""A batch whose requests use different adapters: at once, and one adapter at a time.

read      one forward pass over the texts, as to score them
answer    greedy tokens after them, as to serve them; none ends early
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import clock, fail, in_turn
from benchmarks.peft_arms import RANK, opened
from fettle.core.batch import Batch, Example, Node, pack
from fettle.generate import Sampling
from fettle.generate.padded import run
from fettle.generate.request import Request, limits
from fettle.models.select import linears
from fettle.models.weight import in_out
from fettle.peft.adapters import Adapters
from fettle.peft.combine import Update, Updates

TOLERANCE = 1e-4  # of hidden states in float32, relative to the largest


def route(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each way, in turn, in bfloat16; in float32 first, where both ways must give the same."""
    apart = Routed(job, "float32").check()
    it = Routed(job, "bfloat16")
    read = {"together": it.read_together, "alone": it.read_alone}
    answer = {"together": it.answer_together, "alone": it.answer_alone}
    return {"apart": apart, "read": timed(read, job["pairs"], it.cuda), "answer": timed(answer, job["pairs"], it.cuda)}


def timed(ways: Mapping[str, Callable[[], Any]], pairs: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of each way, in turn; one turn more, the first, warms up."""

    def seconds(way: Callable[[], Any]) -> dict[str, Any]:
        began = clock(cuda)
        way()
        return {"seconds": clock(cuda) - began}

    turns = in_turn(pairs + 1, {name: partial(seconds, way) for name, way in ways.items()})
    return {name: [turn["seconds"] for turn in of[1:]] for name, of in turns.items()}


class Routed:
    """`requests` texts of `length` tokens, request i with adapter i modulo G, and the two ways to run them."""

    def __init__(self, job: dict[str, Any], dtype: str) -> None:
        self.forest, self.new = opened(job, dtype), job["new"]
        self.cuda = self.forest.device.type == "cuda"
        numbers = torch.Generator().manual_seed(0)
        names = [f"adapter {g}" for g in range(job["adapters"])]
        self.adapters = Adapters(self.forest, {name: self._drawn(numbers) for name in names})
        self.owners = [names[i % len(names)] for i in range(job["requests"])]
        self.texts = torch.randint(
            5, self.forest.config.vocab_size, (job["requests"], job["length"]), generator=numbers
        )
        self.whole = self._row(range(len(self.texts)))
        self.groups = {name: [i for i, owner in enumerate(self.owners) if owner == name] for name in names}
        self.rows = {name: self._row(group) for name, group in self.groups.items()}

    def _drawn(self, numbers: torch.Generator) -> Updates:
        """An adapter that moves every layer's output by about as much as there is of it."""
        found = {}
        for layer, module in linears(self.forest.model).items():
            inputs, outputs = in_out(module)
            a, b = (torch.randn(shape, generator=numbers) for shape in ((RANK, inputs), (outputs, RANK)))
            found[layer] = Update(*(t.to(self.forest.device) / inputs**0.5 for t in (a, b)))
        return found

    def _row(self, which: Sequence[int]) -> Batch:
        texts = [self.texts[i].numpy().astype(np.int32) for i in which]
        examples = [Example((Node(text, np.zeros(len(text), np.float32)),), str(i)) for i, text in zip(which, texts)]
        return pack(examples, sum(map(len, texts)), 0).to(self.forest.device)

    @torch.no_grad()
    def read_together(self) -> Tensor:
        """Last hidden states [requests, length, C], one pass."""
        self.adapters.route(self.whole, self.owners)
        return self.forest.hidden(self.whole).view(*self.texts.shape, -1)

    @torch.no_grad()
    def read_alone(self) -> Tensor:
        """The same, a pass an adapter."""
        out: Tensor | None = None
        for name, group in self.groups.items():
            self.adapters.use(name)
            hidden = self.forest.hidden(self.rows[name]).view(len(group), self.texts.shape[1], -1)
            out = hidden.new_empty(*self.texts.shape, hidden.shape[-1]) if out is None else out
            out[group] = hidden
        assert out is not None
        return out

    def answer_together(self) -> list[list[int]]:
        """The greedy tokens of every request, all rows in one batch."""
        self.adapters.route_rows(self.owners)
        return self._answers(range(len(self.texts)))

    def answer_alone(self) -> list[list[int]]:
        """The same, a batch an adapter."""
        out: dict[int, list[int]] = {}
        for name, group in self.groups.items():
            self.adapters.use(name)
            out |= dict(zip(group, self._answers(group), strict=True))
        return [out[i] for i in range(len(self.texts))]

    def _answers(self, which: Sequence[int]) -> list[list[int]]:
        requests = [Request(i, self.texts[i].tolist(), i, self.new) for i in which]
        for _ in run(self.forest, requests, limits(self.forest, Sampling(), ends=frozenset())):
            pass
        return [request.tokens for request in requests]

    def check(self) -> float:
        """How far the hidden states of both ways are apart, relative to the largest.

        Ends the benchmark where they or the answers differ, or where the adapters change nothing.
        """
        together, alone = self.read_together(), self.read_alone()
        self.adapters.use(None)
        with torch.no_grad():
            base = self.forest.hidden(self.whole).view_as(alone)
        apart, moved = (float((other - alone).abs().max() / alone.abs().max()) for other in (together, base))
        if not apart < TOLERANCE < moved:
            fail(f"{len(self.groups)} adapters: states are {apart:.2g} apart, and {moved:.2g} from the base's")
        if self.answer_together() != self.answer_alone():
            fail(f"{len(self.groups)} adapters: the answers are not those of one adapter at a time")
        return apart
