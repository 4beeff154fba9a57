"""Claims about preferences and rewards: a model tuned on raw demonstrations (lab/alignment.py) learns what is better.

Every arm begins from the same start, the embedded base tuned on demonstrations and merged, made once for all of these claims;
a seed is one of all that comes after it, the reward model included. The true score is what the lab knows of an answer
(Request.worth), of answers drawn at temperature 1; the tasks are scored on the likeliest answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from fettle.core.config import validate
from fettle.core.files import MANIFEST, read_json
from fettle.evaluate import TaskFile
from fettle.export import export
from fettle.lab.alignment import CLUSTERS, HARMLESS, HELPFUL, demonstrations, items, preferences, prompts
from fettle.lab.claims.claim import CHOOSING, Claim, Found, Plan, Setting, holds, spread
from fettle.lab.rows import write_rows
from fettle.stages import load_recipe, open_model, run
from fettle.stages.recipes import recipe_file
from fettle.stages.tune import ARTIFACT
from fettle.stages.versus import FIGURES, Versus
from fettle.train import rewards
from fettle.train.log import read_metrics

START, WORTH = "start", "fettle.lab.alignment:worth"
TASKS, DEVELOPMENT = tuple(f"{kind}.jsonl" for kind in CLUSTERS), "development.jsonl"
TRUE, TRUE_START, REWARD, KL = "true score", "true score of the start", "reward over the start's", "KL (nats an answer)"
FALL, SECONDS = "fall of the true score", "seconds"
FEW_PAIRS = 120  # of a reward model that can be led astray
FEW = 1_000  # pairs with flipped ones among them, read several times, so that they can be learned by heart
LORA = "edits=[{kind: lora, rank: 16}]"
DEMONSTRATED, PREFERRED, ASKED = 6_000, 6_000, 3_000  # rows
POINTS = 0.05  # of a score: what "near" allows
SHORT = ("batch.tokens=1024", "optim.schedule=constant")
ROLLOUTS = "rollouts={prompts: 16, answers: 4, max_tokens: 24}"


# What is made once.


def started(setting: Setting) -> Path:
    """The model that every arm begins from: the base tuned on demonstrations, merged. Made once, and then read again."""
    place = setting.folder.parent / "starts" / "demonstrations"
    rows = demonstrations(setting.world, DEMONSTRATED)
    return tuned(place, rows, ["optim.steps=300", "batch.tokens=1024"])


def tuned(place: Path, rows: Iterable[dict], changes: Sequence[str]) -> Path:
    """The folder of the base tuned on `rows` and merged."""
    if not (place / "model" / "config.json").exists():
        write_rows(place / "rows.jsonl", rows)
        wanted = [*changes, f"data=[{{path: {place}/rows.jsonl}}]", "evaluate=[]", f"output={place}/run"]
        forest, edits = open_model(str(run(load_recipe(recipe_file("quickstart.yaml"), wanted), resume=True)))
        export(forest, edits, place / "model", "hf")
    return place / "model"


def reward_models(setting: Setting, start: Path, pairs: int, steps: int) -> str:
    """Train a reward model of `pairs` for each seed; returns where they lie, with {seed} for the seed."""
    folder, names = setting.folder / "rewards", []
    for seed in (*range(setting.seeds), CHOOSING):
        data = folder / "data" / f"{seed}.jsonl"
        write_rows(data, preferences(setting.world, pairs, seed=seed + 1))
        names = [
            f"model={start}", LORA, f"data=[{{path: {data}}}]", "objective={kind: reward, centre: 0.01}", "optim.lr=1e-3",
            f"optim.steps={steps}", "batch.tokens=1024", "evaluate=[]", f"seed={seed}", f"output={folder}/seed-{seed}",
        ]  # fmt: skip
        run(load_recipe(recipe_file("quickstart.yaml"), names), resume=True)
    return f"{folder}/seed-{{seed}}"


def on_requests(setting: Setting, arms: dict[str, list[str]], start: Path) -> Plan:
    """The arms from the start, scored on the three kinds of requests; writes those, and the development split."""
    folder, files = setting.folder / "data", {}
    for name, kinds, developed in (
        (DEVELOPMENT, CLUSTERS, True),
        *((f"{kind}.jsonl", (kind,), False) for kind in CLUSTERS),
    ):
        rows = (row for kind in kinds for row in items(setting.world, kind, setting.each, 0, developed))
        write_rows(folder / name, rows)
        files[name] = TaskFile(path=str(folder / name), max_tokens=24)
    whole = {arm: [f"model={start}", LORA, *SHORT, *changes] for arm, changes in arms.items()}
    return Plan(whole, [files[name] for name in TASKS], files[DEVELOPMENT], {START: str(start)})


def compared(setting: Setting, wrong: float = 0.0, rows: int = PREFERRED) -> str:
    """Preferences of which the share `wrong` is the other way round, a file a seed; returns `data=` with {seed} for the seed."""
    name = setting.folder / "data" / f"preferences-{wrong:g}"
    for seed in (*range(setting.seeds), CHOOSING):
        write_rows(Path(f"{name}-{seed}.jsonl"), preferences(setting.world, rows, seed=seed + 1, wrong=wrong))
    return f"data=[{{path: {name}-{{seed}}.jsonl}}]"


def reinforced(setting: Setting, reward: dict[str, Any], objective: str, rollouts: str = ROLLOUTS) -> list[str]:
    """An arm that learns from rewards of its own answers to requests."""
    file = setting.folder / "data" / "prompts.jsonl"
    write_rows(file, prompts(setting.world, ASKED))
    return [
        "kind=reinforce", f"data=[{{path: {file}}}]", f"reward={orjson.dumps(reward).decode()}", f"objective={objective}", rollouts,
    ]  # fmt: skip


# What a run came to.


def standings(place: Path, reward: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """[the start's, the policy's] figures on what is scored, by a stage of kind versus.

    `reward`: what is measured; default: the true score, and the reward model's where the run had one.
    """
    folder = place / "versus"
    if not (folder / FIGURES).exists():
        facts = read_json(place / ARTIFACT / MANIFEST)
        stage = {
            "start": facts["model"]["path"], "policies": [str(place)], "max_tokens": 24, "output": str(folder),
            "data": [{"path": task["path"]} for task in facts["recipe"]["evaluate"]],
            "reward": reward or watched(_reward_model(facts["recipe"])),
        }  # fmt: skip
        validate(Versus, stage, str(folder)).run(resume=True)
    found: list[dict[str, Any]] = read_json(folder / FIGURES)["standings"]
    return found


def watched(path: str | None) -> dict[str, Any]:
    """A reward model's number, with the true score beside it, which nobody learns from; without a model the true score alone."""
    true = {"kind": "function", "name": WORTH}
    terms = [{"weight": 1.0, "reward": {"kind": "model", "path": path}}] if path else []
    return {"kind": "sum", "terms": [*terms, {"weight": 0.0 if path else 1.0, "reward": true}]}


def true_score(place: Path) -> float:
    """The mean worth of a policy's answers."""
    return _true(standings(place)[1])


def true_start(place: Path) -> float:
    """That of the start's answers."""
    return _true(standings(place)[0])


def _true(standing: dict[str, Any]) -> float:
    return float(standing["rewards"].get(WORTH, standing["rewards"]["reward"])["mean"])


def reward_of(place: Path) -> float:
    """What the reward model gives a policy's answers more than those of the start: its own zero says nothing."""
    start, policy = (standing["rewards"]["reward"]["mean"] for standing in standings(place))
    return float(policy - start)


def divergence(place: Path, reward: dict[str, Any] | None = None) -> float:
    """Nats an answer from the start."""
    return float(standings(place, reward)[1]["kl"]["mean"])


def _reward_model(recipe: dict[str, Any]) -> str | None:
    """The reward model that a run learned from, where it did."""
    reward = recipe.get("reward") or {}
    paths = [r["path"] for r in (reward, *(t["reward"] for t in reward.get("terms", ()))) if r.get("kind") == "model"]
    return paths[0] if paths else None


def seconds(place: Path) -> float:
    """Of the run, and of the reward model's that it needed."""
    facts = read_json(place / ARTIFACT / MANIFEST)
    path = _reward_model(facts["recipe"])
    return float(facts["seconds"]) + (float(read_json(Path(path) / ARTIFACT / MANIFEST)["seconds"]) if path else 0.0)


def fall(place: Path, some: int = 5) -> float:
    """How far the true score of the training prompts' answers is at the end below its best, in means over `some` phases."""
    found = [row[f"reward_{WORTH}"] for row in rewards.phases(read_metrics(place))]
    means = np.convolve(found, np.ones(some) / some, "valid") if len(found) >= some else np.array(found)
    return float(means.max() - means[-1])


def overall(found: Found, arm: str) -> list[float]:
    """By seed, the mean score over the three kinds of requests."""
    return [float(np.mean(values)) for values in zip(*(found[task][arm] for task in TASKS), strict=True)]


# From demonstrations to an aligned model.

BETTER, BY_DPO, BY_PPO = "sft on the better answers", "dpo", "ppo"


def three_steps(setting: Setting) -> Plan:
    """PPO against a reward model, DPO, and tuning on the better answers alone, all of the same preferences."""
    start = started(setting)
    file = setting.folder / "data" / "better.jsonl"
    chosen = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences(setting.world, PREFERRED))
    write_rows(file, chosen)
    path = reward_models(setting, start, PREFERRED, 80)
    arms = {
        BETTER: [f"data=[{{path: {file}}}]", "optim.steps=100"],
        BY_DPO: [compared(setting), "objective={kind: dpo, beta: 0.1}", "optim.steps=100"],
        BY_PPO: [
            *reinforced(setting, watched(path), "{kind: ppo, kl: {beta: 0.05}}", ROLLOUTS[:-1] + ", passes: 2, parts: 2}"),
            "critic={start: reward}", "optim.steps=120",
        ],
    }  # fmt: skip
    return on_requests(setting, arms, start)


def aligned(found: Found) -> list[str]:
    """Against the start, against each other, and by kind of request."""
    total = {arm: overall(found, arm) for arm in (START, BETTER, BY_DPO, BY_PPO)}
    times = [p / d for p, d in zip(found[SECONDS][BY_PPO], found[SECONDS][BY_DPO], strict=True)]
    lines = [
        f"SFT, reward model, PPO beats its SFT: {holds(total[BY_PPO], total[START])}",
        f"dpo beats its SFT: {holds(total[BY_DPO], total[START])}",
        f"dpo is at most {POINTS:g} below ppo: {holds(total[BY_DPO], total[BY_PPO], -POINTS)}",
        f"dpo takes less time: {holds(times, [1.0] * len(times), form='+.2f')}; ppo and its reward model take {spread(times)} times as long",
        f"ppo beats tuning on the better answers: {holds(total[BY_PPO], total[BETTER])}",
    ]
    for arm in (BY_PPO, BY_DPO):
        harmless, helpful = found[f"{HARMLESS}.jsonl"], found[f"{HELPFUL}.jsonl"]
        lines += [
            f"{arm}: harmless answers rise: {holds(harmless[arm], harmless[START])}",
            f"{arm}: helpful ones are at most {POINTS:g} lower: {holds(helpful[arm], helpful[START], -POINTS)}",
        ]
    return lines


# What holds a policy.

BETAS = {"beta 0": 0.0, "beta 0.05": 0.05, "beta 0.5": 0.5}


def held(setting: Setting) -> Plan:
    """RLOO against a reward model of few pairs, at growing beta."""
    start = started(setting)
    path = reward_models(setting, start, FEW_PAIRS, 40)
    arms = {
        arm: [
            *reinforced(setting, watched(path), f"{{kind: rloo, kl: {{beta: {beta}, limit: 1000}}}}"), "optim.steps=60", "optim.lr=1e-3",
        ]
        for arm, beta in BETAS.items()
    }  # fmt: skip
    return on_requests(setting, arms, start)


def traded(found: Found) -> list[str]:
    """Divergence and reward from beta to beta; the true score at its best, at the end, and with a beta."""
    free, some, much = BETAS
    kl, reward, true = found[KL], found[REWARD], found[TRUE]
    return [
        f"KL falls from {free} to {some}: {holds(kl[free], kl[some], form='+.2f')}",
        f"KL falls from {some} to {much}: {holds(kl[some], kl[much], form='+.2f')}",
        f"the reward falls from {free} to {some}: {holds(reward[free], reward[some])}",
        f"the reward falls from {some} to {much}: {holds(reward[some], reward[much])}",
        f"with {free} the true score ends below its best: {holds(found[FALL][free], [POINTS] * len(true[free]))} (by more than {POINTS:g})",
        f"with {free} the true score falls below that of the start: {holds(found[TRUE_START][free], true[free])}",
        f"{some} keeps more of the true score than {free}: {holds(true[some], true[free])}",
    ]


# Labels with noise.

NOISE = (0.2, 0.4)
NOISY_RATES = (1e-4, 3e-4, 1e-3)
LOSSES = {"dpo": "{{kind: dpo, beta: 0.1}}", "cdpo": "{{kind: cdpo, beta: 0.1, noise: {noise}}}",
          "robust": "{{kind: robust, beta: 0.1, noise: {noise}}}"}  # fmt: skip


def noisy_arm(loss: str, noise: float) -> str:
    """The name of an arm."""
    return f"{loss}, {noise:.0%} flipped"


def noisy(setting: Setting) -> Plan:
    """DPO on labels of which none, a fifth and two fifths are flipped; where some are, cDPO and robust DPO that know how many."""
    start = started(setting)
    arms = {noisy_arm("dpo", 0.0): [compared(setting, 0.0, FEW), f"objective={LOSSES['dpo'].format()}"]}
    for noise in NOISE:
        data = compared(setting, noise, FEW)
        arms |= {
            noisy_arm(name, noise): [data, f"objective={loss.format(noise=noise)}"] for name, loss in LOSSES.items()
        }
    return on_requests(setting, {arm: [*changes, "optim.steps=100"] for arm, changes in arms.items()}, start)


def robust_to_noise(found: Found) -> list[str]:
    """What flips cost DPO, and what the two others keep."""
    clean = overall(found, noisy_arm("dpo", 0.0))
    lines = [f"dpo without flips beats its start: {holds(clean, overall(found, START))}"]
    for noise in NOISE:
        plain = overall(found, noisy_arm("dpo", noise))
        lines.append(f"flips of {noise:.0%} cost dpo something: {holds(clean, plain)}")
        for loss in ("cdpo", "robust"):
            lines.append(
                f"{loss} beats dpo with {noise:.0%} flipped: {holds(overall(found, noisy_arm(loss, noise)), plain)}"
            )
    return lines


CLAIMS = (
    Claim(
        name="rlhf",
        says="demonstrations, a reward model and PPO beat demonstrations alone, harmless answers rise and helpful ones stay; "
        "DPO comes near it in a fraction of the time",
        paper="Ouyang et al. 2022, InstructGPT, arXiv 2203.02155, figure 1; Bai et al. 2022, arXiv 2204.05862, section 4; "
        "Rafailov et al. 2023, DPO, arXiv 2305.18290, figures 2 and 3",
        plan=three_steps,
        verdict=aligned,
        shows=(*TASKS, TRUE, KL, SECONDS),
        rates={BETTER: (1e-3, 3e-3, 1e-2), BY_DPO: (1e-4, 3e-4, 1e-3), BY_PPO: (2e-4, 5e-4, 1e-3)},
        measures={TRUE: true_score, KL: divergence, SECONDS: seconds},
        each=60,
    ),
    Claim(
        name="kl",
        says="beta trades divergence for reward; without it the reward of a weak model is over-optimised",
        paper="Gao et al. 2022, Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760, figures 1 and 9; "
        "Ziegler et al. 2019, arXiv 1909.08593, section 4",
        plan=held,
        verdict=traded,
        shows=(TRUE, REWARD, KL, FALL, *TASKS),
        measures={TRUE: true_score, TRUE_START: true_start, REWARD: reward_of, KL: divergence, FALL: fall},
        each=40,
    ),
    Claim(
        name="noisy-labels",
        says="flipped labels cost DPO, and cost cDPO and robust DPO less",
        paper="Chowdhury et al. 2024, Provably Robust DPO, arXiv 2403.00409, table 1; Mitchell 2023, A note on DPO with noisy "
        "preferences",
        plan=noisy,
        verdict=robust_to_noise,
        shows=TASKS,
        rates=dict.fromkeys(
            (noisy_arm("dpo", 0.0), *(noisy_arm(name, n) for n in NOISE for name in LOSSES)), NOISY_RATES
        ),
        each=40,
    ),
)
