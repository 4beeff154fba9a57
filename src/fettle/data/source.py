"""Data ready to train on: read, encoded once, mixed, packed, and any batch by its index alone."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.table import Table
from torch import Tensor

from fettle.core.batch import Batch, Example, pack
from fettle.core.errors import FettleError
from fettle.core.files import make_folder, write_bytes
from fettle.data.build import encoded
from fettle.data.folders import left_out
from fettle.data.forms import Form
from fettle.data.mix import ROWS, Mixture
from fettle.data.packing import Plan, plan
from fettle.data.preference import Preference
from fettle.data.spec import DataSpec
from fettle.data.store import Store
from fettle.data.template import Encoder
from fettle.data.templates import Template
from fettle.data.units import Limit, Units, whole, windows

Beside = Callable[[np.ndarray, Batch], dict[str, Tensor]]  # from the units of a batch, and the batch
KEPT_PLANS = 2  # the epoch that is read and the one before or after


@dataclass(frozen=True)
class Counts:
    """What became of one source. read = kept + set_aside, in rows; the rest in examples and tokens."""

    source: str
    format: str
    template: str  # the chat template's name; '' where there is no conversation
    read: int
    kept: int
    set_aside: int  # bad rows and rows too long
    too_long: int  # of those set aside
    cut: int  # examples that lost their end
    examples: int  # after texts were cut into windows
    tokens: int
    learned: int
    per_epoch: int  # examples of the first epoch; others differ by one where the share is no whole number
    share: float  # of an epoch's tokens
    compared: str = ""  # of preferences: how many pairs, or answers


@dataclass(frozen=True)
class Source:
    """One source: its examples on disk, and the units of them that are packed."""

    spec: DataSpec
    store: Store
    units: Units
    limit: Limit
    over: Path | None = None  # the list of rows that are too long, where there are any


class Corpus:
    """An endless sequence of batches over one or more sources; every batch is a pure function of the seed and its index."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, length: int, seed: int, packing: bool) -> None:
        self.sources, self.length, self.seed, self.packing = tuple(sources), length, seed, packing
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad: int = next(i for i in ids if i is not None)  # never a target, whatever it is
        sizes = [len(s.units) for s in self.sources]
        self.mixture = Mixture([s.spec for s in self.sources], sizes, seed)
        self._bases = np.cumsum([0, *sizes])
        self._lengths = np.concatenate([s.units.lengths for s in self.sources])
        self.beside: Beside | None = (
            None  # what batches bring that is no property of the data, as a reference's figures
        )
        self._plans: dict[int, Plan] = {}
        self._ends: list[int] = []  # batches up to and with each epoch planned so far
        self.counts = self._counted()
        self.notes = [n for s in self.sources for n in (*left_out(s.spec.path), *s.store.manifest["notes"])]
        self.notes += [
            f"{c.source}: {c.too_long} rows are longer than {s.limit}{self._or_unseen()} and were left out "
            f"(long: {s.spec.long}); they are listed in {s.over}"
            for c, s in zip(self.counts, self.sources, strict=True) if c.too_long
        ]  # fmt: skip
        self.notes += self.mixture.notes
        self.notes += [
            f"{c.source}: {c.cut} examples were cut to {s.limit}"
            for c, s in zip(self.counts, self.sources, strict=True) if c.cut
        ]  # fmt: skip

    def _or_unseen(self) -> str:
        form = self.encoder.form
        bound = form.bound if isinstance(form, Preference) else None
        return f", or with one answer longer than the {bound} that the model sees," if bound is not None else ""

    def _counted(self) -> tuple[Counts, ...]:
        mean = [s.units.lengths.mean() if len(s.units) else 0.0 for s in self.sources]
        counts = self.mixture.counts(0).tolist()
        taken = [m * n for m, n in zip(mean, counts, strict=True)]
        return tuple(
            _counts(s, n, float(t / max(sum(taken), 1e-9)), self.encoder.form)
            for s, n, t in zip(self.sources, counts, taken, strict=True)
        )

    @property
    def template(self) -> Template | None:
        """The chat template that conversations were rendered with; None where there are none."""
        return self.encoder.template if any(c.template for c in self.counts) else None

    @property
    def batches_per_epoch(self) -> int:
        """Batches of the first epoch; later ones may differ by a few, since they are packed anew."""
        return self.batches(0)

    def batches(self, epoch: int) -> int:
        """Batches of one epoch."""
        return len(self._plan(epoch))

    def epoch_of(self, index: int) -> int:
        """The epoch that a batch belongs to."""
        return self.position(index)[0]

    def position(self, index: int) -> tuple[int, int]:
        """A batch's epoch, and its place in it."""
        while not self._ends or self._ends[-1] <= index:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.batches(len(self._ends)))
        epoch = int(np.searchsorted(self._ends, index, side="right"))
        return epoch, index - (self._ends[epoch - 1] if epoch else 0)

    def batch(self, index: int) -> Batch:
        """Batch `index`, from 0, of the endless sequence of epochs."""
        return self.laid_out(self.units(index))

    def units(self, index: int) -> np.ndarray:
        """The units of batch `index`, counted through all sources."""
        epoch, row = self.position(index)
        return self._plan(epoch).row(row)

    def laid_out(self, units: np.ndarray) -> Batch:
        """A batch of some units."""
        batch = pack([self.example(int(u)) for u in units], self.length, self.pad)
        if self.beside is not None:
            batch.extra |= self.beside(units, batch)
        return batch

    def example(self, unit: int) -> Example:
        """One unit, counted through all sources."""
        number = int(np.searchsorted(self._bases, unit, side="right")) - 1
        source, at = self.sources[number], unit - int(self._bases[number])
        index, start, stop = (int(a[at]) for a in (source.units.example, source.units.start, source.units.stop))
        name = source.store.name(index) + (f"@{start}" if start else "")
        if self.encoder.form is None:
            return Example((source.store.node(index, start, stop),), name)
        return replace(self.encoder.form.example(source.store.encoded(index), stop), name=name)

    def examples(self, count: int) -> list[Example]:
        """The first examples of the first epoch, for display; every source is among them where `count` allows."""
        order = self._order(0)
        owner = np.searchsorted(self._bases, order, side="right")
        firsts = [order[owner == n][:1] for n in range(1, len(self._bases))]
        picked = list(dict.fromkeys(np.concatenate([*firsts, order]).tolist()))
        return [self.example(int(u)) for u in picked[:count]]

    def fullest(self) -> Batch:
        """A row filled with copies of the longest example: no other row of these examples needs much more memory."""
        longest = int(self._lengths.argmax())
        copies = self.length // int(self._lengths[longest]) if self.packing else 1
        return self.laid_out(np.full(copies, longest))

    def fill(self, epoch: int = 0) -> float:
        """The share of an epoch's positions that hold a token."""
        found = self._plan(epoch)
        return float(self._lengths[found.order].sum() / max(len(found) * self.length, 1))

    def describe(self) -> list[dict[str, Any]]:
        """The counts of each source, as plain values."""
        return [asdict(c) for c in self.counts]

    def table(self, title: str = "data") -> Table:
        """The counts of each source, to print."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for head in ("source", "rows\nread", "kept", "set\naside", "cut", "tokens", "learned", "share"):
            table.add_column(head, justify="left" if head == "source" else "right", overflow="fold")
        for c in self.counts:
            made = " ".join(filter(None, (c.format, c.template and f"({c.template} template)", c.compared)))
            numbers = (c.read, c.kept, c.set_aside, c.cut, c.tokens, c.learned)
            table.add_row(f"{c.source}\n{made}", *(f"{n:,}" for n in numbers), f"{c.share:.0%}")
        return table

    def _order(self, epoch: int) -> np.ndarray:
        pairs = self.mixture.order(epoch)
        return self._bases[pairs[:, 0]] + pairs[:, 1]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            order = self._order(epoch)
            local = plan(self._lengths[order], self.length, self.packing, self.seed, ROWS, epoch)
            while len(self._plans) >= KEPT_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = Plan(order[local.order], local.starts)
        return self._plans[epoch]


def prepare(
    specs: Sequence[DataSpec],
    tokenizer: Any,
    length: int,
    seed: int = 0,
    cache: Path | None = None,
    packing: bool = True,
    form: Form | None = None,
    context: int | None = None,
) -> Corpus:
    """Read, encode (or find in `cache`) and mix the sources, in rows of `length` tokens.

    `form` is what examples are made into where the model is not a plain causal language model (data/forms.py), and knows what
    that sees of them; of any other, `context` is the most tokens of an example that the model sees, None where there is no bound.
    Without a cache folder the tokens lie in a temporary one, removed with the corpus, or with the process where there is
    no corpus. FettleError where a source cannot be read, has too many bad rows, or leaves nothing to learn.
    """
    limit = Limit(length, context if form is None else form.longest)
    if limit.window < 2:
        raise FettleError(f"batch.tokens: {limit}, hold no prediction; at least 2 are needed")
    if not specs:
        raise FettleError("data: no source is given")
    folder = make_folder(cache or _temporary())
    encoder = Encoder(tokenizer, form=form)
    try:
        sources = [_source(spec, encoder, limit, folder) for spec in specs]
    except FettleError as error:
        if cache is None and str(folder) in str(error):  # the list of bad rows, which can be read until then
            raise FettleError(f"{error} (until this process ends; with a cache folder it stays)") from None
        raise
    corpus = Corpus(sources, encoder, length, seed, packing)
    if cache is None:
        weakref.finalize(corpus, shutil.rmtree, folder, ignore_errors=True)
    return corpus


def _temporary() -> Path:
    """A folder that is gone when the process ends, whatever becomes of what is made in it."""
    folder = Path(tempfile.mkdtemp(prefix="fettle-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _source(spec: DataSpec, encoder: Encoder, limit: Limit, cache: Path) -> Source:
    store = encoded(spec, encoder, cache)
    texts = store.manifest["format"] == "text" and encoder.form is None
    unseen = encoder.form.unseen(store) if isinstance(encoder.form, Preference) else None
    units = windows(store, limit) if texts else whole(store, limit, spec.long, unseen)
    over = cache / f"{store.folder.name}.over-{limit.tokens}.jsonl" if len(units.dropped) else None
    if over is not None:
        reason = f"longer than {limit}" if spec.long == "drop" else f"nothing is learned in its first {limit}"
        lines = [
            {"where": store.name(i), "reason": f"{store.lengths[i]} tokens: {reason}"} for i in units.dropped.tolist()
        ]
        write_bytes(over, b"".join(orjson.dumps(x, option=orjson.OPT_APPEND_NEWLINE) for x in lines))
    if not len(units):
        what, way = f"are longer than {limit}, so nothing is left to learn", "say long: truncate"
        if spec.long == "truncate":
            what, way = f"learn nothing in their first {limit}", "shorten their prompts"
        raise FettleError(f"{spec.path}: all of its {len(store)} examples {what}; {limit.advice}{way}")
    return Source(spec, store, units, limit, over)


def _counts(source: Source, per_epoch: int, share: float, form: Form | None) -> Counts:
    store, units, manifest = source.store, source.units, source.store.manifest
    kept = _rows(store, np.unique(units.example))
    too_long = manifest["kept"] - kept
    learned = int(store.learned[np.unique(units.example)].sum())
    for index in units.cut.tolist():  # examples that lost their end
        stop = int(units.stop[np.searchsorted(units.example, index)])
        learned += int((store.node(index, 0, stop).weights > 0).sum()) - int(store.learned[index])
    return Counts(
        source=source.spec.path, format=manifest["format"], template=manifest["template"], read=manifest["read"],
        kept=kept, set_aside=manifest["bad"] + too_long, too_long=too_long, cut=len(units.cut), examples=len(units),
        tokens=int(units.lengths.sum()), learned=learned, per_epoch=per_epoch, share=share,
        compared=form.counted(store, units.example) if isinstance(form, Preference) else "",
    )  # fmt: skip


def _rows(store: Store, examples: np.ndarray) -> int:
    """How many rows these examples come from."""
    return len(np.unique(np.stack([store.files[examples], store.lines[examples], store.columns[examples]]), axis=1).T)
