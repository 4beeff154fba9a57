"""The small tasks that methods of tuning are compared on: a question, and a short answer that ends the text.

No chat template: its marks are no words of the base's corpus, and a method that leaves the embeddings alone could not learn
to write one. The end of a text is a token that the base knows.

train.jsonl          {"prompt": "What is the first word of ...?\\nAnswer:", "completion": " blanket"}
development.jsonl    items kept for evaluation: a third of them, for choosing learning rates
skills.jsonl         the other two thirds, for the claims
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence

from fettle.evaluate import TaskFile
from fettle.lab.claims.claim import Plan, Setting
from fettle.lab.families import FAMILIES, UNSEEN_PHRASINGS, Family
from fettle.lab.rows import write_rows
from fettle.lab.world import World
from fettle.stages.compare import Arms

SKILLS = (
    "first",
    "larger",
    "past",
    "sentiment",
    "who_has",
    "zh_first",
)  # the base has the stuff for them, not the form
TRAIN, DEVELOPMENT, SKILLS_FILE = "train.jsonl", "development.jsonl", "skills.jsonl"
ROWS = 6_000
DEVELOPED = 3  # one item in so many of those kept for evaluation


def on_skills(setting: Setting, arms: Arms) -> Plan:
    """The arms trained on the tasks and scored on new items; writes both, and the development split."""
    folder, families = setting.folder / "data", [FAMILIES[name] for name in SKILLS]
    write_rows(folder / TRAIN, trained(setting.world, families, ROWS))
    files = {}
    for name, developed in ((DEVELOPMENT, True), (SKILLS_FILE, False)):
        rows = (row for family in families for row in evaluated(setting.world, family, setting.each, developed))
        write_rows(folder / name, rows)
        files[name] = TaskFile(path=str(folder / name), max_tokens=16, stop=("\n",))
    data = f"data=[{{path: {folder / TRAIN}}}]"
    with_data = {arm: [data, *changes] for arm, changes in arms.items()}
    return Plan(with_data, [files[SKILLS_FILE]], files[DEVELOPMENT])


def trained(world: World, families: Sequence[Family], rows: int) -> Iterator[dict]:
    """Rows to train on, of all families equally often."""
    rng = random.Random("skills")
    for _ in range(rows):
        family = rng.choice(families)
        prompt, answer = _asked(rng, family, family.item(rng, world, False))
        yield {"prompt": prompt, "completion": f" {answer}"}


def evaluated(world: World, family: Family, n: int, developed: bool) -> list[dict]:
    """Up to `n` different items that are never trained on; an item is of the development split or not, by what is asked."""
    rng = random.Random(f"skills/{family.name}/{developed}")
    rows: dict[str, dict] = {}
    for _ in range(40 * n):
        slots, answer = item = family.item(rng, world, True)
        asked = "|".join(("development", family.name, *slots.values()))
        if (zlib.crc32(asked.encode()) % DEVELOPED == 0) != developed:
            continue
        prompt, _ = _asked(rng, family, item)
        row = {"prompt": prompt, "answer": answer, "family": family.name, "cluster": family.cluster, "metric": "exact"}
        rows.setdefault(prompt, row)
        if len(rows) == n:
            break
    return list(rows.values())


def _asked(rng: random.Random, family: Family, item: tuple[dict[str, str], str]) -> tuple[str, str]:
    slots, answer = item
    wording = rng.choice(family.phrasings[:-UNSEEN_PHRASINGS])
    return f"{wording.format_map(slots)}\nAnswer:", answer
