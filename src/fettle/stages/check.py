"""Check: what will train, on which tokens, in how much memory, for how long; before the first step.

The same questions gate every run (`gate`); `fettle check` also shows examples and times two steps.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rich.console import Console, ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from fettle.core.errors import FettleError
from fettle.data.inspect import legend, show
from fettle.data.inspect import problems as data_problems
from fettle.data.preference import Preference
from fettle.data.source import Corpus
from fettle.evaluate import problems as evaluation_problems
from fettle.models.forest import Forest
from fettle.models.memory import MemoryPlan, available, predict, resident, worst_batch
from fettle.models.select import partly_matched
from fettle.models.weight import count_weights
from fettle.stages.artifact import awaited
from fettle.stages.sense import senseless_on, too_short
from fettle.train import Job, fit
from fettle.train.parallel import World

if TYPE_CHECKING:
    from fettle.stages.pipeline import Pipeline
    from fettle.stages.tune import Recipe

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 8.0 / 256}  # of optimizer state, a trained weight


@dataclass
class Report:
    """What a check found. `problems` stop a run; `notes` do not."""

    name: str
    parameters: int
    trained: int
    steps: int
    memory: MemoryPlan
    room: int  # bytes that this process may hold in all
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step_seconds: float | None = None
    held_out_seconds: float = 0.0  # what the run's held-out losses take in all
    corpus: Any = None  # whatever has a table()

    @property
    def remarks(self) -> Text:
        """The notes, a line each."""
        return Text("\n".join(f"note: {note}" for note in self.notes), style="yellow")

    @property
    def ok(self) -> bool:
        """Whether a run may start."""
        return not self.problems

    def __rich__(self) -> ConsoleRenderable:
        rows = Table(title=f"check: {self.name}", title_justify="left", show_header=False)
        rows.add_row(
            "trains", f"{self.trained:,} of {self.parameters:,} parameters ({self.trained / self.parameters:.2%})"
        )
        steps = f"{self.steps:,} steps"
        if self.step_seconds is not None:
            steps += f" of {self.step_seconds:.2f} s: about {_duration(self.steps * self.step_seconds)}"
        if self.held_out_seconds:
            steps += f", and {_duration(self.held_out_seconds)} for held-out losses"
        rows.add_row("time", steps)
        for what, size in self.memory.rows():
            rows.add_row(f"memory: {what}", _size(size))
        rows.add_row("memory: there is", _size(self.room))
        said = [self.remarks] if self.notes else []
        said += [Text(f"refused: {problem}", style="bold red") for problem in self.problems]
        said += [] if self.problems else [Text("ready to run", style="bold green")]
        return Group(*([self.corpus.table()] if self.corpus else []), rows, *said)


def preflight(recipe: Recipe, forest: Forest, corpus: Corpus, job: Job) -> Report:
    """Everything that can be known without a step. FettleError where nothing trains, so that there is no step to know of."""
    report = survey(recipe, job, lambda: memory_of(forest, job, corpus))
    report.corpus = corpus
    report.problems += data_problems(corpus)
    report.notes += corpus.notes
    if isinstance(form := corpus.encoder.form, Preference):
        report.notes += form.one_kind((s.store, s.units.example) for s in corpus.sources)
    if job.validation is not None:
        report.problems += [f"validation: {problem}" for problem in data_problems(job.validation.corpus)]
        report.notes += job.validation.corpus.notes
    return report


def survey(recipe: Recipe, job: Job, memory: Callable[[], MemoryPlan]) -> Report:
    """What can be known of a job whatever its data are. FettleError where nothing trains."""
    forest, edits = job.model, recipe.edits
    unsound = [f"{'.'.join(map(str, where))}: {what}" for where, what in senseless_on(forest.model, edits)]
    weights = list(forest.model.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    if not trained:
        raise FettleError("\n".join(unsound))
    unsound += [f"{'.'.join(map(str, where))}: {what}" for where, what in too_short(edits, job.steps)]
    report = Report(
        name=str(recipe.output), parameters=count_weights(forest.model), trained=trained, steps=job.steps,
        memory=memory(), room=available(forest.device) + _held(forest),
    )  # fmt: skip
    report.problems += unsound
    report.problems += [f"evaluate.{i}: {what}" for i, what in evaluation_problems(forest, recipe.evaluate)]
    for i, edit in enumerate(edits):
        targets = getattr(edit, "targets", None)
        for pattern, missed in partly_matched(forest.model, targets).items() if targets else ():
            report.problems.append(
                f"edits.{i}.targets: '{pattern}' takes some layers of a kind and leaves out {len(missed)} ({', '.join(missed[:3])}"
                f"{', ...' if len(missed) > 3 else ''}); name them by number if that is meant"
            )
    warmup, rate = job.optim.warmup_of(job.steps), job.optim.lr_at(job.steps - 1, job.steps)
    if warmup > job.steps:
        report.notes.append(
            f"optim.warmup: the warm-up takes {warmup} steps and the run has {job.steps}, so the learning rate reaches {rate:.3g} of "
            f"{job.optim.lr:g}"
        )
    if report.memory.total > report.room:
        report.problems.append(
            f"memory: the run needs {_size(report.memory.total)} and there are {_size(report.room)}; lower batch.tokens "
            "and raise optim.accumulate, set model.gradient_checkpointing: true, or take optim.kind: adamw8bit or a lora edit"
        )
    return report


def memory_of(forest: Forest, job: Job, corpus: Corpus) -> MemoryPlan:
    """The memory of the worst step of a job."""
    if corpus.encoder.form is not None or corpus.beside is not None:
        batch = corpus.fullest()
    else:
        batch = worst_batch(corpus.length, -(-corpus.length // min(corpus.length, forest.context or corpus.length)))
    return predict(
        forest, batch, lambda model, b: job.objective(model, b).sum, STATE_BYTES[job.optim.kind], job.optim.accumulate
    )


def gate(report: Report) -> None:
    """Tell what there is to know before a run. FettleError with every problem, where there is one."""
    if report.notes and World.rank_here() == 0:
        Console(stderr=True).print(report.remarks, soft_wrap=True)
    if report.problems:
        raise FettleError("\n".join(report.problems))


def timed(job: Job) -> float:
    """Seconds a step, the faster of two after one to warm up. Trains the job's model by three steps: for a check only."""
    folder = Path(tempfile.mkdtemp(prefix="fettle-check-"))
    rows: list[float] = []

    def note(row: dict[str, float]) -> None:
        rows.append(row["seconds"])
        if len(rows) == 3:
            raise _Timed

    steps = max(3, job.steps)  # the run's own where it has as many: edits with a schedule count on them
    try:
        fit(replace(job, steps=steps, folder=folder, resume=False, quiet=True, validation=None, on_row=note))
    except _Timed:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return min(rows[1:])


@runtime_checkable
class Looks(Protocol):
    """A stage with a look of its own, which prints what it finds and reports it."""

    def look(self, before: Sequence[Any], examples: int, console: Console, time_steps: bool) -> Report:
        """See `check`; `before` are the stages before it."""
        ...


class _Timed(Exception):
    """Enough steps were taken."""


def check(
    pipeline: Pipeline, examples: int = 3, console: Console | None = None, time_steps: bool = True
) -> list[Report]:
    """Check every stage of a recipe; prints examples and findings, returns the reports.

    A stage whose parent is not there yet is checked on the base with the edits of the stages before it, as they are
    before training. FettleError, after the last stage that could be checked, with what kept the others from it.
    """
    console = console or Console()
    reports: list[Report] = []
    failed: list[str] = []
    for number, stage in enumerate(pipeline.stages, 1):
        if len(pipeline.stages) > 1:
            console.rule(f"stage {number} of {len(pipeline.stages)}: {stage.output}")
        before = pipeline.stages[: number - 1]
        try:
            stage.require_files(before)
        except FettleError as error:
            failed.append(_where(pipeline, number, str(error)))
            continue
        if lacking := awaited((ref for _, ref in stage.other_models()), before):
            console.print(
                f"note: {', '.join(lacking)} is not there yet; check this stage again when it is", soft_wrap=True
            )
            continue
        try:
            if isinstance(stage, Looks):
                reports.append(_placed(pipeline, number, stage.look(before, examples, console, time_steps), console))
                continue
            forest = stage.preview(before)
        except FettleError as error:  # later stages would open what cannot be made
            failed.append(_where(pipeline, number, str(error)))
            failed += [_where(pipeline, n, "not checked") for n in range(number + 1, len(pipeline.stages) + 1)]
            break
        try:
            reports.append(_check_one(pipeline, number, forest, examples, console, time_steps))
        except FettleError as error:
            failed.append(_where(pipeline, number, str(error)))
    if failed:
        raise FettleError("\n".join(failed))
    return reports


def _where(pipeline: Pipeline, number: int, sentence: str) -> str:
    sentence = pipeline.placed(number - 1, sentence)
    return (
        f"stage {number} ({pipeline.stages[number - 1].output}): {sentence}" if len(pipeline.stages) > 1 else sentence
    )


def _check_one(
    pipeline: Pipeline, number: int, forest: Forest, examples: int, console: Console, time_steps: bool
) -> Report:
    recipe: Recipe = pipeline.stages[number - 1]
    corpus = recipe.corpus(forest)
    coloured = console.color_system is not None and not console.no_color
    if examples:
        console.print(legend(coloured))
    for example in corpus.examples(examples):
        console.print(show(example, forest.tokenizer, coloured))
    job = recipe.job(forest, corpus, recipe.optim.length(corpus.batches_per_epoch))
    report = preflight(recipe, forest, corpus, job)
    if report.ok and time_steps:
        began = time.perf_counter()
        recipe.refer(replace(job, steps=3, validation=None))
        report.step_seconds = timed(job)
        report.notes.append(f"timed three steps in {time.perf_counter() - began:.1f} s")
        if job.validation is not None:
            one = replace(job.validation, count=1).measure(forest, job.objective)["validation_seconds"]
            report.held_out_seconds = one * job.validation.count * job.validation.times(job.steps)
    return _placed(pipeline, number, report, console)


def _placed(pipeline: Pipeline, number: int, report: Report, console: Console) -> Report:
    """Print a stage's report, each problem with its line."""
    output = pipeline.stages[number - 1].output
    report.problems = [pipeline.placed(number - 1, problem) for problem in report.problems]
    if (output / "checkpoints").exists():
        report.notes.append(f"{output} holds a run already: fettle run goes on with --resume, or wants another output")
    console.print(report)
    return report


def _held(forest: Forest) -> int:
    """What this process holds already, which `predict` counts too."""
    if forest.device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(forest.device)
    return resident()


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{seconds:.0f} s"
