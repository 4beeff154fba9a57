"""A claim about rewards that cannot be cheated: arithmetic, and a verifier of its numbers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fettle.evaluate import TaskFile
from fettle.lab.claims.alignment import KL, LORA, SHORT, START, divergence, tuned
from fettle.lab.claims.claim import Claim, Found, Plan, Setting, holds
from fettle.lab.claims.skills import evaluated, trained
from fettle.lab.families import FAMILIES
from fettle.lab.rows import write_rows

ARITHMETIC = ("add", "subtract", "double", "next_number")
TASK, DEVELOPMENT, ROWS = "arithmetic.jsonl", "development.jsonl", 3_000
GRPO, BEST, CHANCE = "grpo", "best of 8", "grpo, rewards by chance"
VERIFIER = "reward={kind: number}"


def chance(prompts: Sequence[Any], answers: Sequence[str], **columns: Any) -> list[float]:
    """1 or 0 by a hash of the answer with its prompt: a reward that tells nothing."""
    return [
        float(zlib.crc32(f"{prompt}|{answer}".encode()) % 2) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def verified(setting: Setting) -> Plan:
    """A start that can do some arithmetic, and what its own answers teach it: by the verifier, by the best of them, by chance."""
    families, folder = [FAMILIES[name] for name in ARITHMETIC], setting.folder / "data"
    start = tuned(
        setting.folder.parent / "starts" / "arithmetic", trained(setting.world, families, ROWS), ["optim.steps=80", "batch.tokens=1024"]
    )  # fmt: skip
    write_rows(folder / "prompts.jsonl", trained(setting.world, families, ROWS))
    files = {}
    for name, developed in ((DEVELOPMENT, True), (TASK, False)):
        write_rows(
            folder / name, (row for f in families for row in evaluated(setting.world, f, setting.each, developed))
        )
        files[name] = TaskFile(path=str(folder / name), max_tokens=8, stop=("\n",))
    common = [
        f"model={start}", LORA, *SHORT, "kind=reinforce", f"data=[{{path: {folder}/prompts.jsonl}}]",
        "rollouts={prompts: 16, answers: 8, max_tokens: 8}", "optim.steps=40",
    ]  # fmt: skip
    arms = {
        GRPO: [*common, VERIFIER, "objective={kind: grpo, kl: {beta: 0.02}}"],
        BEST: [*common, VERIFIER, "objective={kind: best_of, kl: {limit: 1000}}"],
        CHANCE: [
            *common, "reward={kind: function, name: 'fettle.lab.claims.verifier:chance'}", "objective={kind: grpo, kl: {beta: 0.02}}",
        ],
    }  # fmt: skip
    return Plan(arms, [files[TASK]], files[DEVELOPMENT], {START: str(start)})


def lifted(found: Found) -> list[str]:
    """Against the start, against rewards by chance, against the simple control."""
    scores = found[TASK]
    before, after = (float(np.mean(scores[arm])) for arm in (START, GRPO))
    return [
        f"grpo with a verifier lifts arithmetic from {before:.3f} to {after:.3f}: {holds(scores[GRPO], scores[START])}",
        f"rewards by chance lift it too: {holds(scores[CHANCE], scores[START])}",
        f"grpo beats rewards by chance: {holds(scores[GRPO], scores[CHANCE])}",
        f"grpo beats the best of 8: {holds(scores[GRPO], scores[BEST])}",
    ]


CLAIMS = (
    Claim(
        name="verifier",
        says="GRPO with a verifier lifts arithmetic, and rewards by chance do not",
        paper="Shao et al. 2024, DeepSeekMath, arXiv 2402.03300, section 4; Dong et al. 2023, RAFT, arXiv 2304.06767",
        plan=verified,
        verdict=lifted,
        shows=(TASK, KL),
        rates=dict.fromkeys((GRPO, BEST, CHANCE), (2e-4, 5e-4, 1e-3, 2e-3)),
        measures={KL: partial(divergence, reward={"kind": "number"})},
        each=50,
    ),
)
