"""Running a claim: learning rates first, where it has some to choose from, then every arm over the seeds, then the verdicts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from fettle.core.errors import FettleError
from fettle.core.files import write_json
from fettle.evaluate import Evaluation, TaskFile, evaluate
from fettle.lab.claims.claim import (
    CHOOSING,
    LATENCY,
    MERGED,
    PEAK,
    SHARE,
    Claim,
    Found,
    Plan,
    Scores,
    Setting,
    Values,
    interval,
)  # fmt: skip
from fettle.lab.world import World
from fettle.stages import open_model
from fettle.stages.compare import Arms, Outcome, compare, place_of
from fettle.stages.recipes import recipe_file

FOLDER = Path("runs/lab/claims")


def run(
    claim: Claim, seeds: int = 3, each: int | None = None, changes: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Run a claim to its verdicts (runs that ended before are read again); returns the folder of the findings.

    With other items or changes of the recipe the folder is another one. FettleError where an arm did not end.
    """
    console = console or Console()
    each = each or claim.each
    folder = FOLDER / (claim.name + _suffix(claim, each, changes))
    setting = Setting(folder, World.build(0), seeds, each)
    plan = claim.plan(setting)
    for key in ("evaluate", "seed", "output"):
        if any(change.startswith((f"{key}=", f"{key}.")) for change in changes):
            raise FettleError(f"lab: {claim.name}: '{key}' is the claim's own, so --set cannot change it")
    # Last of all, so that they count where an arm says otherwise.
    plan = replace(plan, arms={arm: [*own, *changes] for arm, own in plan.arms.items()})
    if any(change.startswith("optim.lr=") for change in changes):
        claim = replace(claim, rates={})
    arms, rates = _with_rates(claim, plan, folder / "rates", claim.settings, console)
    outcomes = compare(
        recipe_file(claim.recipe), arms, folder, [*claim.settings, _asked(plan.evaluate)], seeds, claim.latency, console
    )
    found = collect(claim, plan, outcomes, folder, seeds)
    verdicts = claim.verdict(found)
    told = {"claim": claim.says, "paper": claim.paper, "rates": rates, "figures": found.figures, "verdicts": verdicts}
    write_json(folder / "verdicts.json", told)
    console.print(f"[bold]{claim.says}[/bold]\n{claim.paper}", highlight=False)
    console.print(table(claim, found))
    for line in verdicts:
        console.print(line, highlight=False)
    draw(found[claim.shows[0]], claim.shows[0], folder / "verdicts.png")
    return folder


def _suffix(claim: Claim, each: int, changes: Sequence[str]) -> str:
    other = [*changes, *([f"each={each}"] if each != claim.each else [])]
    return "-" + hashlib.sha256("\n".join(other).encode()).hexdigest()[:8] if other else ""


def _asked(tasks: Sequence[Evaluation]) -> str:
    said = [task.model_dump(mode="json", exclude_unset=True) | _kind_of(task) for task in tasks]
    return f"evaluate={orjson.dumps(said).decode()}"


def _kind_of(task: Any) -> dict[str, str]:
    return {} if isinstance(task, TaskFile) else {"kind": task.kind}


# Learning rates.


def _with_rates(
    claim: Claim, plan: Plan, folder: Path, overrides: Sequence[str], console: Console
) -> tuple[Arms, dict[str, Any]]:
    """The arms with their best learning rates, and what was tried: by arm, the score of each rate, and the one taken."""
    tried = {
        f"{arm} at {rate:g}": [*plan.arms[arm], f"optim.lr={rate}"] for arm in claim.rates for rate in claim.rates[arm]
    }
    if not tried:
        return plan.arms, {}
    assert plan.development is not None
    console.print("[bold]learning rates[/bold], on the development split")
    asked = [*overrides, _asked([plan.development])]
    outcomes = {
        o.arm: o for o in compare(recipe_file(claim.recipe), tried, folder, asked, 1, False, console, first=CHOOSING)
    }
    arms, rates = dict(plan.arms), {}
    for arm, grid in claim.rates.items():
        found = {rate: outcomes[name] for rate in grid if (name := f"{arm} at {rate:g}") in outcomes}
        best = best_rate(arm, found, claim.lower)
        arms[arm] = [*plan.arms[arm], f"optim.lr={best}"]
        rates[arm] = {"taken": best, "tried": {f"{rate:g}": _score(o) for rate, o in found.items()}}
        edge = " (at the edge of what was tried)" if best in (min(grid), max(grid)) else ""
        console.print(f"{arm}: {best:g}{edge}", highlight=False)
    return arms, rates


def best_rate(arm: str, found: Mapping[float, Outcome], lower: bool = False) -> float:
    """The rate with the best (`lower`: the lowest) score on the development split; between equals, the lower training loss."""
    if not found:
        raise FettleError(f"lab: '{arm}' ended with none of its learning rates (see above); run the claim again")
    sign = -1 if lower else 1
    return max(found, key=lambda rate: (sign * _score(found[rate]), -(found[rate].loss or 0.0)))


def _score(outcome: Outcome) -> float:
    (score,) = outcome.scores.values()
    return score[0]


# Figures.


def collect(claim: Claim, plan: Plan, outcomes: Sequence[Outcome], folder: Path, seeds: int) -> Found:
    """All figures of a claim's runs. FettleError where an arm did not end with every seed."""
    by_arm = {arm: [o for o in outcomes if o.arm == arm] for arm in plan.arms}
    if short := [arm for arm, runs in by_arm.items() if len(runs) < seeds]:
        raise FettleError(
            f"lab: {claim.name}: the arm '{short[0]}' did not end with every seed (see above); run the claim again"
        )
    controls = _controls(plan)
    figures: dict[str, dict[str, list[float]]] = {
        name: {arm: [value] * seeds for arm, value in scores.items()} for name, scores in controls.items()
    }
    for arm, runs in by_arm.items():
        rows: dict[str, list[float | None]] = {
            SHARE: [100 * o.trained / o.parameters for o in runs], PEAK: [o.peak_bytes / 2**20 for o in runs],
            LATENCY: [o.latency for o in runs], MERGED: [o.merged_latency for o in runs],
            **{name: [o.scores[name][0] if name in o.scores else None for o in runs] for name in controls},
            **{name: [measure(place_of(folder, arm, o.seed)) for o in runs] for name, measure in claim.measures.items()},
        }  # fmt: skip
        for name, values in rows.items():
            known = [v for v in values if v is not None]
            if len(known) == seeds:
                figures.setdefault(name, {})[arm] = known
    return Found(by_arm, figures)


def _controls(plan: Plan) -> dict[str, dict[str, float]]:
    """By evaluation, the score of each untuned model."""
    found: dict[str, dict[str, float]] = {Path(task.path).name: {} for task in plan.evaluate}
    for name, path in plan.controls.items() if plan.evaluate else ():
        for result in evaluate(open_model(path)[0], plan.evaluate).results:
            found[result.name][name] = result.main[1].mean
    return found


# What is left to read.


def table(claim: Claim, found: Found) -> Table:
    """A row an arm; the mean over seeds of each figure, and its 95% interval beneath where seeds differ."""
    shown = Table()
    shown.add_column("arm")
    for what in claim.shows:
        shown.add_column(what.removesuffix(".jsonl"), justify="right")
    for arm in dict.fromkeys(arm for what in claim.shows for arm in found[what]):
        shown.add_row(arm, *(_cell(found[what].get(arm)) for what in claim.shows))
    return shown


def _cell(values: Values | None) -> str:
    if values is None:
        return ""
    form = ".3f" if max(map(abs, values)) < 10 else ",.1f"
    low, high = interval(values)
    return f"{np.mean(values):{form}}" + (f"\n{low:{form}} to {high:{form}}" if low < high else "")


def draw(scores: Scores, what: str, file: Path) -> None:
    """A dot a seed and the mean, by arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.6 * len(scores) + 1.2), layout="constrained")
    for y, values in enumerate(reversed(list(scores.values()))):
        axis.plot(values, [y] * len(values), "o", color="#9ab3cc", ms=6)
        axis.plot([float(np.mean(values))], [y], "|", color="#1f4e79", ms=22, mew=3)
    axis.set_yticks(range(len(scores)), list(reversed(list(scores))))
    axis.set_xlabel(f"score on {Path(what).stem}" if what.endswith(".jsonl") else what)
    axis.set(xlim=(0, None), ylim=(-0.5, len(scores) - 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.2)
    figure.savefig(file, dpi=110)
    plt.close(figure)
