"""Claims about instruction tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fettle.evaluate import TaskFile
from fettle.lab.claims.claim import CONTROL, Claim, Found, Plan, Setting, holds
from fettle.lab.rows import write_rows
from fettle.lab.tasks import TRAINED, instruction
from fettle.lab.write import write_tasks

HELD_OUT, KNOWN = "heldout.jsonl", "trained.jsonl"
ROWS = 12_000


def families_and_phrasings(setting: Setting) -> Plan:
    """Instructions of all, half and a quarter of the families (drawn anew by each seed), and of one phrasing a family."""
    folder = setting.folder
    settings: dict[str, tuple[float, int | None]] = {
        "all families": (1.0, None), "half of families": (0.5, None), "quarter of families": (0.25, None),
        "one phrasing": (1.0, 1),
    }  # fmt: skip
    arms: dict[str, Sequence[str]] = {}
    for arm, (share, phrasings) in settings.items():
        name = arm.replace(" ", "-")
        for seed in range(setting.seeds):
            order = np.random.default_rng(seed).permutation(len(TRAINED))
            families = [TRAINED[i] for i in order[: round(len(TRAINED) * share)]]
            file = folder / "data" / f"{name}-{seed}.jsonl"
            if not file.exists():
                write_rows(file, (instruction(setting.world, seed, i, families, phrasings) for i in range(ROWS)))
        arms[arm] = [f"data=[{{path: {folder}/data/{name}-{{seed}}.jsonl}}]"]
    write_tasks(folder / "tasks", setting.world, 0, setting.each)
    return Plan(arms, [TaskFile(path=str(folder / "tasks" / file), max_tokens=32) for file in (KNOWN, HELD_OUT)])


def unseen_kinds(found: Found) -> list[str]:
    """All against none, and the fewer against the more."""
    scores = found[HELD_OUT]
    return [
        f"tuned beats base on held-out families: {holds(scores['all families'], scores[CONTROL])}",
        f"more families help (all against a quarter): {holds(scores['all families'], scores['quarter of families'])}",
        f"more families help (half against a quarter): {holds(scores['half of families'], scores['quarter of families'])}",
        f"more phrasings help (all against one): {holds(scores['all families'], scores['one phrasing'])}",
    ]


CLAIMS = (
    Claim(
        name="instruction-tuning",
        says="tuning on instructions lifts tasks of unseen kinds, and more kinds and more phrasings lift them more",
        paper="Wei et al. 2021, Finetuned Language Models Are Zero-Shot Learners, arXiv 2109.01652, sections 4.1 and 4.2",
        plan=families_and_phrasings,
        verdict=unseen_kinds,
        shows=(HELD_OUT, KNOWN),
    ),
)
