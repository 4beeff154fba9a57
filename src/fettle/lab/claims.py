"""The claims: what a paper says, reproduced at the lab's size over several seeds with intervals and a control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fettle.core.errors import FettleError
from fettle.core.files import write_json
from fettle.core.spec import nearest
from fettle.evaluate import TaskFile, evaluate
from fettle.lab.recipes import recipe_file
from fettle.lab.rows import write_rows
from fettle.lab.tasks import TRAINED, instruction
from fettle.lab.world import World
from fettle.lab.write import write_tasks
from fettle.models.forest import Forest
from fettle.stages import load_recipe, open_model, run


@dataclass(frozen=True)
class Claim:
    """One claim: `arms` are what is compared, by name; `verdict` reads the scores [arm][seed]."""

    name: str
    says: str
    paper: str
    arms: dict[str, dict[str, Any]]
    verdict: Callable[[dict[str, list[float]]], list[str]]
    instructions: int = 12_000


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the mean over seeds."""
    draws = np.random.default_rng(seed).choice(np.asarray(values), (10_000, len(values))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def holds(better: Sequence[float], worse: Sequence[float]) -> str:
    """The verdict on better > worse, paired by seed: holds where every seed agrees, does not where the mean disagrees."""
    gaps = [b - w for b, w in zip(better, worse, strict=True)]
    low, high = interval(gaps)
    said = "holds" if min(gaps) > 0 else "does not hold here" if sum(gaps) <= 0 else "inconclusive"
    return f"{said} ({np.mean(gaps):+.3f}, {low:+.3f} to {high:+.3f} over {len(gaps)} seeds)"


def _instruction_tuning(scores: dict[str, list[float]]) -> list[str]:
    return [
        f"tuned beats base on held-out families: {holds(scores['all families'], scores['base'])}",
        f"more families help (all against a quarter): {holds(scores['all families'], scores['quarter of families'])}",
        f"more families help (half against a quarter): {holds(scores['half of families'], scores['quarter of families'])}",
        f"more phrasings help (all against one): {holds(scores['all families'], scores['one phrasing'])}",
    ]


CLAIMS = {
    "instruction-tuning": Claim(
        name="instruction-tuning",
        says="tuning on instructions lifts tasks of unseen kinds, and more kinds and more phrasings lift them more",
        paper="Wei et al. 2021, Finetuned Language Models Are Zero-Shot Learners, arXiv 2109.01652, sections 4.1 and 4.2",
        arms={
            "all families": {},
            "half of families": {"families": 0.5},
            "quarter of families": {"families": 0.25},
            "one phrasing": {"phrasings": 1},
        },
        verdict=_instruction_tuning,
    )
}


def find(name: str) -> Claim:
    """A claim by name."""
    if name not in CLAIMS:
        raise FettleError(f"lab: there is no claim '{name}': {nearest(name, CLAIMS)}")
    return CLAIMS[name]


def run_claim(
    name: str, seeds: int = 3, each: int = 20, changes: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Run every arm over the seeds (arms that ended before are read again); returns the folder of the findings."""
    console = console or Console()
    claim = find(name)
    folder = Path("runs/lab/claims") / name
    world = World.build(0)
    write_tasks(folder / "tasks", world, 0, each)
    base, _ = open_model("fettle/tiny")
    control = score(base, folder / "tasks")
    scores: dict[str, list[float]] = {"base": [control] * seeds}
    for arm, settings in claim.arms.items():
        scores[arm] = [_arm(claim, arm, settings, seed, folder, changes, world) for seed in range(seeds)]
        console.print(f"{arm}: " + ", ".join(f"{s:.3f}" for s in scores[arm]))
    verdicts = claim.verdict(scores)
    write_json(
        folder / "findings.json", {"claim": claim.says, "paper": claim.paper, "scores": scores, "verdicts": verdicts}
    )
    table = Table(title=f"{claim.says}\n{claim.paper}")
    for head in ("arm", "held-out families", "95% interval", "seeds"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm, values in scores.items():
        low, high = interval(values)
        table.add_row(
            arm, f"{np.mean(values):.3f}", f"{low:.3f} to {high:.3f}", "1 (control)" if arm == "base" else str(seeds)
        )
    console.print(table)
    for line in verdicts:
        console.print(line)
    draw(claim, scores, folder / "findings.png")
    return folder


def score(model: Forest, tasks: Path) -> float:
    """Accuracy on the held-out families."""
    spec = TaskFile(path=str(tasks / "heldout.jsonl"), max_tokens=24)
    return float(evaluate(model, [spec]).results[0].main[1].mean)


def _arm(
    claim: Claim, arm: str, settings: dict[str, Any], seed: int, folder: Path, changes: Sequence[str], world: World
) -> float:
    place = folder / arm.replace(" ", "-") / f"seed-{seed}"
    families = list(TRAINED)
    np.random.default_rng(seed).shuffle(families)  # type: ignore[arg-type]
    families = families[: max(1, round(len(families) * settings.get("families", 1.0)))]
    rows = (instruction(world, seed, i, families, settings.get("phrasings")) for i in range(claim.instructions))
    if not (place / "instructions.jsonl").exists():
        write_rows(place / "instructions.jsonl", rows)
    overrides = [
        f"data=[{{path: {place / 'instructions.jsonl'}}}]", "evaluate=[]", f"output={place / 'run'}", f"seed={seed}", *changes
    ]  # fmt: skip
    artifact = run(load_recipe(recipe_file("quickstart.yaml"), overrides), resume=True)
    tuned, _ = open_model(str(artifact))
    return score(tuned, folder / "tasks")


def draw(claim: Claim, scores: dict[str, list[float]], file: Path) -> None:
    """A dot a seed and the mean, by arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.6 * len(scores) + 1.2), layout="constrained")
    for y, values in enumerate(reversed(scores.values())):
        axis.plot(values, [y] * len(values), "o", color="#9ab3cc", ms=6)
        axis.plot([float(np.mean(values))], [y], "|", color="#1f4e79", ms=22, mew=3)
    axis.set_yticks(range(len(scores)), list(reversed(scores)))
    axis.set_xlabel("accuracy on families of held-out clusters")
    axis.set_xlim(left=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.2)
    figure.savefig(file, dpi=110)
    plt.close(figure)
