"""Compare: one recipe run with several changes (arms), over seeds, each measured alike.

An arm is a name and what it changes in the recipe, as in a file of arms::

    full: {edits: [{kind: full}], optim: {lr: 3.0e-4}}
    lora: {edits: [{kind: lora, rank: 16}], optim: {lr: 2.0e-3}}

`{seed}` in a value stands for the seed of the run.
Every arm runs in a process of its own, so that its peak memory is its own; one that fails is told and the others go on.
An arm that ended before is not run again.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from fettle.core.config import read_yaml, validate
from fettle.core.errors import FettleError
from fettle.core.files import read_json, write_json
from fettle.core.spec import nearest
from fettle.evaluate import Results
from fettle.evaluate.interval import whisker
from fettle.generate import Sampling, generate
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.stages.artifact import open_model
from fettle.stages.labels import label
from fettle.stages.pipeline import load_recipe
from fettle.train.agreement import require_same
from fettle.train.log import read_metrics

Interval = tuple[float, float | None, float | None]  # mean, low, high; the mean alone where one example has no bounds
Arms = Mapping[str, Sequence[str]]  # by name, overrides `key=value`
FINDINGS = "findings.json"
PICTURE = "findings.png"
ENDING = re.compile(r"\.(?:jsonl?|txt)(?=, |$)")  # of the file in an evaluation's name, before its settings


@dataclass(frozen=True)
class Outcome:
    """What one arm with one seed came to. Times are seconds; `latency` is of one generated token, relative to the base's."""

    arm: str
    seed: int
    trained: int
    parameters: int
    peak_bytes: int
    step_seconds: float | None  # None of a stage that does not train
    loss: float | None
    latency: float | None  # None where it was not asked for
    merged_latency: float | None  # None too where the edits cannot be merged exactly
    scores: dict[str, Interval] = field(default_factory=dict)  # by evaluation


def read_arms(file: Path) -> dict[str, tuple[str, ...]]:
    """A file of arms as overrides. FettleError where an arm is not a mapping."""
    data, lines = read_yaml(file)
    if not isinstance(data, dict) or not data:
        raise FettleError(f"{file}: expected arms by name, found {type(data).__name__}")
    arms: dict[str, tuple[str, ...]] = {}
    for name, changes in data.items():
        if not isinstance(changes, dict):
            raise FettleError(f"{file}:{lines[(name,)]}: {name}: expected what the arm changes, found {changes!r}")
        arms[name] = tuple(_flat(changes))
    return arms


def pick(arms: Arms, only: Sequence[str] | None) -> Arms:
    """The arms of these names, or all. FettleError where there is no such arm."""
    for name in only or ():
        if name not in arms:
            raise FettleError(f"--only: there is no arm '{name}': {nearest(name, arms)}")
    return {name: changes for name, changes in arms.items() if not only or name in only}


def _flat(changes: Mapping[str, Any], above: str = "") -> list[str]:
    found: list[str] = []
    for key, value in changes.items():
        at = f"{above}{key}"
        found += _flat(value, f"{at}.") if isinstance(value, dict) else [f"{at}={orjson.dumps(value).decode()}"]
    return found


def compare(
    recipe: Path, arms: Arms, folder: Path, overrides: Sequence[str] = (), seeds: int = 1, latency: bool = True,
    console: Console | None = None, first: int = 0,
) -> list[Outcome]:  # fmt: skip
    """Run every arm over `seeds` seeds from `first` on; leaves findings.json, findings.png and a folder an arm in `folder`.

    FettleError where a recipe is wrong, before the first run, or where every arm failed.
    """
    console = console or Console()
    plans = {
        (arm, seed): [
            *overrides,
            *(c.replace("{seed}", str(seed)) for c in changes),
            f"seed={seed}",
            f"output={place_of(folder, arm, seed)}",
        ]
        for arm, changes in arms.items()
        for seed in range(first, first + seeds)
    }
    for plan in plans.values():
        load_recipe(recipe, plan)  # every mistake before the first run
    outcomes: list[Outcome] = []
    failed: dict[str, str] = {}
    for (arm, seed), plan in plans.items():
        console.print(f"[bold]{arm}[/bold], seed {seed}")
        try:
            outcomes.append(_outcome(recipe, arm, seed, plan, place_of(folder, arm, seed), latency))
        except FettleError as error:
            failed[arm] = str(error)
            console.print(f"  {error}", style="red", markup=False)
    if not outcomes:
        raise FettleError(f"{recipe}: every arm failed; the first said: {next(iter(failed.values()))}")
    write_json(folder / FINDINGS, {"outcomes": [asdict(o) for o in outcomes], "failed": failed})
    draw(outcomes, folder / PICTURE)
    console.print(table(outcomes))
    return outcomes


def place_of(folder: Path, arm: str, seed: int) -> Path:
    """The output folder of one run."""
    return folder / arm.replace(" ", "-") / f"seed-{seed}"


def _outcome(recipe: Path, arm: str, seed: int, plan: Sequence[str], place: Path, latency: bool) -> Outcome:
    if (place / FINDINGS).exists():
        _check_same(recipe, plan, place)
    else:
        command = [sys.executable, "-m", "fettle.cli", "run", str(recipe), *plan, "--resume"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise FettleError((done.stderr.strip().splitlines() or [f"{arm}: exit code {done.returncode}"])[-1])
        write_json(place / FINDINGS, asdict(_measured(arm, seed, place, latency)))
    found = read_json(place / FINDINGS)
    return Outcome(**{**found, "scores": {k: tuple(v) for k, v in found["scores"].items()}})


def _check_same(recipe: Path, plan: Sequence[str], place: Path) -> None:
    file = place / "artifact" / "manifest.json"
    wanted: Any = load_recipe(recipe, plan).stages[-1]
    there = validate(type(wanted), read_json(file)["recipe"], str(file))
    then, now = ({"recipe": stage.model_dump(mode="json")} for stage in (there, wanted))
    require_same(place, then, now)


def _measured(arm: str, seed: int, place: Path, latency: bool) -> Outcome:
    facts, rows = read_json(place / "artifact" / "manifest.json"), read_metrics(place)
    scores = {}
    if (place / "evaluation").is_dir():
        for result in Results.read(place / "evaluation").results:
            score = result.main[1]
            scores[result.name] = (score.mean, score.low, score.high)
    unmerged, merged = _latencies(place) if latency else (None, None)
    return Outcome(
        arm, seed, facts["trained"], facts["parameters"], facts["peak_bytes"],
        statistics.median(row["seconds"] for row in rows) if rows else None,
        statistics.fmean(row["loss"] for row in rows[-20:]) if rows else None,
        unmerged, merged, scores,
    )  # fmt: skip


def _latencies(place: Path) -> tuple[float, float | None]:
    tuned, edits = open_model(str(place))
    plain = load(tuned.spec)  # the same model without edits, also where it began with random weights
    unmerged = _latency(tuned, plain)
    try:
        for edit in edits:
            edit.merge(tuned.model)
    except FettleError:  # prompts and non-linear adapters have no merged form
        return unmerged, None
    return unmerged, _latency(tuned, plain)


def _latency(tuned: Forest, base: Forest, tokens: int = 32, pairs: int = 7) -> float:
    """Seconds a generated token of `tuned` over that of `base`: the median ratio of runs in turn, batch 1, prompt of 16."""
    ratios = []
    for _ in range(pairs + 1):
        a, b = _generated(base, tokens), _generated(tuned, tokens)
        ratios.append(b / a)
    return statistics.median(ratios[1:])


def _generated(forest: Forest, tokens: int) -> float:
    began = time.perf_counter()
    done = generate(forest, [list(range(5, 21))], Sampling(max_tokens=tokens))
    return (time.perf_counter() - began) / max(1, len(done[0].tokens))


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """By arm, the mean over seeds of every figure; scores keep the interval where there is one seed, else the span of seeds."""
    found: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(o.arm for o in outcomes):
        runs = [o for o in outcomes if o.arm == arm]
        mean = {
            key: _mean([getattr(o, key) for o in runs])
            for key in ("trained", "parameters", "peak_bytes", "step_seconds", "loss", "latency", "merged_latency")
        }
        scores = {}
        for name in runs[0].scores:
            values = [o.scores[name] for o in runs if name in o.scores]
            means = [v[0] for v in values]
            low, high = values[0][1:] if len(values) == 1 else (min(means), max(means))
            scores[name] = (statistics.fmean(means), low, high)
        found[arm] = {**mean, "scores": scores}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def titles(names: Sequence[str]) -> list[str]:
    """Names of evaluations without the endings of their files, unless it is these that tell them apart."""
    short = [ENDING.sub("", name, count=1) for name in names]
    return short if len(set(short)) == len(short) else list(names)


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row an arm."""
    rows = summary(outcomes)
    names = list(dict.fromkeys(name for row in rows.values() for name in row["scores"]))
    shown = Table()
    for head in ("arm", "trained", "share", "memory", "step", *titles(names), "latency", "merged"):
        shown.add_column(head, justify="left" if head == "arm" else "right", overflow="fold")
    for arm, row in rows.items():
        scores = [_score(row["scores"].get(name)) for name in names]
        latency = "" if row["latency"] is None else f"{row['latency']:.2f}x"
        merged = f"{row['merged_latency']:.2f}x" if row["merged_latency"] is not None else latency and "cannot"
        shown.add_row(
            arm, f"{row['trained']:,.0f}", f"{100 * row['trained'] / row['parameters']:.2f}%", f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            "" if row["step_seconds"] is None else f"{row['step_seconds']:.3f} s", *scores, latency, merged,
        )  # fmt: skip
    return shown


def _score(score: Interval | None) -> str:
    if score is None or score[1] is None:
        return "" if score is None else f"{score[0]:.3f}\nn/a"
    return f"{score[0]:.3f}\n{score[1]:.2f}-{score[2]:.2f}"


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Quality against trained parameters, and memory against the time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = summary(outcomes)
    names = list(dict.fromkeys(name for row in rows.values() for name in row["scores"]))
    figure, axes = plt.subplots(
        1, len(names) + 1, figsize=(5.4 * (len(names) + 1), 4.2), layout="constrained", squeeze=False
    )
    for axis, name, title in zip(axes[0], names, titles(names)):
        for row in rows.values():
            if name in row["scores"]:
                mean, low, high = row["scores"][name]
                axis.errorbar(
                    row["trained"], mean, yerr=whisker(mean, low, high), fmt="o", ms=6, lw=1.2, color="#1f4e79"
                )
        axis.set(xscale="log", xlabel="trained parameters", ylabel=f"score on {title}")
    last = axes[0][-1]
    timed = {arm: row for arm, row in rows.items() if row["step_seconds"] is not None}
    for row in timed.values():
        last.plot(row["step_seconds"], row["peak_bytes"] / 2**20, "o", ms=6, color="#a0522d")
    last.set(xlabel="seconds a step (median)", ylabel="peak memory (MiB)")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.margins(x=0.15)
    for axis, name in zip(axes[0], names):
        label(
            axis, [(row["trained"], row["scores"][name][0], arm) for arm, row in rows.items() if name in row["scores"]]
        )
    label(last, [(row["step_seconds"], row["peak_bytes"] / 2**20, arm) for arm, row in timed.items()])
    figure.savefig(file, dpi=110)
    plt.close(figure)
