"""The stage: who shares what in memory, what is refused, what a check shows, several stages in a row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.feedback.rewards import LengthReward
from fettle.models.critic import NAME, values_of
from fettle.models.memory import worst_batch
from fettle.stages.artifact import open_artifact
from fettle.stages.cast import Cast
from fettle.stages.check import check
from fettle.stages.pipeline import load_recipe, run
from fettle.stages.reinforce import Reinforce

PAIRS = [
    {"prompt": f"Count to {i}.", "chosen": "one two three", "rejected": "yes no maybe " * (1 + i % 2)} for i in range(8)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"Count to {i}."}], "answer": str(i)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    talks = [{"messages": [*row["messages"], {"role": "assistant", "content": "one two"}]} for row in rows]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    return tmp_path


def stage(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "reinforce", "model": {"path": str(model), "dtype": "float32"}, "edits": [{"kind": "lora", "rank": 2}],
        "data": [{"path": str(folder / "prompts.jsonl")}], "reward": {"kind": "length", "most": 2, "per": 2},
        "rollouts": {"prompts": 2, "answers": 2, "max_tokens": 4}, "optim": {"lr": 1e-2, "steps": 2},
        "batch": {"tokens": 96}, "output": str(folder / "rl"), **changes,
    }  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> Any:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(data))
    return load_recipe(file)


def three(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """SFT, a reward model on it, PPO from SFT by that reward."""
    usual: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"}, "edits": [{"kind": "lora", "rank": 2}],
        "optim": {"lr": 1e-2, "steps": 2}, "batch": {"tokens": 96},
    }  # fmt: skip
    sft = usual | {"data": [{"path": str(folder / "talks.jsonl")}], "output": str(folder / "sft")}
    reward = usual | {
        "data": [{"path": str(folder / "pairs.jsonl"), "chat": True}], "objective": {"kind": "reward"},
        "output": str(folder / "reward"),
    }  # fmt: skip
    del reward["model"]
    policy = stage(folder, model, reward={"kind": "model", "path": str(folder / "reward")}, parent=str(folder / "sft"),
                   objective={"kind": "ppo"}, **changes)  # fmt: skip
    del policy["model"]
    return {"stages": [sft, reward, policy]}


def cast_of(pipeline: Any, parent: Path | None = None) -> Cast:
    recipe = pipeline.stages[-1]
    assert isinstance(recipe, Reinforce)
    return recipe.cast(recipe._parent(parent))


def storages(model: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}


def test_it_runs_and_leaves_a_policy_without_its_critic(folder: Path, tiny_llama: Path) -> None:
    done = run(read(folder, stage(folder, tiny_llama, objective={"kind": "ppo"})))
    forest, edits = open_artifact(done)
    assert [e.kind for e in edits] == ["lora"] and not hasattr(forest.model, NAME)
    report = (folder / "rl" / "report.md").read_text()
    assert "## Rewards" in report and "KL from the reference" in report and (folder / "rl" / "reward.png").exists()
    rows = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "kl", "entropy", "clipped", "length", "gap", "value_loss"} <= rows[-1].keys()


def test_policy_reference_critic_and_reward_share_one_base(folder: Path, tiny_llama: Path) -> None:
    """After the three stages: beside the base's weights there are only edits and heads."""
    pipeline = read(folder, three(folder, tiny_llama))
    run(pipeline)
    people = cast_of(pipeline)
    (reward,) = people.rewards.values()
    critic = getattr(people.policy.model, NAME)
    base = {
        id(p): n
        for n, p in people.policy.model.named_parameters()
        if not p.requires_grad and not n.endswith((".a", ".b"))
    }
    assert len(base) > 10
    for tree in (reward.model, critic.model):
        own = [n for n, p in tree.named_parameters() if id(p) not in base]
        assert own and all(n.endswith((".a", ".b", "score.weight")) for n in own), own
    trained = {n for n, p in people.policy.model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".a", ".b", "head.weight", "head.bias")) for n in trained)
    assert not any(p.requires_grad for p in reward.model.parameters())
    assert storages(reward.model) & storages(people.policy.model)
    found = json.loads((folder / "rl" / "artifact" / "manifest.json").read_text())
    assert [e["kind"] for e in found["edits"]] == ["lora", "lora"], "SFT's, and the policy's own"


def test_a_shared_reward_model_scores_as_one_of_its_own(folder: Path, tiny_llama: Path) -> None:
    pipeline = read(folder, three(folder, tiny_llama))
    run(pipeline)
    shared = cast_of(pipeline).rewards[str(folder / "reward")]
    alone, _ = open_artifact(folder / "reward" / "artifact")
    from fettle.feedback.model import model_scores

    asked, answers = ["Count."] * 3, ["one", "two three", "no no no"]
    one, other = model_scores(shared, asked, answers), model_scores(alone, asked, answers)
    assert one == pytest.approx(other, abs=1e-6) and len(set(one)) == 3


def test_the_tools_of_a_prompt_reach_the_reward(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Count."}], "tools": tools, "offered": 5}
        for tools in ('[{"name": "add"}]', "")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (recipe,) = read(folder, stage(folder, tiny_llama, batch={"tokens": 512})).stages
    people, seen = recipe.cast(None), []
    monkeypatch.setattr(LengthReward, "rate", lambda self, asked: seen.append(asked) or [0.0] * len(asked.answers))
    prompts = recipe.prompts(people.policy).sources[0]
    recipe.scorer(people)(prompts, ["one", "two"])
    assert [[*tools] for tools in seen[0].offered] == [[{"type": "function", "function": {"name": "add"}}], []]
    assert seen[0].facts["tools"] == ['[{"name": "add"}]', ""], "and functions have the column as it is"
    assert seen[0].facts["offered"] == [5, 5], "as any other, whatever the tools are called"


def test_a_critic_may_begin_as_the_reward_model(folder: Path, tiny_llama: Path) -> None:
    pipeline = read(folder, three(folder, tiny_llama, critic={"start": "reward"}))
    run(pipeline)
    people = cast_of(pipeline)
    critic, (reward,) = getattr(people.policy.model, NAME), people.rewards.values()
    assert torch.equal(critic.head.weight, reward.model.score.weight) and critic.head.weight.norm() > 0
    assert not {id(p) for p in critic.parameters() if p.requires_grad} & {id(p) for p in reward.model.parameters()}


@pytest.mark.parametrize("kind", ["full", "bitfit", "norms", "prompt_tuning", "lora"])
def test_the_reference_stays_where_the_policy_began(kind: str, folder: Path, tiny_llama: Path) -> None:
    """Whether what trains can be switched off, or is the base's own and the reference and the critic need copies."""
    people = cast_of(read(folder, stage(folder, tiny_llama, edits=[{"kind": kind}], objective={"kind": "ppo"})))
    batch = worst_batch(32, 2)
    batch.tokens[:] = torch.arange(32)
    with people.reference() as forest, torch.no_grad():
        before = forest.logps(batch)
    with torch.no_grad():
        values = values_of(people.policy, batch)
        for name, parameter in people.policy.model.named_parameters():
            if parameter.requires_grad and not name.startswith(NAME):
                parameter.add_(0.1 * torch.randn_like(parameter))
        moved = people.policy.logps(batch)
        assert torch.equal(values_of(people.policy, batch), values)
    with people.reference() as forest, torch.no_grad():
        assert torch.allclose(forest.logps(batch), before, atol=1e-6)
    assert not torch.allclose(moved, before, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edits": [{"kind": "lora", "dropout": 0.1}]}, "ratio to itself must be 1"),
        ({"optim": {"steps": 2, "accumulate": 4}}, r"optim\.accumulate: a step takes as many batches"),
        ({"objective": {"kind": "reinforce"}, "rollouts": {"passes": 2}}, "takes one step a phase"),
        ({"rollouts": {"prompts": 2, "parts": 3}}, "2 prompts cannot be cut into 3 parts"),
        ({"critic": {"edits": []}}, "grpo has none"),
        ({"objective": {"kind": "dpo"}}, "unknown kind 'dpo'"),
        ({"reward": {"kind": "numbre"}}, "did you mean 'number'"),
        ({"validation": {"data": [{"path": "x"}]}}, "no held-out loss of a reward"),
        ({"rollout": {}}, "did you mean 'rollouts'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(
    changes: dict[str, Any], said: str, folder: Path, tiny_llama: Path
) -> None:
    with pytest.raises(FettleError, match=said):
        read(folder, stage(folder, tiny_llama, **changes))


def test_an_objective_of_rollouts_is_no_tuning(folder: Path, tiny_llama: Path) -> None:
    data = {"data": [{"path": "x"}], "edits": [{"kind": "lora"}], "objective": {"kind": "grpo"}, "output": "y"}
    with pytest.raises(FettleError, match="grpo learns from the model's own answers; say kind: reinforce"):
        read(folder, data)


@pytest.mark.parametrize("spelt", ["{}", "./{}", "{}/", "{}/artifact", "x/../{}", "ABSOLUTE/{}", "link/{}"])
def test_an_output_may_be_spelt_in_any_way(
    spelt: str, folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check, before any of it is there, begins from the parent's edits and says what it waits for; a run finds all."""
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to(folder, target_is_directory=True)
    (folder / "x").mkdir()
    sft, reward = (spelt.replace("ABSOLUTE", str(folder)).format(name) for name in ("sft", "reward"))
    recipe = three(folder, tiny_llama)
    for stage, name in zip(recipe["stages"], ("sft", "reward", "rl"), strict=True):
        stage["output"] = name
    recipe["stages"][2] |= {"parent": sft, "reward": {"kind": "model", "path": reward}}
    tuned = {**recipe["stages"][1], "objective": {"kind": "dpo", "reference": sft}, "output": "dpo"}
    recipe["stages"].append(tuned)
    seen = io.StringIO()
    reports = check(read(folder, recipe), 0, Console(file=seen, width=400), time_steps=False)
    assert [report.ok for report in reports] == [True] * 3
    assert f"{reward} is not there yet" in " ".join(reports[2].notes)
    assert f"note: {sft} is not there yet; check this stage again" in seen.getvalue()
    run(read(folder, recipe))
    assert (folder / "dpo" / "artifact").exists()


@pytest.mark.parametrize(
    ("place", "changes", "said"),
    [
        (2, {"reward": {"kind": "model", "path": "rewrad"}}, "reward: rewrad holds no artifact, and no stage before"),
        (2, {"parent": "sfd"}, "parent: sfd holds no artifact, and no stage before"),
        (2, {"mix": {"data": [{"path": "none.jsonl"}]}}, r"mix\.data\.0\.path: none\.jsonl: no such file"),
        (1, {"objective": {"kind": "dpo", "reference": "nowhere"}}, r"objective\.reference: 'nowhere' is neither"),
        (
            1,
            {"objective": {"kind": "distill", "teacher": "nowhere"}},
            r"objective\.teacher\.path: 'nowhere' is neither",
        ),
        (1, {"edits": [{"kind": "bitdelta", "tuned": "nowhere"}]}, r"edits\.0\.tuned: 'nowhere' is neither"),
    ],
)
def test_what_a_later_stage_cannot_have_is_said_before_the_first_one_runs(
    place: int, changes: dict[str, Any], said: str, folder: Path, tiny_llama: Path
) -> None:
    recipe = three(folder, tiny_llama)
    recipe["stages"][place] |= changes
    pipeline = read(folder, recipe)
    with pytest.raises(FettleError, match=said):
        run(pipeline)
    assert not (folder / "sft").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": {"kind": "model", "path": "nowhere"}}, "nowhere holds no artifact"),
        ({"parent": "nowhere"}, "parent: nowhere holds no artifact"),
        ({"batch": {"tokens": 8}, "rollouts": {"max_tokens": 8}}, "leaves no room for a prompt in a row of 8 tokens"),
        ({"batch": {"tokens": 20}}, r"there is room for 16 before an answer"),
        ({"reward": {"kind": "number", "column": "solution"}}, "needs the column 'solution'"),
    ],
)
def test_what_a_run_cannot_have_is_one_sentence(
    changes: dict[str, Any], said: str, folder: Path, tiny_llama: Path
) -> None:
    pipeline = read(folder, stage(folder, tiny_llama, **changes))
    with pytest.raises(FettleError, match=said):
        run(pipeline)


def test_a_reward_model_of_another_base_is_refused_unless_it_may_read_text(
    folder: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.embed_tokens.weight.data.add_(0.01)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(other)
    data = three(folder, other)
    run(read(folder, {"stages": data["stages"][:2]}))
    policy = stage(folder, tiny_llama, reward={"kind": "model", "path": str(folder / "reward")})
    with pytest.raises(FettleError, match="another base .* share: false"):
        run(read(folder, policy))
    run(read(folder, policy | {"share": False}))


def test_a_reward_model_without_a_head_is_refused_before_anything_is_written(folder: Path, tiny_llama: Path) -> None:
    run(read(folder, {"stages": three(folder, tiny_llama)["stages"][:1]}))
    policy = stage(folder, tiny_llama, reward={"kind": "model", "path": str(folder / "sft")})
    with pytest.raises(FettleError, match=r"reward '.*sft': .* has no head of one number; train one with"):
        read(folder, policy).stages[0].cast(None)


def test_a_policy_after_a_reward_model_says_its_parent(folder: Path, tiny_llama: Path) -> None:
    data = three(folder, tiny_llama)
    del data["stages"][2]["parent"]
    with pytest.raises(FettleError, match="can be no policy; .* say parent"):
        run(read(folder, data))


def test_a_check_shows_answers_and_rewards(folder: Path, tiny_llama: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    (report,) = check(read(folder, stage(folder, tiny_llama)), 2, console)
    text = console.export_text()
    assert report.ok and report.step_seconds is not None and report.steps == 2
    assert "what it answers now" in text and "Count to" in text and "2 prompts x 2 answers of up to 4 tokens" in text
    assert report.memory.total > 0 and not (folder / "rl").exists()


def test_a_check_looks_ahead_of_what_has_not_run(folder: Path, tiny_llama: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    reports = check(read(folder, three(folder, tiny_llama)), 1, console, time_steps=False)
    assert [r.ok for r in reports] == [True] * 3
    assert any("reward is not there yet" in note for note in reports[2].notes)
    assert reports[2].trained > reports[0].trained, "the policy's edits and its critic's"


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce", "best_of"])
def test_a_policy_learns_what_is_rewarded(kind: str, folder: Path, tiny_llama: Path) -> None:
    """The share of the letter e in its answers, which chance leaves where it is, rises by more than a half in ten steps."""
    (folder / "letters.py").write_text(
        "def e(prompts, answers, **c):\n    return [a.count('e') / max(len(a), 1) for a in answers]\n"
    )
    data = stage(
        folder, tiny_llama, edits=[{"kind": "full"}], objective={"kind": kind, "kl": {"beta": 0, "limit": None}},
        reward={"kind": "function", "name": f"{folder / 'letters.py'}:e"}, batch={"tokens": 512},
        rollouts={"prompts": 6, "answers": 16, "max_tokens": 8}, optim={"lr": 5e-3, "steps": 10, "schedule": "constant"},
    )  # fmt: skip
    run(read(folder, data))
    rows = [json.loads(line) for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reward"] > 1.5 * rows[0]["reward"] > 0


def test_the_recipe_of_a_manifest_is_one(folder: Path, tiny_llama: Path) -> None:
    """It says every field, the critic of a method without one too."""
    (recipe,) = read(folder, stage(folder, tiny_llama)).stages
    assert Reinforce.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(FettleError, match="critic: grpo has none"):
        read(folder, stage(folder, tiny_llama, critic={"start": "reward"}))
