"""Claims about what few trained weights reach: LoRA, BitFit, prefixes and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fettle.lab.claims.claim import CONTROL, SHARE, Claim, Found, Plan, Setting, gains, holds, spread
from fettle.lab.claims.skills import SKILLS_FILE, on_skills

SHORT = ("optim.steps=200", "batch.tokens=1024")
POINT = 0.01
FULL = "{kind: full}"
FULL_RATES = (3e-4, 1e-3, 3e-3)


def edited(edits: Mapping[str, str]) -> Callable[[Setting], Plan]:
    """A plan of arms that differ in their edits, on the small tasks."""
    return lambda setting: on_skills(setting, {name: [f"edits=[{edit}]"] for name, edit in edits.items()})


def lora_is_full(found: Found) -> list[str]:
    """At most a point below, with under two weights in a hundred."""
    scores, share = found[SKILLS_FILE], float(np.mean(found[SHARE]["lora"]))
    return [
        f"lora is at most a point below full tuning: {holds(scores['lora'], scores['full'], -POINT)}",
        f"lora trains {share:.2f}% of the weights: {'holds' if share < 2 else 'does not hold here'} (under 2%)",
        f"lora beats base: {holds(scores['lora'], scores[CONTROL])}",
    ]


def prefixes_beat_prompts(found: Found) -> list[str]:
    """Keys and values in every layer against vectors before the first."""
    scores = found[SKILLS_FILE]
    return [
        f"prefix tuning beats prompt tuning: {holds(scores['prefix tuning'], scores['prompt tuning'])}",
        f"p-tuning v2 beats prompt tuning: {holds(scores['p-tuning v2'], scores['prompt tuning'])}",
        f"prompt tuning beats base: {holds(scores['prompt tuning'], scores[CONTROL])}",
    ]


def share_of_gain(found: Found) -> list[str]:
    """How much of full tuning's gain, with how many of the weights."""
    scores, share = found[SKILLS_FILE], float(np.mean(found[SHARE]["bitfit"]))
    reached = gains(scores["bitfit"], scores["full"], scores[CONTROL])
    return [
        f"bitfit reaches {spread(reached)} of full tuning's gain with {share:.2f}% of the weights",
        f"bitfit beats base: {holds(scores['bitfit'], scores[CONTROL])}",
        f"bitfit reaches nine tenths of the gain: {holds(reached, [0.9] * len(reached))}",
    ]


CLAIMS = (
    Claim(
        name="lora",
        says="low-rank updates come within a point of full tuning with under 2% of the weights",
        paper="Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, tables 2 to 4",
        plan=edited({"full": FULL, "lora": "{kind: lora, rank: 3}"}),
        verdict=lora_is_full,
        shows=(SKILLS_FILE, SHARE),
        settings=("optim.steps=400", "batch.tokens=1024"),
        rates={"full": FULL_RATES, "lora": (3e-3, 6e-3, 1.2e-2)},
        each=100,
    ),
    Claim(
        name="prefix-tuning",
        says="trained keys and values in every layer (prefix tuning, P-tuning v2) beat prompt tuning in a small model",
        paper="Liu et al. 2021, P-Tuning v2, arXiv 2110.07602, table 2; Li & Liang 2021, Prefix-Tuning, arXiv 2101.00190",
        plan=edited({
            "prompt tuning": "{kind: prompt_tuning, tokens: 20}", "p-tuning v2": "{kind: p_tuning_v2, tokens: 20}",
            "prefix tuning": "{kind: prefix_tuning, tokens: 20}",
        }),
        verdict=prefixes_beat_prompts,
        shows=(SKILLS_FILE, SHARE),
        settings=SHORT,
        rates={"prompt tuning": (0.1, 0.3, 1.0), "p-tuning v2": (0.03, 0.1, 0.3), "prefix tuning": (2e-3, 5e-3, 1.5e-2)},
        each=50,
    ),
    Claim(
        name="bitfit",
        says="biases alone reach most of full tuning's gain",
        paper="Ben Zaken et al. 2021, BitFit, arXiv 2106.10199, tables 1 and 2",
        plan=edited({"full": FULL, "bitfit": "{kind: bitfit}"}),
        verdict=share_of_gain,
        shows=(SKILLS_FILE, SHARE),
        settings=("optim.steps=300", "batch.tokens=1024"),
        rates={"full": FULL_RATES, "bitfit": (1e-2, 3e-2, 1e-1)},
        each=50,
    ),
)  # fmt: skip
