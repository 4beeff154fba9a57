"""Instructions for tuning and items for evaluation, made from the task families.

Three things are never trained on: the clusters `HELD_OUT`, the last two wordings of every family, and one item in eight of each
family (`Family.kept`). So an evaluation can tell new items, new wordings and new tasks apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .conversations import CHAINS
from .families import FAMILIES, HELD_OUT, UNSEEN_PHRASINGS, Family
from .world import World

TRAINED: tuple[Family, ...] = tuple(family for family in FAMILIES.values() if family.cluster not in HELD_OUT)
UNSEEN: tuple[Family, ...] = tuple(family for family in FAMILIES.values() if family.cluster in HELD_OUT)
CONVERSATIONS = 0.15  # share of instructions with two or three turns


def instruction(
    world: World,
    seed: int,
    index: int,
    families: Sequence[Family] = TRAINED,
    phrasings: int | None = None,
    evaluated: bool = False,
) -> dict:
    """Instruction `index` of `seed`, a pure function of its arguments.

    Args:
        families: which families to draw from, all equally often.
        phrasings: how many wordings of each family to use; all that may be trained on if None.
        evaluated: draw the items kept for evaluation instead of the others (single turns only).

    Returns:
        ``{"messages": [{"role", "content"}, ...], "family", "cluster"}``; a conversation has 4 or 6 messages, and its family
        is that of the first turn, or ``chain``.
    """
    rng = random.Random(f"instruction/{seed}/{index}")
    if evaluated or rng.random() >= CONVERSATIONS:
        family = rng.choice(families)
        return _row([_turn(rng, world, family, phrasings, evaluated)], family.name, family.cluster)
    turns = rng.choice((2, 2, 3))
    if rng.random() < 0.5 and tuple(families) == TRAINED:
        return _row(rng.choice(CHAINS)(rng, world, turns), "chain", "conversation")
    drawn = [rng.choice(families) for _ in range(turns)]
    return _row([_turn(rng, world, family, phrasings, False) for family in drawn], drawn[0].name, drawn[0].cluster)


def evaluation(world: World, family: Family, n: int, seed: int = 0, unseen_wording: bool = False) -> list[dict]:
    """Up to `n` different items of `family` that no instruction contains, fewer where the family has no more.

    Wordings are those trained on, or with `unseen_wording` the last two; of a held-out family all.

    Returns:
        rows ``{"messages": [user], "answer", "family", "cluster", "metric": "exact"}``.
    """
    rng = random.Random(f"evaluation/{seed}/{family.name}/{unseen_wording}")
    wordings = family.phrasings
    if unseen_wording:
        wordings = wordings[-UNSEEN_PHRASINGS:]
    elif family.cluster not in HELD_OUT:
        wordings = wordings[:-UNSEEN_PHRASINGS]
    rows: dict[str, dict] = {}
    for _ in range(20 * n):
        slots, answer = family.item(rng, world, evaluated=True)
        prompt = rng.choice(wordings).format_map(slots)
        rows.setdefault(
            prompt,
            {
                "messages": [{"role": "user", "content": prompt}],
                "answer": answer,
                "family": family.name,
                "cluster": family.cluster,
                "metric": "exact",
            },
        )
        if len(rows) == n:
            break
    return list(rows.values())


def _turn(rng: random.Random, world: World, family: Family, phrasings: int | None, evaluated: bool) -> tuple[str, str]:
    slots, answer = family.item(rng, world, evaluated)
    wordings = family.phrasings[:-UNSEEN_PHRASINGS][:phrasings]
    return rng.choice(wordings).format_map(slots), answer


def _row(turns: Sequence[tuple[str, str]], family: str, cluster: str) -> dict:
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    return {"messages": messages, "family": family, "cluster": cluster}
