"""Rollouts: what a phase holds, what is refused, what a checkpoint keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.data import DataSpec, prepare
from fettle.data.prompts import Prompts, read_prompts
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import GRPO, REINFORCE, BestOf, PolicyGradient
from fettle.objectives.policy import KL, Answers, Tokens, k3
from fettle.peft import LoRA
from fettle.stages.artifact import apply_edits
from fettle.train.loop import Phased
from fettle.train.parallel import World
from fettle.train.rollouts import ROWS, Actors, Mix, Rollouts, RolloutSpec, _figures, fullest

SPEC = RolloutSpec(prompts=3, answers=4, max_tokens=6)


@pytest.fixture(scope="module")
def forest(tiny_llama: Path) -> Forest:
    made = load(ModelSpec(path=str(tiny_llama), dtype="float32", device="cpu"))
    return apply_edits(made, [LoRA(rank=2)])


@pytest.fixture
def prompts(forest: Forest, tmp_path: Path) -> Prompts:
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Count " + "the stones " * i}], "answer": str(i)} for i in range(7)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts([DataSpec(path=str(file))], forest.tokenizer, 100)


def share_of_e(asked: Sequence[Any], answers: Sequence[str]) -> Any:
    found = [a.count("e") / max(len(a), 1) + 0.01 * len(a) for a in answers]
    return SimpleNamespace(total=found, parts={"e": found})


def rollouts(
    forest: Forest, prompts: Prompts, method: PolicyGradient | None = None, spec: RolloutSpec = SPEC,
    score: Callable[..., Any] = share_of_e, **more: Any,
) -> Rollouts:  # fmt: skip
    actors = Actors(forest, score, forest.reference, more.pop("mix", None))
    return Rollouts(actors, prompts, method or GRPO(), spec, (more.pop("length", 160), 3), **more)


def learned(source: Rollouts, step: int) -> list[Tokens]:
    return [Tokens.of(source.batch(i), torch.device("cpu")) for i in source.begin(step, World())]


def test_a_phase_holds_every_answer_once(forest: Forest, prompts: Prompts) -> None:
    source = rollouts(forest, prompts)
    assert isinstance(source, Phased)
    batches = [source.batch(i) for i in source.begin(0, World())]
    phase = source.phase
    assert phase is not None and len(phase.lengths) == 12 and phase.group == 4
    places = torch.cat([b.extra["places"] for b in batches])
    assert sorted(places.tolist()) == list(range(len(phase.tokens)))
    assert sum(float(b.extra["count"]) for b in batches) == 12
    assert sum(float(t.weights.sum()) for t in learned(source, 0)) == pytest.approx(12)
    figures = source.figures(0)
    assert figures["phase"] == 1 and figures["kl"] == pytest.approx(0, abs=1e-6) and figures["length"] <= 6
    assert figures["reward"] == pytest.approx(float(phase.rewards.mean()))


def test_the_same_seed_writes_the_same_and_another_phase_writes_anew(forest: Forest, prompts: Prompts) -> None:
    one, other = rollouts(forest, prompts), rollouts(forest, prompts)
    one.begin(0, World())
    other.begin(0, World())
    assert one.texts() == other.texts()
    other.begin(1, World())
    assert one.texts() != other.texts() and other.phase is not None and other.phase.places.tolist() == [3, 4, 5]
    third = rollouts(forest, prompts, seed=1)
    third.begin(0, World())
    assert third.texts() != one.texts()


def test_passes_and_parts_take_every_prompt_once_a_pass(forest: Forest, prompts: Prompts) -> None:
    source = rollouts(forest, prompts, GRPO(kl=KL(beta=0.1)), SPEC.model_copy(update={"passes": 2, "parts": 3}))
    seen: list[list[int]] = []
    for step in range(6):
        own: list[int] = []
        for i in source.begin(step, World()):
            batch = source.batch(i)
            own += batch.extra["places"].tolist()
            assert "old" in batch.extra and "rollout" not in batch.extra
        seen.append(own)
    assert source.phase is not None and source.phase.number == 0
    every = list(range(len(source.phase.tokens)))
    assert sorted(sum(seen[:3], [])) == every and sorted(sum(seen[3:], [])) == every
    assert source.figures(0).get("gap") is not None and source.figures(0)["gap"] < 1e-5


def test_it_goes_on_from_its_state_bit_for_bit(forest: Forest, prompts: Prompts) -> None:
    spec = SPEC.model_copy(update={"parts": 2})
    source = rollouts(forest, prompts, GRPO(kl=KL(beta=0.1, target=2.0)), spec)
    source.begin(0, World())
    other = rollouts(
        forest, prompts, GRPO(kl=KL(beta=0.1, target=2.0)), spec, score=lambda *a: pytest.fail("written again")
    )
    other.restore({k: v.clone() for k, v in source.state().items()})
    indices = source.begin(1, World())
    assert indices == other.begin(1, World())
    for i in indices:
        one, two = source.batch(i), other.batch(i)
        assert torch.equal(one.tokens, two.tokens) and one.segments == two.segments
        assert one.extra.keys() == two.extra.keys() and all(torch.equal(one.extra[k], two.extra[k]) for k in one.extra)
    assert other.memory == source.memory and other.memory["beta"] == pytest.approx(0.1 * 0.98)


def test_answers_that_teach_nothing_count_and_take_no_room(forest: Forest, prompts: Prompts) -> None:
    """All but the last prompt's rewards are equal: with no divergence in the loss only that prompt is learned from."""

    def last_only(asked: Sequence[Any], answers: Sequence[str]) -> Any:
        return SimpleNamespace(total=[float(i > 8) for i in range(len(answers))], parts={})

    source = rollouts(forest, prompts, GRPO(kl=KL(beta=0)), score=last_only)
    batches = [source.batch(i) for i in source.begin(0, World())]
    assert sum(len(b.extra["places"]) for b in batches) == int(source.phase.lengths[8:].sum())  # type: ignore[union-attr]
    assert sum(float(b.extra["count"]) for b in batches) == 12
    assert source.figures(0)["equal_groups"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("method", [GRPO(kl=KL(beta=0)), BestOf()], ids=["grpo", "best_of"])
def test_a_step_in_which_nobody_learns_has_the_loss_0(method: PolicyGradient, forest: Forest, prompts: Prompts) -> None:
    flat = lambda asked, answers: SimpleNamespace(total=[1.0] * len(answers), parts={})  # noqa: E731
    source = rollouts(forest, prompts, method, score=flat)
    (index,) = source.begin(0, World())
    batch = source.batch(index)
    loss = method(forest, batch)
    loss.sum.backward()
    assert loss.sum.item() == 0 and float(loss.count) > 0 and not batch.useful


def test_unfinished_answers_may_have_a_reward_of_their_own(forest: Forest, prompts: Prompts) -> None:
    source = rollouts(forest, prompts, spec=SPEC.model_copy(update={"unfinished": -7.0}))
    source.begin(0, World())
    phase = source.phase
    assert phase is not None
    assert ((phase.rewards == -7.0) == (phase.lengths == 6)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("total", "said"),
    [
        ([math.nan] * 12, r"reward: nan for the answer '.*' to .*prompts\.jsonl:\d"),
        ([math.inf] * 12, "reward: inf for the answer"),
        ([1.0] * 11, "reward: 11 rewards for 12 answers"),
    ],
)
def test_rewards_that_are_none_are_refused(total: list[float], said: str, forest: Forest, prompts: Prompts) -> None:
    source = rollouts(forest, prompts, score=lambda *a: SimpleNamespace(total=total, parts={}))
    with pytest.raises(FettleError, match=said):
        source.begin(0, World())


@pytest.fixture
def moved(forest: Forest) -> Any:
    """The policy far from its reference, and back again afterwards."""
    weights = [p for n, p in forest.model.named_parameters() if n.endswith(".b")]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight.normal_(0, 2, generator=draw)
    yield
    with torch.no_grad():
        for weight in weights:
            weight.zero_()


def test_a_policy_that_comes_apart_stops_and_names_the_prompts(forest: Forest, prompts: Prompts, moved: Any) -> None:
    source = rollouts(forest, prompts, GRPO(kl=KL(limit=1e-5)))
    with pytest.raises(
        FettleError, match=r"nats a token from its reference, more than 1e-05, most on .*prompts\.jsonl:\d \('Count"
    ):
        source.begin(0, World())


def test_a_rare_draw_does_not_look_like_a_policy_that_came_apart() -> None:
    """Of 99 answers one is what the reference writes, and the policy hardly ever does: its ratio is 10,000, its log-ratio -9.2."""
    sure, rare = (math.log(0.9999), math.log(0.25)), (math.log(0.0001), math.log(0.75))
    old, reference = torch.tensor([*[sure] * 98, rare]).T
    given = Answers(99, torch.ones(99, dtype=torch.int64), torch.zeros(99, dtype=torch.float64), old, reference)
    assert float(k3(old, reference).mean()) > 70
    assert 1.2 < _figures(given, [SimpleNamespace(reason="end")] * 99)["kl_token"] < 1.4  # type: ignore[list-item]


def test_kl_is_that_of_the_drawn_answers(forest: Forest, prompts: Prompts, moved: Any) -> None:
    source = rollouts(forest, prompts, GRPO(kl=KL(limit=None)), SPEC.model_copy(update={"parts": 2}))
    source.begin(0, World())
    phase, figures = source.phase, source.figures(0)
    assert phase is not None
    apart = (phase.old - phase.reference).double().sum()
    assert figures["kl"] == pytest.approx(float(apart) / 12, rel=1e-6)
    assert figures["kl_token"] == pytest.approx(float(apart) / len(phase.old), rel=1e-6)


def test_or_is_warned_about(forest: Forest, prompts: Prompts, moved: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rollouts(forest, prompts, GRPO(kl=KL(limit=1e-5, beyond="warn"))).begin(0, World())
    assert "warning: objective.kl: the policy is" in capfd.readouterr().err
    rollouts(forest, prompts, GRPO(kl=KL(limit=None))).begin(0, World())
    assert "warning" not in capfd.readouterr().err


def test_the_reference_is_the_policy_with_its_edits_off(forest: Forest, prompts: Prompts, moved: Any) -> None:
    source = rollouts(forest, prompts, GRPO(kl=KL(limit=None)))
    index = source.begin(0, World())[0]
    batch = source.batch(index)
    with forest.reference() as base, torch.no_grad():
        assert torch.allclose(base.logps(batch), batch.extra["reference"], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(forest.logps(batch), batch.extra["rollout"], atol=1e-4)
        assert not torch.allclose(batch.extra["reference"], batch.extra["rollout"], atol=0.02)


def test_a_sampler_that_is_another_model_is_refused(
    forest: Forest, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fettle.train.rollouts as module

    real = module.generate
    wrong = lambda *a, **k: [replace(c, logps=tuple(x - 0.3 for x in c.logps)) for c in real(*a, **k)]  # noqa: E731
    monkeypatch.setattr(module, "generate", wrong)
    source = rollouts(forest, prompts, GRPO())
    batch = source.batch(source.begin(0, World())[0])
    with pytest.raises(FettleError, match=r"objective\.gap: trainer and sampler .* differ by 0\.3 nats a token"):
        source.objective(forest, batch)
    with pytest.raises(FettleError, match=r"objective\.gap"):
        rollouts(forest, prompts, GRPO(), SPEC.model_copy(update={"parts": 2})).begin(0, World())


def test_the_mix_counts_as_its_coefficient_says(forest: Forest, prompts: Prompts, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The baker sells bread number {i}." for i in range(40)))
    corpus = prepare([DataSpec(path=str(text))], forest.tokenizer, 160)
    source = rollouts(forest, prompts, REINFORCE(kl=KL(beta=0)), mix=Mix(corpus, 2, 0.5))
    losses = [source.objective(forest, source.batch(i)) for i in source.begin(0, World())]
    count = sum(float(loss.count) for loss in losses)
    mixed = [loss for loss in losses if "mix_loss" in loss.metrics]
    assert len(mixed) == 2 and count == 12
    nats = sum(float(loss.metrics["mix_loss"][0]) for loss in mixed) / sum(
        float(loss.metrics["mix_loss"][1]) for loss in mixed
    )
    assert sum(loss.sum.item() for loss in mixed) / count == pytest.approx(0.5 * nats, rel=1e-5)


@pytest.mark.parametrize("method", [GRPO(kl=KL(beta=0)), BestOf()], ids=["grpo", "best_of"])
def test_the_mix_is_learned_where_no_answer_is(
    method: PolicyGradient, forest: Forest, prompts: Prompts, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The baker sells bread number {i}." for i in range(40)))
    corpus = prepare([DataSpec(path=str(text))], forest.tokenizer, 160)
    flat = lambda asked, answers: SimpleNamespace(total=[1.0] * len(answers), parts={})  # noqa: E731
    source = rollouts(forest, prompts, method, score=flat, mix=Mix(corpus, 2, 0.5))
    losses = [source.objective(forest, source.batch(i)) for i in source.begin(0, World())]
    nats, weight = (sum(float(loss.metrics["mix_loss"][i]) for loss in losses) for i in (0, 1))
    assert len(losses) == 2 and sum(float(loss.count) for loss in losses) > 0
    assert sum(loss.sum.item() for loss in losses) / sum(float(loss.count) for loss in losses) == pytest.approx(
        0.5 * nats / weight, rel=1e-5
    )


def test_rows_of_the_mix_keep_their_weights(forest: Forest, prompts: Prompts, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows = [{"prompt": f"The baker sells {i}", "completion": " loaves.", "weight": 1.0 + i % 3} for i in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([DataSpec(path=str(file))], forest.tokenizer, 160)
    source = rollouts(forest, prompts, mix=Mix(corpus, 1, 0.5))
    batch = source.batch(source.begin(0, World())[-1])
    plain = corpus.batch(0)
    assert "mixed" in batch.extra and len(set(plain.weights.tolist())) > 2
    assert torch.allclose(batch.weights / batch.weights.sum(), plain.weights / plain.weights.sum())


def test_the_fullest_batch_has_all_that_a_method_asks_for(forest: Forest) -> None:
    batch = fullest(GRPO(), 64, 20)
    loss = GRPO()(forest, batch)
    assert len(batch.segments) == 4 and torch.isfinite(loss.sum)


def test_answers_are_left_to_be_read(forest: Forest, prompts: Prompts, tmp_path: Path) -> None:
    source = rollouts(forest, prompts, folder=tmp_path / "answers")
    source.begin(0, World())
    rows = [json.loads(line) for line in (tmp_path / "answers" / "phase-000001.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and set(rows[0]) == {"prompt", "question", "answer", "reward", "kl", "tokens", "ended"}
    assert rows[0]["prompt"].endswith("prompts.jsonl:" + rows[0]["prompt"].rsplit(":", 1)[1])


def test_batches_are_numbered_by_step_and_as_many_for_each_process(forest: Forest, prompts: Prompts) -> None:
    source = rollouts(forest, prompts)
    indices = source.begin(2, World())
    assert indices[0] == 2 * ROWS
    source.world = World()
    rows = len(source.rows(2))
    padded = source.batch(2 * ROWS + rows)
    assert not padded.useful and float(padded.extra["count"]) == 0
    loss = source.objective(forest, padded)
    loss.sum.backward()
    assert loss.sum.item() == 0
