"""A look at a stage of reinforcement learning before it runs: its prompts, what the policy answers now and what that is worth."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fettle.data.prompts import Prompts
from fettle.models.memory import predict
from fettle.stages.artifact import awaited, find_artifact
from fettle.stages.check import STATE_BYTES, Report, survey
from fettle.train import Job, fit
from fettle.train.parallel import World
from fettle.train.rollouts import Rollouts, fullest

if TYPE_CHECKING:
    from fettle.stages.cast import Cast
    from fettle.stages.reinforce import Reinforce

SHOWN = 4  # answers of a prompt


def preflight(recipe: Reinforce, prompts: Prompts, job: Job) -> Report:
    """Everything that can be known without a step. FettleError where nothing trains."""
    forest, source = job.model, job.batches
    assert isinstance(source, Rollouts)
    batch = fullest(source.objective, source.shape[0], forest.context or source.shape[0])
    state = STATE_BYTES[job.optim.kind]
    report = survey(recipe, job, lambda: predict(forest, batch, lambda model, b: job.objective(model, b).sum, state, 2))
    report.corpus = prompts
    report.notes += prompts.notes
    report.notes.append(
        f"a phase is {source.spec.prompts} prompts x {source.spec.answers} answers of up to {source.spec.max_tokens} tokens, and "
        f"{source.spec.steps} optimizer step{'s' if source.spec.steps > 1 else ''}"
    )
    return report


def look(stage: Reinforce, before: Sequence[Any], examples: int, console: Console, time_steps: bool) -> Report:
    """What `fettle check` shows of the stage. Where a parent or a reward model is not there yet, no answer is rewarded."""
    people, lacking = _people(stage, before)
    prompts = stage.prompts(people.policy)
    job = stage.rolling(people, prompts)
    report = preflight(stage, prompts, job)
    report.notes += [f"{what} is not there yet, so no answers are shown and no time is taken" for what in lacking]
    if lacking or not report.ok:
        return report
    assert isinstance(job.batches, Rollouts)
    if examples:
        show(job.batches, min(examples, prompts.per_epoch), console)
    if time_steps:
        report.step_seconds = timed(job)
    return report


def _people(stage: Reinforce, before: Sequence[Any]) -> tuple[Cast, list[str]]:
    """The cast, and what of it has not been made yet."""
    from fettle.stages.tune import ARTIFACT

    chain = stage.chain(before)
    parent = find_artifact(str(stage.parent or (chain[-1].output / ARTIFACT))) if stage.parent or chain else None
    lacking = [str(chain[-1].output)] if chain and parent is None else []
    rewards = awaited(stage.reward.models(), before)
    lacking += rewards
    edits = [edit for earlier in chain for edit in earlier.edits] if parent is None else []
    return stage.cast(parent, edits, chain, without=rewards), lacking


def show(source: Rollouts, count: int, console: Console) -> None:
    """Print what the policy answers to the first prompts, with the rewards."""
    spec = source.spec.model_copy(update={"prompts": count})
    small = Rollouts(source.actors, source.prompts, source.objective, spec, source.shape, source.seed)
    small.begin(0, World())
    assert small.phase is not None
    texts = small.texts()
    table = Table(title="what it answers now", title_justify="left", title_style="bold", show_lines=True)
    for head in ("prompt", "answer", "reward"):
        table.add_column(head, justify="right" if head == "reward" else "left", overflow="fold")
    for p, place in enumerate(small.phase.places.tolist()):
        own = range(p * small.phase.group, (p + 1) * small.phase.group)
        best = sorted(own, key=lambda a: -small.phase.rewards[a].item())[:SHOWN]  # type: ignore[union-attr]
        for i, a in enumerate(best):
            table.add_row(
                "" if i else small.prompts.at(place).question, texts[a], f"{small.phase.rewards[a].item():.3g}"
            )
    console.print(table)


def timed(job: Job) -> float:
    """Seconds a step over one whole phase. Trains the job's model: for a check only."""
    assert isinstance(job.batches, Rollouts)
    folder = Path(tempfile.mkdtemp(prefix="fettle-check-"))
    source = job.batches
    own = Rollouts(source.actors, source.prompts, source.objective, source.spec, source.shape, source.seed)
    began = time.perf_counter()
    try:
        fit(replace(job, batches=own, steps=source.spec.steps, folder=folder, resume=False, quiet=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return (time.perf_counter() - began) / source.spec.steps
