"""Claims: what a verdict says, how a learning rate is chosen, that no evaluated item is trained on or chosen by."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.lab.claims import CLAIMS, alignment, find, running, scale, skills, verifier
from fettle.lab.claims.claim import SHARE, Claim, Plan, Setting, gains, holds, interval
from fettle.lab.families import FAMILIES, Family
from fettle.lab.world import World
from fettle.stages.compare import Outcome


def outcome(arm: str, seed: int = 0, score: float | None = 0.5, loss: float = 1.0, **more: Any) -> Outcome:
    scores = {} if score is None else {"skills.jsonl": (score, score, score)}
    made = Outcome(arm, seed, 10, 1000, 2**29, 0.1, loss, 1.2, None, scores)
    return replace(made, **more)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


# Verdicts.


@pytest.mark.parametrize(
    ("better", "worse", "least", "said"),
    [
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], 0.0, "holds"),
        ([0.5, 0.6, 0.5], [0.4, 0.5, 0.6], 0.0, "inconclusive"),
        ([0.4, 0.5, 0.6], [0.5, 0.6, 0.6], 0.0, "does not hold here"),
        ([0.5], [0.5], 0.0, "does not hold here"),  # no better is not better
        ([0.495, 0.5, 0.505], [0.5, 0.5, 0.5], -0.01, "holds"),  # at most a point below
        ([0.48, 0.5, 0.51], [0.5, 0.5, 0.5], -0.01, "inconclusive"),
        ([0.48, 0.48, 0.495], [0.5, 0.5, 0.5], -0.01, "does not hold here"),
    ],
)
def test_a_claim_holds_where_every_seed_agrees(
    better: list[float], worse: list[float], least: float, said: str
) -> None:
    assert holds(better, worse, least).startswith(f"{said} (")


def test_gains_are_shares_of_the_way_by_seed() -> None:
    assert gains([0.5, 0.9, 0.2], [0.9, 0.9, 0.1], [0.1, 0.5, 0.1]) == pytest.approx([0.5, 1.0, 0.0])


def test_an_interval_lies_within_the_seeds() -> None:
    low, high = interval([0.2, 0.4, 0.9])
    assert 0.2 <= low < 0.5 < high <= 0.9
    assert interval([0.3]) == (0.3, 0.3)


# Items.


def numbers() -> Family:
    """A family whose prompts tell their item."""

    def make(rng: random.Random, world: World) -> tuple[dict[str, str], str]:
        number = str(rng.randrange(600))
        return {"x": number}, number

    return Family("numbers", "numbers", "en", tuple(f"Say it in way {w}: {{x}}." for w in "abcdefgh"), make)


def test_no_item_is_on_two_sides() -> None:
    """Trained on, of the development split, evaluated: by what is asked, whatever the wording."""
    world, family = World.build(0), numbers()
    prompts = {
        "trained": [row["prompt"] for row in skills.trained(world, [family], 3000)],
        "development": [row["prompt"] for row in skills.evaluated(world, family, 100, True)],
        "evaluated": [row["prompt"] for row in skills.evaluated(world, family, 100, False)],
    }
    items = {side: {prompt.split(": ")[1] for prompt in found} for side, found in prompts.items()}
    print({side: len(found) for side, found in items.items()})
    assert min(len(found) for found in items.values()) > 15
    assert sum(len(found) for found in items.values()) == len(set.union(*items.values()))
    assert not any(" way g" in p or " way h" in p for found in prompts.values() for p in found)


def test_training_rows_hold_no_kept_item_and_end_with_the_answer() -> None:
    world, families = World.build(0), [FAMILIES[name] for name in skills.SKILLS]
    rows = list(skills.trained(world, families, 600))
    assert rows == list(skills.trained(world, families, 600))
    kept = {r["prompt"] for f in families for d in (True, False) for r in skills.evaluated(world, f, 60, d)}
    assert not kept & {row["prompt"] for row in rows}
    assert all(row["prompt"].endswith("\nAnswer:") and row["completion"].startswith(" ") for row in rows)


# Learning rates.


def test_the_best_rate_is_the_best_score_and_then_the_lower_loss() -> None:
    tried = {
        1e-3: outcome("a", score=0.4),
        1e-2: outcome("a", score=0.6, loss=0.9),
        1e-1: outcome("a", score=0.6, loss=0.7),
    }
    assert running.best_rate("a", tried) == 1e-1
    with pytest.raises(FettleError, match="'a' ended with none of its learning rates"):
        running.best_rate("a", {})


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every comparison asked for; the score of a run is its learning rate, and 0.2 where there is none."""
    calls: list[dict[str, Any]] = []

    def compare(
        recipe: Path, arms: Any, folder: Path, overrides: Sequence[str], seeds: int, latency: bool, console: Any, first: int = 0
    ) -> list[Outcome]:  # fmt: skip
        calls.append({"arms": arms, "folder": folder, "overrides": overrides, "seeds": seeds, "first": first})
        found = []
        for arm, changes in arms.items():
            rate = next((float(c.partition("=")[2]) for c in changes if c.startswith("optim.lr=")), 0.2)
            found += [outcome(arm, seed, rate) for seed in range(first, first + seeds)]
        return found

    monkeypatch.setattr(running, "compare", compare)
    monkeypatch.setattr(
        running, "_controls", lambda plan: {Path(t.path).name: dict.fromkeys(plan.controls, 0.1) for t in plan.evaluate}
    )  # fmt: skip
    monkeypatch.setattr(running, "FOLDER", tmp_path / "claims")
    monkeypatch.setattr(skills, "ROWS", 40)
    monkeypatch.setattr(verifier, "ROWS", 40)
    for rows in ("PREFERRED", "ASKED", "FEW"):
        monkeypatch.setattr(alignment, rows, 40)
    return calls


def test_rates_are_chosen_by_other_runs_on_other_items(ran: list[dict[str, Any]]) -> None:
    claim = replace(find("bitfit"), rates={"bitfit": (0.3, 0.5, 0.4)})
    said = io.StringIO()
    folder = running.run(claim, 2, 1, ["optim.steps=7"], Console(file=said, width=200))
    chosen, measured = ran
    assert (chosen["first"], chosen["seeds"], measured["first"], measured["seeds"]) == (1000, 1, 0, 2)
    assert "development.jsonl" in chosen["overrides"][-1] and "skills.jsonl" not in chosen["overrides"][-1]
    assert "skills.jsonl" in measured["overrides"][-1] and "development.jsonl" not in measured["overrides"][-1]
    for arm in measured["arms"].values():
        assert [c for c in arm if c.startswith("optim.steps")][-1] == "optim.steps=7"
    assert list(chosen["arms"]) == ["bitfit at 0.3", "bitfit at 0.5", "bitfit at 0.4"]
    assert measured["arms"]["bitfit"][-1] == "optim.lr=0.5" and "optim.lr" not in str(measured["arms"]["full"])
    assert "bitfit: 0.5 (at the edge of what was tried)" in said.getvalue()
    told = json.loads((folder / "verdicts.json").read_text())
    assert told["rates"]["bitfit"] == {"taken": 0.5, "tried": {"0.3": 0.3, "0.5": 0.5, "0.4": 0.4}}
    assert told["figures"]["skills.jsonl"] == {"base, untuned": [0.1, 0.1], "full": [0.2, 0.2], "bitfit": [0.5, 0.5]}
    assert (folder / "verdicts.png").stat().st_size > 1000
    running.run(claim, 2, 1, ["optim.lr=0.9"], Console(file=said))
    assert len(ran) == 3 and all(arm[-1] == "optim.lr=0.9" for arm in ran[-1]["arms"].values())
    with pytest.raises(FettleError, match="'evaluate' is the claim's own"):
        running.run(claim, 2, 1, ["evaluate=[]"], Console(file=said))
    assert folder.name != "bitfit"  # a run with changes does not stand where the claim's own would


# Every claim.


@pytest.mark.parametrize("name", [n for n in CLAIMS if n != "instruction-tuning"])
def test_every_verdict_reads_what_its_plan_compares(
    name: str, ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With figures at hand for every arm: no verdict asks for an arm, an evaluation or a rate that is not there."""
    monkeypatch.setattr(scale, "pretrained", lambda setting, size: tmp_path / size)
    for group in (alignment, verifier):
        monkeypatch.setattr(group, "tuned", lambda place, rows, changes: tmp_path / "start")
    monkeypatch.setattr(alignment, "reward_models", lambda *_: f"{tmp_path}/reward-{{seed}}")
    claim = find(name)
    claim = replace(claim, measures={key: lambda place: float(len(str(place))) for key in claim.measures})
    plan = claim.plan(Setting(tmp_path, World.build(0), 2, 1))
    assert set(claim.rates) <= set(plan.arms) and (plan.development is not None or not claim.rates)
    scored = [Path(task.path).name for task in plan.evaluate]
    merged = [
        outcome(arm, seed, merged_latency=1.0, scores=dict.fromkeys(scored, (s, s, s)))
        for arm in plan.arms
        for seed, s in ((0, 0.3), (1, 0.4))
    ]
    found = running.collect(claim, plan, merged, tmp_path, 2)
    verdicts = claim.verdict(found)
    assert verdicts and all(isinstance(line, str) and ":" in line or "reaches" in line for line in verdicts)
    assert set(claim.shows) <= set(found.figures)
    console = quiet()
    console.print(running.table(claim, found))
    assert all(arm in console.file.getvalue() for arm in plan.arms)  # type: ignore[attr-defined]


def test_rewards_by_chance_say_nothing_and_stay_the_same() -> None:
    answers = [str(i) for i in range(400)]
    found = verifier.chance(["q"] * 400, answers, answer=answers)
    assert found == verifier.chance(["q"] * 400, answers) and set(found) == {0.0, 1.0} and 160 < sum(found) < 240


def test_the_fall_is_from_the_best_mean_of_some_phases(tmp_path: Path) -> None:
    true = [0.1, 0.5, 0.9, 0.9, 0.6, 0.3]
    rows = [
        {"step": 2 * i + j, "phase": i + 1, f"reward_{alignment.WORTH}": t} for i, t in enumerate(true) for j in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert alignment.fall(tmp_path, 2) == pytest.approx(0.9 - 0.45)


def test_what_a_run_took_counts_the_reward_model_that_it_needed(tmp_path: Path) -> None:
    for name, recipe, seconds in (
        ("reward", {}, 30.0),
        ("dpo", {"objective": {"kind": "dpo"}}, 5.0),
        ("ppo", {"reward": alignment.watched(str(tmp_path / "reward"))}, 50.0),
    ):
        (tmp_path / name / "artifact").mkdir(parents=True)
        (tmp_path / name / "artifact" / "manifest.json").write_text(json.dumps({"recipe": recipe, "seconds": seconds}))
    assert [alignment.seconds(tmp_path / name) for name in ("dpo", "ppo")] == [5.0, 80.0]


def test_an_arm_without_every_seed_ends_the_claim(ran: list[dict[str, Any]], tmp_path: Path) -> None:
    plan = Plan({"a": [], "b": []})
    claim = Claim("c", "says", "paper", lambda s: plan, lambda f: [], (SHARE,))
    with pytest.raises(FettleError, match="c: the arm 'b' did not end with every seed"):
        running.collect(claim, plan, [outcome("a"), outcome("a", 1), outcome("b")], tmp_path, 2)
    whole = [outcome(arm, seed) for arm in "ab" for seed in (0, 1)]
    assert running.collect(claim, plan, whole, tmp_path, 2)[SHARE] == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_a_name_that_is_no_claim_is_told_the_nearest() -> None:
    with pytest.raises(FettleError, match="no claim 'lore'.*lora"):
        find("lore")


def test_a_smaller_base_is_pretrained_once_and_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fettle.stages import open_model

    monkeypatch.setattr(scale, "DOCUMENTS", 30)
    monkeypatch.setattr(scale, "PRETRAINING", ("optim.steps=2", "batch.tokens=128"))
    setting = Setting(tmp_path, World.build(0), 1, 1)
    folder = scale.pretrained(setting, "0.8M")
    forest, _ = open_model(str(folder))
    weights = sum(p.numel() for p in forest.model.parameters())
    assert round(weights / 1e6, 1) == 0.8 and np.isfinite(forest.model.lm_head.weight.float().norm().item())
    monkeypatch.setattr(scale, "run", lambda *_, **__: pytest.fail("it is there"))
    assert scale.pretrained(setting, "0.8M") == folder
