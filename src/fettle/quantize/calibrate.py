"""The one calibration driver: block after block, with the activations of one block only.

    for each block:   readings of its layers -> moments -> the method packs its layers -> the states go on through it

A method is a function of a `Unit`: a block with the states that enter it, which are those of the blocks before as they
are now, quantized. Within a block the readings follow one another in the order in which they run (true-sequential): the
moments of a layer's input are taken after the layers before it were packed. What lies outside of the blocks, and a
model that is not its blocks in a row (encoder-decoders), is calibrated at the end in one pass.

What a block has become is written to `kept` at once, so that a run that was killed goes on behind it; the states are
computed again on the way, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from fettle.core.batch import Batch, without_padding
from fettle.core.errors import FettleError
from fettle.core.files import write_bytes
from fettle.models.allocator import release
from fettle.models.blockwise import Blockwise
from fettle.models.forest import Forest
from fettle.models.memory import available, weight_bytes
from fettle.models.select import linears
from fettle.models.weight import in_out, read_weight
from fettle.quantize.grid import Grid, group_length
from fettle.quantize.linear import refuse
from fettle.quantize.moments import ROWS
from fettle.quantize.unit import Outcome, Unit, family

REST = "outside of the blocks"


@dataclass(frozen=True)
class Need:
    """Bytes that calibrating takes beside the model, by what they are for."""

    states: int
    moments: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.states + self.moments + self.workspace


class Calibration:
    """A model, the batches it is calibrated on, and what came of it.

    `states`: a folder for the activations between two blocks, which else stay in memory. `kept`: a folder for what is done, so
    that it need not be done again. `place` tells several edits of one run apart.
    """

    def __init__(
        self, forest: Forest, batches: Sequence[Batch], *, states: Path | None = None, kept: Path | None = None,
        place: int = 0, console: Console | None = None,
    ) -> None:  # fmt: skip
        if not batches:
            raise FettleError("calibration: there is no batch to calibrate on")
        self.forest, self.states, self.kept, self.place = forest, states, kept, place
        self.batches = tuple(map(without_padding, batches))  # padding is no text: no layer is to see it
        self.console = console or Console(stderr=True)
        self.outcomes: dict[str, Outcome] = {}
        self.left: dict[str, str] = {}  # what a method left alone, with the reason
        self.need: Need | None = None

    @property
    def model(self) -> Any:
        """The forest's model."""
        return self.forest.model

    @property
    def fallbacks(self) -> list[Outcome]:
        """The layers that a method could not do its work on."""
        return [outcome for outcome in self.outcomes.values() if outcome.fallback]

    def note(self, outcome: Outcome) -> None:
        """Keep what became of a layer; a fall-back is said aloud."""
        self.outcomes[outcome.layer] = outcome
        if outcome.fallback:
            self.console.print(
                f"{outcome.layer}: {outcome.fallback}", style="bold yellow", markup=False, highlight=False
            )

    def leave(self, what: str, why: str) -> None:
        """Keep that something was left alone."""
        self.left[what] = why

    def walk(self, edit: Any, work: Callable[[Unit], None], *, second: bool = True, resumable: bool = True) -> None:
        """Take the edit's targets through `work`, block by block. `second`: the method wants H.

        FettleError, before anything changes, where a target is no plain layer, is damaged or does not fit the grid, or
        where there is not memory enough.
        """
        names = list(linears(self.model, edit.targets))
        for name in names:
            _sound(self.model.get_submodule(name), name, edit)
        training = self.model.training
        self.model.eval()
        run = Blockwise(self.forest, self.batches, self.states)
        try:
            obstacle = run.obstacle()
            inside = {b: [n for n in names if n.startswith(f"{b}.")] for b in ([] if obstacle else run.names)}
            rest = [n for n in names if not any(n in own for own in inside.values())]
            if obstacle:
                self.console.print(f"calibration: {obstacle}, so all layers are calibrated in one pass", style="yellow")
            self.need = self._stated(run, inside, rest, second, getattr(edit, "sequential", False))
            self._blocks(edit, run, inside, work, resumable)
            if rest:
                self._unit(edit, Unit(self, REST, rest, None), 0, work, resumable)
        finally:
            self.model.train(training)
            if self.states is not None:
                shutil.rmtree(self.states, ignore_errors=True)
            release()

    def _blocks(
        self, edit: Any, run: Blockwise, inside: dict[str, list[str]], work: Callable[[Unit], None], resumable: bool
    ) -> None:
        last = max((i for i, own in enumerate(inside.values()) if own), default=-1)
        if last < 0:
            return
        run.start()
        columns = (
            TextColumn(f"{edit.kind}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as shown:
            task = shown.add_task("", total=last + 1)
            for i, (name, own) in enumerate(inside.items()):
                shown.update(task, description=name)
                if own:
                    self._unit(edit, Unit(self, name, own, run), i + 1, work, resumable)
                shown.update(task, advance=1)
                if i == last:
                    return
                run.advance()

    def _unit(self, edit: Any, unit: Unit, number: int, work: Callable[[Unit], None], resumable: bool) -> None:
        """One unit: as it was kept, or worked on and kept. Number 0 is what lies outside of the blocks."""
        file = self.kept / f"{self.place}-{edit.kind}" / f"{number:04d}.safetensors" if self.kept else None
        if file is not None and resumable and file.exists():
            self._restored(edit, unit, file)
            return
        before = dict(self.left)
        work(unit)
        if file is not None and resumable:
            prefix = f"{unit.name}."
            own = {n: t for n, t in edit.tensors(self.model).items() if unit.run is None or n.startswith(prefix)}
            told = {
                "outcomes": [asdict(self.outcomes[n]) for n in unit.names if n in self.outcomes],
                "left": {k: v for k, v in self.left.items() if k not in before},
            }
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}
            write_bytes(file, save(tensors, {"fettle": orjson.dumps(told).decode()}))

    def _restored(self, edit: Any, unit: Unit, file: Path) -> None:
        with safe_open(file, "pt") as stored, torch.no_grad():
            told = orjson.loads(stored.metadata()["fettle"])
            names = frozenset(stored.keys())
            edit.outline(self.model, names)
            there = edit.tensors(self.model)
            for name in names:
                there[name].copy_(stored.get_tensor(name))
        for outcome in told["outcomes"]:
            self.note(Outcome(**outcome))
        self.left |= told["left"]

    def _stated(
        self, run: Blockwise, inside: dict[str, list[str]], rest: list[str], second: bool, sequential: bool
    ) -> Need:
        """The memory that it will take, printed; FettleError where that is not there."""
        layers = [(n, in_out(self.model.get_submodule(n))) for own in [*inside.values(), rest] for n in own]
        widths = [k for _, (k, _) in layers]
        once = sum(k * k for n, (k, _) in layers if n in rest)
        if second and inside:
            readings: dict[str, list[str]] = max((_by_family(own) for own in inside.values()), key=len, default={})
            sums = [sum(in_out(self.model.get_submodule(n))[0] ** 2 for n in step) for step in readings.values()]
            once = max(once, max(sums, default=0) if sequential else sum(sums))
        widest, ends = max(widths, default=0), max((k + n for _, (k, n) in layers), default=0)
        longest = max(len(batch.tokens) for batch in self.batches)
        once_through = 4 * 8 * longest * ends  # a row on its way through a block
        work = 8 * 3 * widest**2 * second + 16 * max((n * k for _, (k, n) in layers), default=0)
        need = Need(0 if not inside else run.bytes(), 4 * (once * second + 2 * ROWS * widest), work + once_through)
        states = need.states
        where = f" in {self.states}" if self.states else ""
        self.console.print(
            f"calibration: {len(layers)} layers on {sum(b.useful for b in self.batches):,} tokens; beside the model "
            f"({_size(weight_bytes(self.model))}) it holds {_size(states)} of activations of one block{where}, {_size(need.moments)} "
            f"of moments and {_size(need.workspace)} to work in",
            highlight=False,
        )
        room, held = available(self.forest.device), need.total - (states if self.states else 0)
        if held > room:
            raise FettleError(
                f"calibration: it takes {_size(held)} beside the model and there are {_size(room)}; lower calibration.samples or "
                "calibration.length, or set calibration.disk: true"
            )
        return need


def round_blocks(model: nn.Module, edit: Any, calibration: Calibration) -> None:
    """Calibrate a quantizer that looks at weights alone: static ranges of activations, and what it does to every output."""
    observe = edit.activations is not None and edit.activations.static

    def work(unit: Unit) -> None:
        unit.moments(unit.names, second=False, observe=observe)
        for name in unit.names:
            weight = unit.weight(name)
            with naming_layer(edit, name):  # the rank of LoftQ may not fit
                packed, residual = (
                    edit.loftq.start(weight, edit.quantize) if edit.loftq else (edit.quantize(weight), None)
                )
            unit.put(name, edit, packed, residual=residual)

    calibration.walk(edit, work, second=False, resumable=False)


def _sound(layer: nn.Module, name: str, edit: Any) -> None:
    """FettleError where a layer cannot be calibrated."""
    refuse(layer, name, edit.kind)
    weight = read_weight(layer)
    with naming_layer(edit, name):
        if isinstance(grid := getattr(edit, "grid", None), Grid):
            group_length(tuple(weight.shape), grid)
        if not torch.isfinite(weight).all():
            raise FettleError("quantize: values that are not finite (NaN or infinity); the weights are damaged")


def needs_text(edit: Any) -> None:
    """FettleError: the edit cannot be applied as it is."""
    raise FettleError(
        f"edits: {edit.kind} looks at text; put it into a stage of kind: quantize with calibration, and what trains into a stage "
        f"after it (from Python: {type(edit).__name__}.calibrate)"
    )


@contextmanager
def naming_layer(edit: Any, name: str) -> Iterator[None]:
    """Within it, a FettleError begins with the edit and the layer that it is about."""
    try:
        yield
    except FettleError as error:
        raise FettleError(f"edits: {edit.kind}: {name}: {error}") from None


def _by_family(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name), []).append(name)
    return found


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
