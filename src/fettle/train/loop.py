"""The one loop. Every optimizer step is a pure function of the state before it and of its index.

for each step:  sum the objective over the step's batches, backward on each sum
                add the gradient of the edits' penalties times the step's whole count
                divide by that count   (so accumulation and sharding change nothing)
                clip, update the masters, publish them to the weights, let the edits act
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.families import Edit, Objective
from fettle.core.files import sweep
from fettle.train import checkpoint
from fettle.train.agreement import require_same
from fettle.train.checkpoint import CheckpointSpec
from fettle.train.log import Log, Rate, Spent, read_metrics
from fettle.train.optim import Masters, OptimSpec, build, norm, set_lr
from fettle.train.parallel import World
from fettle.train.seeds import seed_all
from fettle.train.sums import Sums
from fettle.train.validation import Validation


class Batches(Protocol):
    """Where batches come from: a pure function of their index."""

    def batch(self, index: int) -> Batch:
        """The batch at `index` of an endless sequence."""
        ...


@runtime_checkable
class Phased(Batches, Protocol):
    """Batches that are made while the run goes on, from what the model has become; what it holds goes into checkpoints."""

    def begin(self, step: int, world: World) -> Sequence[int]:
        """The indices of a step's batches, as many for each process; called once before each step, in order."""
        ...

    def figures(self, step: int) -> dict[str, Any]:
        """What to say of a step beside its loss."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must have."""
        ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        ...


class Stopped(Exception):
    """A signal ended the run; its state is saved. `code` is the exit code (128 + the signal's number)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Job:
    """All that the loop needs."""

    model: Any  # a fettle.models.forest.Forest whose trainable weights require gradients
    objective: Objective
    batches: Batches
    optim: OptimSpec
    steps: int
    folder: Path
    edits: Sequence[Edit] = ()  # those that train: asked for learning rates, penalties, actions after a step, state
    seed: int = 0
    checkpoints: CheckpointSpec = field(default_factory=CheckpointSpec)
    not_finite: Literal["stop", "skip"] = "stop"
    made_of: dict[str, Any] = field(default_factory=dict)  # what a checkpoint must agree with (train/agreement.py)
    resume: bool = False
    quiet: bool = False
    spent: Spent = field(default_factory=Spent)  # what the run has taken so far
    validation: Validation | None = None  # a held-out loss on the way
    on_row: Callable[[dict[str, Any]], None] = lambda row: None  # called with each step's figures


def fit(job: Job) -> dict[str, float]:
    """Train to the end; returns the figures of the last step. Stopped where a signal ended it early."""
    world = join(job)
    job.model.model.train()
    masters = Masters((n, p) for n, p in job.model.model.named_parameters() if p.requires_grad)
    if not masters.weights:
        raise FettleError("edits: nothing trains; add an edit such as {kind: lora} or {kind: full}")
    optimizer = build(
        job.optim, masters, {k: v for edit in job.edits for k, v in edit.lr_scales(job.model.model).items()}
    )
    start, said = _begin(job, masters, optimizer, world)
    log = Log(
        job.folder if world.first else job.folder / f"rank{world.rank}", start, quiet=job.quiet or not world.first
    )
    for sentence in said:
        log.say(sentence)
    last: dict[str, float] = {}
    rate = Rate()
    try:
        with log.progress(start, job.steps) as show, _signals() as caught:
            for step in range(start, job.steps):
                last = run_step(job, step, masters, optimizer, world)
                last["tokens_per_second"] = rate.add(int(last["tokens"]))
                if job.validation is not None and job.validation.due(step + 1, job.steps):
                    found = job.validation.measure(job.model, job.objective, world)
                    rate.skip(found["validation_seconds"])
                    log.say(f"step {step + 1}: held-out loss {found.get('validation_loss', math.nan):.4f}")
                    last |= found
                last |= {"elapsed": job.spent.seconds, "peak_bytes": job.spent.peak(job.model.device)}
                log.row(last)
                job.on_row(last)
                show(step + 1, _line(last))
                ended = world.largest(caught[0] if caught else 0, job.model.device)  # one decision for all processes
                if (step + 1) % job.checkpoints.every == 0 or step + 1 == job.steps or ended:
                    _save(job, step + 1, masters, optimizer, world)
                if ended:
                    raise _stopped(ended, step + 1)
            if ended := world.largest(caught[0] if caught else 0, job.model.device):  # while the last step was saved
                raise _stopped(ended, job.steps)
    finally:
        masters.close()
        log.close()
        job.model.model.eval()
    return last or (read_metrics(job.folder) or [last])[-1]  # a resumed run may have no step left


def _stopped(number: int, steps: int) -> Stopped:
    return Stopped(
        128 + number, f"{signal.Signals(number).name}: stopped after step {steps}; saved; go on with --resume"
    )


def join(job: Job) -> World:
    """The processes of a run. Batches that are made on the way are shared evenly by whoever makes them."""
    return World.join(None if isinstance(job.batches, Phased) else job.optim.accumulate)


def run_step(job: Job, step: int, masters: Masters, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """One optimizer step: its figures. FettleError (policy 'stop') where loss or gradient is not finite."""
    began = time.perf_counter()
    device = job.model.device
    sums = Sums(device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    names: list[str] = []
    masters.zero()
    for index in _indices(job, step, world)[world.rank :: world.size]:
        batch = job.batches.batch(index)
        seed_all(job.seed, index)
        loss = job.objective(job.model, batch)
        loss.sum.backward()
        count += loss.count
        tokens += batch.useful
        names += [n for n in batch.names if n]
        sums.add(loss)
    gradients = masters.gradients()
    sums.agree(world)
    world.sum([*gradients, *sums.tensors, count, tokens])
    if not gradients:
        raise FettleError(
            f"step {step + 1}: no weight received a gradient; the edits train nothing that the objective reaches"
        )
    whole = max(count.item(), 1e-12)
    penalties = _penalize(job, whole)
    gradients = masters.gradients()
    size = norm(gradients).item() / whole
    lr = job.optim.lr_at(step, job.steps)
    means = sums.means()
    row: dict[str, Any] = {"step": step + 1, **means, **penalties}
    finite = math.isfinite(size) and all(math.isfinite(value) for value in means.values())
    if finite:
        clipped = 1.0 if job.optim.clip is None or size <= job.optim.clip else job.optim.clip / size
        torch._foreach_mul_(gradients, clipped / whole)
        set_lr(optimizer, lr)
        optimizer.step()
        masters.publish()
        for edit in job.edits:
            edit.after_step(job.model.model, step, job.steps)
    elif job.not_finite == "stop":
        raise FettleError(_not_finite(step, row, size, names) + "; the weights are those of the step before")
    else:
        row["skipped"] = sorted(set(names))
    masters.zero()
    row |= {"lr": lr, "grad_norm": size, "learned": count.item(), "tokens": int(tokens.item())}
    row["seconds"] = time.perf_counter() - began
    return row | (job.batches.figures(step) if isinstance(job.batches, Phased) else {})


def _indices(job: Job, step: int, world: World) -> Sequence[int]:
    """The batches of a step, of all processes."""
    if isinstance(job.batches, Phased):
        return job.batches.begin(step, world)
    return range(step * job.optim.accumulate, (step + 1) * job.optim.accumulate)


def _penalize(job: Job, count: float) -> dict[str, float]:
    """Add the gradients of the edits' penalties to those of a sum that will be divided by `count`.

    After the exchange between processes, each of which has the penalties whole.
    """
    found = [p for edit in job.edits if (p := edit.penalty(job.model.model)) is not None]
    if not found:
        return {}
    total = torch.stack(found).sum()
    (total * count).backward()
    return {"penalty": total.item()}


def _edit_state(job: Job) -> dict[str, torch.Tensor]:
    model = job.model.model
    return {f"{i}/{name}": t for i, edit in enumerate(job.edits) for name, t in edit.state(model).items()}


def _begin(job: Job, masters: Masters, optimizer: torch.optim.Optimizer, world: World) -> tuple[int, list[str]]:
    folder = job.folder / "checkpoints"
    if world.first and folder.exists():
        sweep(folder)
    world.wait()
    if not job.resume or not folder.exists():
        return 0, []
    found = checkpoint.newest(folder)
    if found is None:
        return 0, [f"{folder}: no checkpoint there; starting from step 1"]
    facts, tensors, problems = found
    require_same(folder, facts.get("made_of", {}), job.made_of)
    checkpoint.unpack_state(tensors, masters, optimizer, _edit_state(job))
    if isinstance(job.batches, Phased):
        job.batches.restore(checkpoint.part(tensors, checkpoint.SOURCE))
    return facts["step"], [*problems, f"resuming after step {facts['step']}"]


def _save(job: Job, step: int, masters: Masters, optimizer: torch.optim.Optimizer, world: World) -> None:
    """The first process writes; all of them end where it cannot, since the others would wait for it without end."""
    failed: FettleError | None = None
    if world.first:
        facts = {"made_of": job.made_of, "steps": job.steps}
        state = checkpoint.pack_state(masters, optimizer, _edit_state(job))
        if isinstance(job.batches, Phased):
            state |= {f"{checkpoint.SOURCE}/{name}": value for name, value in job.batches.state().items()}
        try:
            checkpoint.save(job.folder / "checkpoints", step, state, facts, job.checkpoints.keep)
        except FettleError as error:
            failed = error
    if world.largest(int(failed is not None), job.model.device):
        raise failed or FettleError(f"step {step}: the first process could not write the checkpoint; it says why")


def _not_finite(step: int, row: dict[str, Any], size: float, names: list[str]) -> str:
    shown = ", ".join(sorted(set(names))[:20]) + (", ..." if len(set(names)) > 20 else "")
    return f"step {step + 1}: loss {row.get('loss')} and gradient norm {size} are not both finite; examples of the step: {shown}"


def _line(row: dict[str, Any]) -> str:
    from fettle.models.memory import resident

    loss = row.get("loss")
    return (
        f"loss {loss:.3f}  {row['tokens_per_second']:,.0f} tok/s  {resident() / 2**30:.1f} GiB"
        if loss is not None
        else ""
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one ends the process at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller owns the signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
