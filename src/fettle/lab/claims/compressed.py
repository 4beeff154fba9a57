"""Claims about what stands beside a base in few bits: a fine-tune at one bit a weight, and a LoRA that makes up for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fettle.core.files import MANIFEST, read_json
from fettle.lab.claims.claim import CONTROL, Claim, Found, Plan, Setting, gains, holds, spread
from fettle.lab.claims.quality import POINT, SHORT
from fettle.lab.claims.skills import SKILLS_FILE, on_skills
from fettle.models.select import linears
from fettle.models.weight import in_out
from fettle.stages import open_model
from fettle.stages.artifact import TENSORS
from fettle.stages.tune import ARTIFACT

# BitDelta.

LINEARS = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
TUNED, DELTA, DISTILLED = "fine-tune", "bitdelta", "bitdelta, scales distilled"
SIZE = "size (of the fine-tune's linear layers)"
KEPT = 0.95  # of the fine-tune's gain: what "keeps" asks for


def one_bit(setting: Setting) -> Plan:
    """A fine-tune of all linear layers, its delta as it begins, its delta with distilled scales; `{seed}` of all is one."""
    tuned = f"{setting.folder}/{TUNED}/seed-{{seed}}"
    delta = f"edits=[{{kind: bitdelta, tuned: {tuned}}}]"
    taught = f"objective={{kind: distill, divergence: mse, teacher: {tuned}}}"
    still = ["optim.steps=1", "optim.lr=1.0e-12"]  # a stage has a step; this one moves no scale by a bit that counts
    arms = {
        TUNED: [f"edits=[{{kind: full, targets: {LINEARS}}}]", "optim.lr=1.0e-3", "optim.steps=200"],
        DELTA: [delta, taught, *still],
        DISTILLED: [delta, taught, "optim.steps=200", "optim.lr=1.0e-4", "optim.warmup=0"],
    }  # fmt: skip
    return on_skills(setting, arms)


def size_of(place: Path) -> float:
    """Bytes of the artifact over those that its linear layers take in 16 bits."""
    facts = read_json(place / ARTIFACT / MANIFEST)
    forest, _ = open_model(facts["model"]["path"])
    weights = sum(n * k for n, k in map(in_out, linears(forest.model).values()))
    held = (place / ARTIFACT / TENSORS).stat().st_size
    # A fine-tune's artifact holds float32 masters, which it rounds to 16 bits when it is merged.
    return held / (2 * weights) if facts["edits"][0]["kind"] == "bitdelta" else 1.0


def is_kept(found: Found) -> list[str]:
    """Size, and the share of the fine-tune's gain, before and after distilling."""
    scores, size = found[SKILLS_FILE], found[SIZE]
    lines = [
        f"a delta's share of the size of the fine-tune's linear layers (a bit a weight: 0.0625): {spread(size[DISTILLED], '.4f')}"
    ]
    for arm in (DELTA, DISTILLED):
        share = gains(scores[arm], scores[TUNED], scores[CONTROL])
        lines += [
            f"{arm} keeps this share of the fine-tune's gain: {spread(share)}",
            f"{arm} keeps at least {KEPT:g} of it: {holds(share, [KEPT] * len(share), -1e-9)}",
        ]
    return [
        *lines,
        f"distilling the scales helps: {holds(scores[DISTILLED], scores[DELTA])}",
        f"the fine-tune beats base: {holds(scores[TUNED], scores[CONTROL])}",
    ]


# LoftQ.

RANK = 16
NORMAL = "levels: normal, group: 64"
RATES = (2e-3, 5e-3, 1e-2)
WHOLE = "lora"


def beside(setting: Setting) -> Plan:
    """A LoRA on the base as it is, and on one of 4 and of 2 bits, begun at zero and by LoftQ."""
    arms: Mapping[str, str] = {WHOLE: f"{{kind: lora, rank: {RANK}}}"} | {
        arm: edits
        for bits in (4, 2)
        for arm, edits in (
            (qlora(bits), f"{{kind: rtn, grid: {{bits: {bits}, {NORMAL}}}}}, {{kind: lora, rank: {RANK}}}"),
            (
                loftq(bits),
                f"{{kind: rtn, grid: {{bits: {bits}, {NORMAL}}}, loftq: {{rank: {RANK}}}}}, {{kind: lora, rank: {RANK}, init: loftq}}",
            ),
        )
    }
    return on_skills(setting, {arm: [f"edits=[{edits}]"] for arm, edits in arms.items()})


def qlora(bits: int) -> str:
    """The name of an arm."""
    return f"qlora, {bits} bits"


def loftq(bits: int) -> str:
    """The name of an arm."""
    return f"loftq, {bits} bits"


def is_reached(found: Found) -> list[str]:
    """Against the LoRA on the whole base, and against a LoRA that begins at zero."""
    scores = found[SKILLS_FILE]
    return [
        f"{loftq(4)} is at most a point below a LoRA on the whole base: {holds(scores[loftq(4)], scores[WHOLE], -POINT)}",
        f"{loftq(2)} is at most a point below it: {holds(scores[loftq(2)], scores[WHOLE], -POINT)}",
        f"{loftq(4)} beats {qlora(4)}: {holds(scores[loftq(4)], scores[qlora(4)])}",
        f"{loftq(2)} beats {qlora(2)}: {holds(scores[loftq(2)], scores[qlora(2)])}",
        f"{loftq(4)} beats base: {holds(scores[loftq(4)], scores[CONTROL])}",
    ]


CLAIMS = (
    Claim(
        name="bitdelta",
        says="one bit a weight keeps a fine-tune at a sixteenth of its size, and distilling the scales helps",
        paper="Liu et al. 2024, BitDelta: Your Fine-Tune May Only Be Worth One Bit, arXiv 2402.10193, table 2",
        plan=one_bit,
        verdict=is_kept,
        shows=(SKILLS_FILE, SIZE),
        settings=("batch.tokens=1024",),
        measures={SIZE: size_of},
        each=100,
    ),
    Claim(
        name="loftq",
        says="a LoRA on a 4-bit base that LoftQ begins reaches a LoRA on the whole base",
        paper="Li et al. 2023, LoftQ, arXiv 2310.08659, tables 2 to 4; Dettmers et al. 2023, QLoRA, arXiv 2305.14314, table 3",
        plan=beside,
        verdict=is_reached,
        shows=(SKILLS_FILE,),
        settings=SHORT,
        rates=dict.fromkeys((WHOLE, *(name(bits) for bits in (4, 2) for name in (qlora, loftq))), RATES),
        each=50,
    ),
)  # fmt: skip
