"""Claims about what a method costs: time when the model answers, memory while it learns."""

from __future__ import annotations

from pathlib import Path

from fettle.core.config import validate
from fettle.core.files import MANIFEST, read_json
from fettle.lab.claims.claim import (
    CONTROL,
    LATENCY,
    MERGED,
    PEAK,
    Claim,
    Found,
    Plan,
    Scores,
    Setting,
    Values,
    gains,
    holds,
    spread,
)
from fettle.lab.claims.quality import FULL, FULL_RATES, SHORT
from fettle.lab.claims.skills import SKILLS_FILE, on_skills
from fettle.models.memory import saved_bytes
from fettle.stages.tune import ARTIFACT, Recipe

NOISE = 0.05  # of a latency: what two runs of one model may differ by
ADAPTERS = {
    "houlsby": "{kind: adapter, placement: houlsby, size: 32}",
    "pfeiffer": "{kind: adapter, placement: pfeiffer, size: 64}",
    "parallel": "{kind: adapter, placement: parallel, size: 64}",
}
LORA = "{kind: lora, rank: 16}"
LARGE = ("optim.steps=3", "batch.tokens=8192")  # of the runs whose memory is measured: beside it the model is small
SAVED = "activations saved (MiB)"
OTHERS = {"lora": LORA, "full": FULL}
METHODS = {**OTHERS, "tinytl": "{kind: tinytl}"}


# Latency.


def answering(setting: Setting) -> Plan:
    """Each method after a few steps, for its weights do not matter; full tuning adds no module and is the control."""
    arms = {name: [f"edits=[{edit}]"] for name, edit in {"full": FULL, "lora": LORA, **ADAPTERS}.items()}
    return Plan(on_skills(setting, arms).arms)


def adapters_wait(found: Found) -> list[str]:
    """Seconds a token of each over those of the base, a prompt at a time."""
    times, merged = found[LATENCY], found[MERGED]
    just = [1.0] * len(times["full"])
    return [
        f"the same model again takes the same time: {_same(times['full'])}",
        *(f"{name} adapters add time: {holds(times[name], just, NOISE)}" for name in ADAPTERS),
        f"lora adds time while it is not merged: {holds(times['lora'], just, NOISE)}",
        f"lora adds none once it is merged: {_same(merged['lora'])}",
    ]


def _same(times: Values) -> str:
    said = "holds" if max(abs(t - 1) for t in times) <= NOISE else "does not hold here"
    return f"{said} ({spread(times)} of the base's, {NOISE:.0%} allowed)"


# Memory.


def learning(setting: Setting) -> Plan:
    """Each method at the tasks, and each for a few large steps, whose memory is measured."""
    arms = {name: [f"edits=[{edit}]"] for name, edit in METHODS.items()}
    large = {large_of(name): [*changes, *LARGE, "evaluate=[]"] for name, changes in arms.items()}
    return on_skills(setting, {**arms, **large})


def large_of(name: str) -> str:
    """The arm of large steps."""
    return f"{name}, large steps"


def saved_mib(place: Path) -> float:
    """MiB that the forward pass over a run's first batch leaves for its backward pass, by saved-tensor hooks."""
    recipe = validate(Recipe, read_json(place / ARTIFACT / MANIFEST)["recipe"], str(place))
    forest, _ = recipe.open(None)
    batch = recipe.corpus(forest).batch(0).to(forest.device)
    forest.model.train()
    return saved_bytes(forest.model, lambda: recipe.objective(forest, batch).sum) / 2**20


def little_is_kept(found: Found) -> list[str]:
    """Activations counted, and the most that a process held; then what the method is worth."""
    saved, peak, scores = found[SAVED], found[PEAK], found[SKILLS_FILE]
    tiny = large_of("tinytl")
    reached = gains(scores["tinytl"], scores["full"], scores[CONTROL])
    return [
        *(f"tinytl saves fewer activations than {other}: {_less(saved, tiny, large_of(other))}" for other in OTHERS),
        *(
            f"the process of tinytl holds less than that of {other}: {_less(peak, tiny, large_of(other))}"
            for other in OTHERS
        ),
        f"tinytl reaches {spread(reached)} of full tuning's gain",
    ]


def _less(figures: Scores, one: str, other: str) -> str:
    shares = [a / b for a, b in zip(figures[one], figures[other], strict=True)]
    return f"{holds(figures[other], figures[one], form='+,.0f')} MiB; {spread(shares)} of it"


CLAIMS = (
    Claim(
        name="adapter-latency",
        says="bottleneck adapters add time to every answer, LoRA none once it is merged",
        paper="Hu et al. 2021, LoRA, arXiv 2106.09685, section 3 and table 1; Houlsby et al. 2019, arXiv 1902.00751",
        plan=answering,
        verdict=adapters_wait,
        shows=(LATENCY, MERGED),
        settings=("optim.steps=5", "batch.tokens=1024", "optim.lr=1e-3"),
        latency=True,
    ),
    Claim(
        name="tinytl",
        says="biases and lite residuals learn with fewer activations kept than LoRA or full tuning keep",
        paper="Cai et al. 2020, TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning, arXiv 2007.11622",
        plan=learning,
        verdict=little_is_kept,
        shows=(SAVED, PEAK, SKILLS_FILE),
        settings=SHORT,
        rates={"full": FULL_RATES, "lora": (2e-3, 5e-3, 1e-2), "tinytl": (3e-3, 1e-2, 3e-2)},
        measures={SAVED: saved_mib},
        each=50,
    ),
)
