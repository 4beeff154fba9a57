"""Claims about quantization: what it costs by bits and by method, and what training with rounding gives back.

All are about nats a token of held-out documents of the lab's corpus, other ones for each seed; so are the calibration rows. What
rounding costs an arm is told against the same model unrounded on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import orjson

from fettle.core.files import MANIFEST, read_json, write_json
from fettle.evaluate import Perplexity, Results, evaluate
from fettle.export import export
from fettle.lab.claims.claim import CHOOSING, Claim, Found, Plan, Setting, Values, holds, spread
from fettle.lab.corpus import documents
from fettle.lab.rows import write_rows
from fettle.quantize import RTN, Activations, Grid
from fettle.stages import open_model
from fettle.stages.tune import ARTIFACT

READ, HELD = 3_000, 1_000_003  # documents to calibrate and train on, and the corpus that the held-out ones are of
CONTEXT = 256
LOST, NATS, ROUNDED = "nats lost", "nats", "nats, rounded afterwards"
METHODS, BITS = ("rtn", "hqq", "awq", "gptq"), (8, 4, 3, 2)
LOSSLESS = float(np.log1p(0.005))  # nats: half a percent of perplexity
W4A8 = RTN(grid=Grid(bits=4), activations=Activations())
TUNED, QAT = "tuned", "qat"
RATES = (1e-4, 3e-4, 1e-3)
LENGTH = ("optim.steps=150", "batch.tokens=1024")


# Text.


def texts(setting: Setting) -> tuple[str, str]:
    """Writes what is read and what is held out; returns `data` and `evaluate`, the latter with {seed} for the seed."""
    folder = setting.folder / "data"
    write_rows(folder / "read.jsonl", ({"text": t} for t in islice(documents(setting.world, 1), READ)))
    for seed in (*range(setting.seeds), CHOOSING):
        held = islice(documents(setting.world, HELD + seed), setting.each)
        write_rows(folder / f"held-{seed}.jsonl", ({"text": t} for t in held))
    scored = f"[{{kind: perplexity, path: '{folder}/held-{{seed}}.jsonl', context: {CONTEXT}}}]"
    return f"[{{path: {folder}/read.jsonl, format: text}}]", scored


# What a run came to.


def nats(place: Path, name: str = "evaluation") -> float:
    """Nats a token of the seed's held-out text."""
    (result,) = Results.read(place / name).results
    return float(result.about["nats"]) / int(result.about["tokens"])


def lost(place: Path) -> float | None:
    """Nats a token more than before quantizing; None of an arm that trained."""
    return nats(place) - nats(place, "evaluation-before") if (place / "evaluation-before").is_dir() else None


def rounded_after(place: Path) -> float | None:
    """Nats a token of a tuned model that is rounded to W4A8 afterwards; None of one that is rounded already."""
    file = place / "rounded.json"
    if not file.exists():
        forest, edits = open_model(str(place))
        if any(edit.role in ("simulates", "quantizes") for edit in edits):
            return None
        if not (place / "model" / "config.json").exists():
            export(forest, edits, place / "model", "hf")
        forest, _ = open_model(str(place / "model"))
        W4A8.apply(forest.model)
        facts = read_json(place / ARTIFACT / MANIFEST)
        spec = Perplexity(**facts["recipe"]["evaluate"][0])
        (result,) = evaluate(forest, [spec], progress=False).results
        write_json(file, {"nats": result.about["nats"] / result.about["tokens"]})
    return float(read_json(file)["nats"])


# Arms.


def quantizing(data: str, scored: str, *edits: dict) -> list[str]:
    """An arm that quantizes the base."""
    return [
        "kind=quantize", f"edits={orjson.dumps(edits).decode()}", f"evaluate={scored}",
        f"calibration={{data: {data}, samples: 32, length: {CONTEXT}, seed: {{seed}}}}",
    ]  # fmt: skip


def training(data: str, scored: str, edits: str) -> list[str]:
    """An arm that goes on reading the corpus."""
    return [f"edits={edits}", f"data={data}", f"evaluate={scored}", *LENGTH]


def by_bits(method: str, bits: int) -> str:
    """The name of an arm of weights alone."""
    return f"{method} {bits}"


INT8 = {"kind": "rtn"}
INPUTS = {"tensor": {"group": "tensor", "static": True}, "token": {}}
PLACES = {"": [], "outliers, ": [{"kind": "outliers"}]}


def four_verdicts(setting: Setting) -> Plan:
    """Weights by method and bits; weights against activations, plain and with injected outliers; training with rounding."""
    data, scored = texts(setting)
    arm = partial(quantizing, data, scored)
    arms = {
        by_bits(m, b): arm({"kind": m, "grid": {"bits": b, "group": 64, "symmetric": False, "scale": "float16"}})
        for m in METHODS
        for b in BITS
    }
    for place, first in PLACES.items():
        arms[f"{place}w8a16"] = arm(*first, INT8)
        for by, grid in INPUTS.items():
            arms[f"{place}w16a8 {by}"] = arm(*first, {"kind": "round_inputs", "grid": grid})
            arms[f"{place}w8a8 {by}"] = arm(*first, INT8 | {"activations": grid})
            arms[f"{place}w8a8 {by}, smoothed"] = arm(*first, {"kind": "smoothquant"}, INT8 | {"activations": grid})
    return Plan(arms | {name: [*changes, "optim.lr=3.0e-4"] for name, changes in trained(data, scored).items()})


def trained(data: str, scored: str) -> dict[str, list[str]]:
    """Full tuning, with and without rounding."""
    return {
        TUNED: training(data, scored, "[{kind: full}]"),
        QAT: training(data, scored, "[{kind: full}, {kind: qat, grid: {bits: 4}, activations: {}}]"),
    }


def told(found: Found) -> list[str]:
    """The four."""
    rise = found[LOST]
    just = [LOSSLESS] * len(rise["w8a16"])
    lines = [
        f"1. {arm}: int8 weights cost at most 0.5% of perplexity: {holds(just, rise[arm], form='+.4f')}"
        for arm in ("w8a16", *(by_bits(m, 8) for m in METHODS))
    ]
    wide = {b: _spread([rise[by_bits(m, b)] for m in METHODS]) for b in BITS}
    lines += [f"2. the methods' spread at {b} bits: {spread(wide[b], '.4f')} nats" for b in BITS]
    lines += [
        f"2. it is wider at {fewer} bits than at {more}: {holds(wide[fewer], wide[more], form='+.4f')}"
        for more, fewer in zip(BITS[:-1], BITS[1:], strict=True)
    ]
    for place in PLACES:
        for by in INPUTS:
            a8, w8, both = (rise[f"{place}{what}"] for what in (f"w16a8 {by}", "w8a16", f"w8a8 {by}"))
            smooth = rise[f"{place}w8a8 {by}, smoothed"]
            lines += [
                f"3. {place}activations a {by} cost more than weights: {holds(a8, w8, form='+.4f')}",
                f"3. {place}smoothing lowers what w8a8 a {by} costs: {holds(both, smooth, form='+.4f')}",
            ]
    return [*lines, *(f"4. {line}" for line in recovers(found))]


def _spread(methods: Sequence[Values]) -> list[float]:
    return [max(values) - min(values) for values in zip(*methods, strict=True)]


# QAT.


def with_rounding(setting: Setting) -> Plan:
    """The two, and distilling from the base."""
    data, scored = texts(setting)
    kd = [*trained(data, scored)[QAT], "objective={kind: distill, teacher: fettle/tiny}"]
    arms = trained(data, scored) | {DISTILLED: kd}
    development = Perplexity(path=str(setting.folder / "data" / f"held-{CHOOSING}.jsonl"), context=CONTEXT)
    return Plan(arms, development=development)


DISTILLED = "qat, distilled from the base"


def recovers(found: Found) -> list[str]:
    """How much of what W4A8 costs the tuned model is not lost where rounding was part of the training."""
    control, after = found[NATS][TUNED], found[ROUNDED][TUNED]
    lines = [f"w4a8 after tuning costs: {holds(after, control, form='+.4f')} nats"]
    for arm in (QAT, DISTILLED):
        if arm in found[NATS]:
            share = [
                (a - q) / (a - c) if a > c else 0.0 for a, q, c in zip(after, found[NATS][arm], control, strict=True)
            ]
            lines += [
                f"{arm} recovers this share of it: {spread(share)}",
                f"{arm} recovers more than half: {holds(share, [0.5] * len(share))}",
            ]
    return lines


CLAIMS = (
    Claim(
        name="quantization",
        says="8-bit weights are nearly lossless; below, the method decides, the more the fewer the bits; activations are harder than "
        "weights; training with rounding recovers what rounding lost",
        paper="Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339; Frantar et al. 2022, GPTQ, arXiv 2210.17323; Xiao et al. 2022, "
        "SmoothQuant, arXiv 2211.10438; Yao et al. 2023, ZeroQuant-V2, arXiv 2303.08302",
        plan=four_verdicts,
        verdict=told,
        shows=(LOST, NATS),
        recipe="lab/arms.yaml",
        measures={LOST: lost, NATS: nats, ROUNDED: rounded_after},
        each=40,
    ),
    Claim(
        name="qat",
        says="quantization-aware training recovers more than half of what W4A8 costs",
        paper="Liu et al. 2023, LLM-QAT, arXiv 2305.17888, table 1; Jacob et al. 2017, arXiv 1712.05877",
        plan=with_rounding,
        verdict=recovers,
        shows=(NATS, ROUNDED),
        recipe="lab/arms.yaml",
        rates=dict.fromkeys((TUNED, QAT, DISTILLED), RATES),
        measures={NATS: nats, ROUNDED: rounded_after},
        each=40,
        lower=True,
    ),
)
