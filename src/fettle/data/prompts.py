"""Prompts to answer: the rows of any format up to where the model begins, with all that a row says besides, for a reward.

    {"messages": [..., {"role": "user", ...}], "answer": "42"}        what follows the last question is left off and kept as
    {"prompt": "2 + 2 =", "answer": "4"}                              the row's `answer`, unless it has one
    {"instruction": ..., "input": ...}        ShareGPT, CSV and the rest as for instruction tuning

Which prompts a phase takes is a pure function of (seed, place): sources are mixed as examples are (mix.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from fettle.core.errors import FettleError
from fettle.data.folders import left_out
from fettle.data.formats import Sample, conversed, detect, to_sample, unused_notes
from fettle.data.mix import Mixture
from fettle.data.parse import BadRow
from fettle.data.read import Row
from fettle.data.render import Job, worker
from fettle.data.rows import rows_of
from fettle.data.spec import DataSpec
from fettle.data.template import Encoder

LOOK, CHUNK, SHOWN = 32, 1024, 10
STAND_IN = "-"  # stands where an answer is missing, so that a row reads as one of instruction tuning
ANSWERS = {"alpaca": "output", "completion": "completion"}


@dataclass(frozen=True)
class Prompt:
    """One prompt: a conversation, or a text that is gone on from; its tokens, and the row's columns. `name` is file:line.

    `tools` are those that a conversation offers, as templates take them.
    """

    name: str
    asked: tuple[dict[str, Any], ...] | str
    tokens: np.ndarray  # int32 [n]
    facts: dict[str, Any]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def question(self) -> str:
        """What is asked, as text: the last message, or the text."""
        return self.asked if isinstance(self.asked, str) else str(self.asked[-1]["content"])


@dataclass(frozen=True)
class PromptCounts:
    """What became of one source."""

    source: str
    format: str
    read: int
    kept: int
    set_aside: int
    tokens: int
    longest: int
    per_epoch: int


class Prompts:
    """An endless sequence of prompts over one or more sources."""

    def __init__(self, sources: Sequence[Sequence[Prompt]], specs: Sequence[DataSpec], seed: int) -> None:
        self.sources = sources
        self.mixture = Mixture(specs, [len(source) for source in sources], seed)
        self.notes: list[str] = []
        self.counts: list[PromptCounts] = []
        self._orders: dict[int, np.ndarray] = {}

    @property
    def per_epoch(self) -> int:
        """Prompts of an epoch."""
        return self.mixture.per_epoch

    def at(self, place: int) -> Prompt:
        """The prompt at a place, from 0, of the endless sequence of epochs."""
        epoch, within = divmod(place, self.per_epoch)
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = self.mixture.order(epoch)
        source, index = self._orders[epoch][within]
        return self.sources[int(source)][int(index)]

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.tokens) for source in self.sources for prompt in source)

    def describe(self) -> list[dict[str, Any]]:
        """The counts of each source, as plain values."""
        return [asdict(c) for c in self.counts]

    def table(self) -> Table:
        """The counts of each source, to print."""
        table = Table(title="prompts", title_justify="left", title_style="bold")
        for head in ("source", "rows\nread", "kept", "set\naside", "tokens", "longest", "an epoch"):
            table.add_column(head, justify="left" if head == "source" else "right", overflow="fold")
        for c in self.counts:
            numbers = (c.read, c.kept, c.set_aside, c.tokens, c.longest, c.per_epoch)
            table.add_row(f"{c.source}\n{c.format}", *(f"{n:,}" for n in numbers))
        return table


def read_prompts(
    specs: Sequence[DataSpec],
    tokenizer: Any,
    room: int,
    seed: int = 0,
    lack: Callable[[dict[str, Any]], str | None] = lambda row: None,
    keys: str = "rollouts.max_tokens in batch.tokens",
) -> Prompts:
    """The prompts of all sources, in memory. A prompt of more than `room` tokens is set aside, as are bad rows.

    `keys` says what leaves that room, as a sentence about a prompt ends.

    So are rows of which `lack` says why they cannot be used. FettleError where a source has too many of them, or none that can.
    """
    if not specs:
        raise FettleError("data: no source is given")
    encoder, found, notes, counts = Encoder(tokenizer), [], [], []
    for spec in specs:
        reader = _Reader(spec, encoder, room, lack, keys)
        reader.run(rows_of(spec))
        found.append(reader.prompts)
        notes += reader.notes
        counts.append(reader.counts())
    prompts = Prompts(found, specs, seed)
    prompts.notes = notes + prompts.mixture.notes
    prompts.counts = [
        PromptCounts(**c, per_epoch=count) for c, count in zip(counts, prompts.mixture.counts(0).tolist(), strict=True)
    ]
    return prompts


class _Reader:
    """One source on its way into memory."""

    def __init__(
        self, spec: DataSpec, encoder: Encoder, room: int, lack: Callable[[dict[str, Any]], str | None], keys: str
    ) -> None:
        self.spec, self.encoder, self.room, self.lack, self.keys = spec, encoder, room, lack, keys
        self.format, self.read = "", 0
        self.unused: Counter[str] = Counter()
        self.prompts: list[Prompt] = []
        self.problems: list[str] = []
        self.notes = left_out(spec.path)

    def run(self, rows: Iterable[Row]) -> None:
        """Read every row; FettleError where too many are bad."""
        taken = list(rows)
        self.format = self._format(taken[:LOOK])
        for i in range(0, len(taken), CHUNK):
            self._chunk(taken[i : i + CHUNK])
        self.read = len(taken)
        bad, path = len(self.problems), self.spec.path
        if bad > self.spec.max_bad * self.read or not self.prompts:
            more = f"\n  ... and {bad - SHOWN} more" if bad > SHOWN else ""
            raise FettleError(
                f"{path}: {bad} of {self.read} rows cannot be used as prompts, more than max_bad: {self.spec.max_bad:g} allows; mend them, "
                f"or raise it" + "".join(f"\n  {p}" for p in self.problems[:SHOWN]) + more
            )
        self.notes += unused_notes(path, self.unused)
        if bad:
            lost = [f"{row.where}: {row.problem}" for row in taken if row.lost]
            self.notes += [
                *dict.fromkeys([*self.problems[:SHOWN], *lost]),
                f"{path}: {bad} of {self.read} rows set aside",
            ]

    def counts(self) -> dict[str, Any]:
        """The fields of PromptCounts but for the share."""
        lengths = [len(p.tokens) for p in self.prompts]
        return {
            "source": self.spec.path, "format": self.format, "read": self.read, "kept": len(self.prompts),
            "set_aside": len(self.problems), "tokens": sum(lengths), "longest": max(lengths),
        }  # fmt: skip

    def _format(self, first: Sequence[Row]) -> str:
        if self.spec.template is not None:
            return "template"
        if self.spec.format != "auto":
            return self.spec.format
        values = [row.value for row in first if row.value is not None]
        if not values:
            why = f"; {first[0].where}: {first[0].problem}" if first else "; it holds no rows"
            raise FettleError(f"{self.spec.path}: no row can be read, so its format is not known{why}")
        for value in values:
            for name, key in ANSWERS.items():
                if {"alpaca": "instruction", "completion": "prompt"}[name] in value and "messages" not in value:
                    return name if key in value or name == "completion" else "alpaca"
        return detect(values, self.spec.path)

    def _chunk(self, rows: Sequence[Row]) -> None:
        asked: list[tuple[Row, Sample, Any]] = []
        texts = self._templated(rows) if self.format == "template" else [""] * len(rows)
        for row, text in zip(rows, texts, strict=True):
            try:
                if row.value is None:
                    raise BadRow(row.problem or "")
                asked.append((row, *self._asked(row.value, text)))
            except BadRow as problem:
                self.problems.append(f"{row.where}: {problem}")
        talks = [(sample.messages[:-1], sample.tools) for _, sample, _ in asked if sample.messages]
        rendered = iter(self.encoder.renders(talks) if talks else [])
        for row, sample, answer in asked:
            if not sample.messages:
                tokens = [*self.encoder.prefix, *self.encoder.ids(sample.prompt)]
            else:
                found = next(rendered)
                if found.error:
                    self.problems.append(f"{row.where}: {found.error}")
                    continue
                tokens = self.encoder.ids(found.text)
            if not 0 < len(tokens) <= self.room:
                self.problems.append(
                    f"{row.where}: the prompt has {len(tokens)} tokens, and there is room for {self.room} before an answer of "
                    + self.keys
                )
                continue
            facts = dict(row.value or {})
            if facts.get("answer") is None and answer is not None:
                facts["answer"] = answer
            if why := self.lack(facts):
                self.problems.append(f"{row.where}: {why}")
                continue
            self.unused[sample.unused] += 1
            talk, tools = (sample.messages[:-1], sample.tools) if sample.messages else (sample.prompt, ())
            self.prompts.append(Prompt(row.where, talk, np.array(tokens, dtype=np.int32), facts, tools))

    def _templated(self, rows: Sequence[Row]) -> list[str]:
        """The recipe's own template over each row; '' where a row cannot be read."""
        jobs = [Job(self.spec.template or "", row.value or {}, strict=row.value is not None) for row in rows]
        return [r.error and f"\0{r.error}" or r.text for r in worker(self.encoder.now).render(jobs)]

    def _asked(self, row: dict[str, Any], text: str) -> tuple[Sample, Any]:
        """(the prompt, with an answer or what stands in for it; the row's own answer or None). BadRow where there is none."""
        answer: Any = None
        if self.format == "template":
            if text.startswith("\0"):
                raise BadRow(text[1:])
            prompt, _, rest = (part.strip() for part in text.partition("|||"))
            answer = rest or None
            row = {"prompt": prompt, "completion": STAND_IN}
        elif self.format in ("alpaca", "completion"):
            key = ANSWERS[self.format]
            given = row.get(key, row.get("response")) if self.format == "completion" else row.get(key)
            answer, row = given or None, row | {key: given or STAND_IN}
            if isinstance(row.get("prompt"), list):
                turns = [{"role": "assistant", "content": STAND_IN}]
                answer = given[0].get("content") if isinstance(given, list) and given else given
                row = row | {key: given if isinstance(given, list) else turns}
        else:
            row = _answered(row)
        sample = to_sample(row | {"weight": None}, "completion" if self.format == "template" else self.format)
        if sample.kind == "completion":
            wanted = self.format == "template" if self.spec.chat is None else self.spec.chat
            return conversed(sample) if wanted else sample, answer
        if sample.kind != "chat":
            raise BadRow(f"format: {self.format} holds no prompts")
        last = sample.messages[-1]["content"]
        return sample, answer if answer is not None or last in ("", STAND_IN) else last


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """A row of messages that ends with a question, with a stand-in for the answer."""
    key = next((k for k in ("messages", "conversations", "conversation") if isinstance(row.get(k), list)), "messages")
    turns = row.get(key)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
        return row
    said, text = ("from", "value") if "from" in turns[-1] else ("role", "content")
    if turns[-1].get(said) in ("assistant", "gpt", "model", "chatgpt"):
        return row
    return row | {key: [*turns, {said: "assistant" if said == "role" else "gpt", text: STAND_IN}]}
