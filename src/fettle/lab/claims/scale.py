"""A claim about size: prompt tuning closes in on full tuning as the model grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fettle.export import export
from fettle.lab.base import TINY
from fettle.lab.claims.claim import Claim, Found, Plan, Setting, gains, holds, spread
from fettle.lab.claims.quality import FULL, SHORT
from fettle.lab.claims.skills import SKILLS_FILE, on_skills
from fettle.lab.corpus import write_corpus
from fettle.stages import load_recipe, open_model, run
from fettle.stages.recipes import recipe_file

DOCUMENTS = 24_000  # what 2,000 steps read once
PRETRAINING = ("optim.steps=2000", "optim.warmup=100", "batch.tokens=2048")
EMBEDDED = "6.7M"
# Smaller models of the embedded base's family, by their weights; each takes a few minutes on one core.
SIZES: dict[str, dict[str, int]] = {
    "0.8M": {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256},
    "2.5M": {"hidden_size": 160, "num_hidden_layers": 6, "intermediate_size": 432},
}
PROMPT = "{kind: prompt_tuning, tokens: 20}"


def pretrained(setting: Setting, size: str) -> Path:
    """The folder of a base of this size, pretrained by recipes/lab/base.yaml (going on where it was stopped)."""
    folder = setting.folder / "bases" / size
    if (folder / "model" / "config.json").exists():
        return folder / "model"
    corpus = setting.folder / "bases" / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, setting.world, 0, DOCUMENTS)
    changes = [
        *(f"model.config.{key}={value}" for key, value in SIZES[size].items()), f"model.tokenizer={TINY}",
        *PRETRAINING, f"data=[{{path: {corpus}, format: text}}]", f"cache={setting.folder}/bases/cache", f"output={folder}",
    ]  # fmt: skip
    forest, edits = open_model(str(run(load_recipe(recipe_file("lab/base.yaml"), changes), resume=True)))
    export(forest, edits, folder / "model", "hf")
    return folder / "model"


def sizes(setting: Setting) -> Plan:
    """Full and prompt tuning of each size; every base untuned is a control."""
    bases = {size: str(pretrained(setting, size)) for size in SIZES} | {EMBEDDED: "fettle/tiny"}
    arms: dict[str, Sequence[str]] = {
        arm_of(method, size): [f"model={path}", f"edits=[{edit}]"]
        for size, path in bases.items()
        for method, edit in (("full", FULL), ("prompt", PROMPT))
    }
    controls = {control_of(size): path for size, path in bases.items()}
    return replace(on_skills(setting, arms), controls=controls)


def arm_of(method: str, size: str) -> str:
    """The name of an arm."""
    return f"{method}, {size}"


def control_of(size: str) -> str:
    """The name of a base as it is."""
    return f"untuned, {size}"


def closing_in(found: Found) -> list[str]:
    """How much of full tuning's gain a prompt reaches, from size to size."""
    scores = found[SKILLS_FILE]
    reached = {
        size: gains(scores[arm_of("prompt", size)], scores[arm_of("full", size)], scores[control_of(size)])
        for size in (*SIZES, EMBEDDED)
    }
    small, middle, large = reached
    return [
        "share of full tuning's gain that a prompt reaches: "
        + "; ".join(f"{size} {spread(values)}" for size, values in reached.items()),
        f"it grows from {small} to {large}: {holds(reached[large], reached[small])}",
        f"it grows from {small} to {middle}: {holds(reached[middle], reached[small])}",
        f"it grows from {middle} to {large}: {holds(reached[large], reached[middle])}",
    ]


CLAIMS = (
    Claim(
        name="prompt-tuning-scale",
        says="prompt tuning closes in on full tuning as the model grows",
        paper="Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, figure 1",
        plan=sizes,
        verdict=closing_in,
        shows=(SKILLS_FILE,),
        settings=SHORT,
        rates={
            arm_of(method, size): rates
            for size in (*SIZES, EMBEDDED)
            for method, rates in (("full", (1e-3, 3e-3)), ("prompt", (0.1, 0.3, 1.0)))
        },
        each=50,
    ),
)
