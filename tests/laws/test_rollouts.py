"""A prompt with its answers as one tree gives what each answer behind its prompt gives alone: log-probabilities, losses, gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.core.batch import IGNORE
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import GRPO, PPO, REINFORCE, RLOO, BestOf, PolicyGradient
from fettle.objectives.policy import Answers, Tokens, each_weight
from fettle.train.phase import Phase, batch_of, parts_of, rows_of, trees

PROMPTS = [np.arange(5, 16, dtype=np.int32), np.array([7], dtype=np.int32), np.arange(30, 37, dtype=np.int32)]
NAMES = ["a", "b", "c"]
LENGTHS = [3, 9, 1, 5, 5, 2]
METHODS: list[PolicyGradient] = [
    GRPO(), GRPO(mean="token", ratio="answer"), GRPO(mean="constant", scale="none"), RLOO(), REINFORCE(), BestOf(), PPO(),
]  # fmt: skip


@pytest.fixture(scope="module")
def forest(tiny_llama: Path) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32", device="cpu"))


def phase(method: PolicyGradient, beta: float = 0.1) -> Phase:
    rng = np.random.default_rng(0)
    n = sum(LENGTHS)
    numbers = [torch.from_numpy(rng.normal(-3, 0.5, n).astype(np.float32)) for _ in range(3)]
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    made = Phase(
        0, torch.arange(3), torch.tensor(LENGTHS), torch.from_numpy(rng.integers(4, 300, n).astype(np.int32)), rewards,
        numbers[0], beta, old=numbers[0], reference=numbers[1], values=numbers[2] if method.critic else torch.empty(0),
    )  # fmt: skip
    values = made.values if method.critic else None
    return made.judged(method.judge(Answers(2, made.lengths, rewards, made.old, made.reference, values), beta, {}))


def alone(forest: Forest, made: Phase) -> torch.Tensor:
    """[N]: each answer behind its prompt in a row of its own, through transformers' own forward pass."""
    from fettle.models.proof import plain

    found, starts = [], made.starts
    with plain(forest):
        for a in range(len(LENGTHS)):
            prompt, answer = PROMPTS[a // 2], made.tokens[starts[a] : starts[a + 1]].long()
            ids = torch.cat([torch.from_numpy(prompt).long(), answer])
            logits = forest.model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.kind}-{m.per()}")  # type: ignore[attr-defined]
@pytest.mark.parametrize("length", [64, 22])
def test_trees_are_separate_rows(method: PolicyGradient, length: int, forest: Forest) -> None:
    """In one row or in several, with groups cut where they do not fit: the same loss, and the same gradient of every weight."""
    made = phase(method)
    weights, counts = each_weight(made.lengths, method.per(), 12)
    rows = rows_of(trees(made, PROMPTS, length, range(3)), length, 0, 0)
    assert len(rows) > 1 or length == 64
    order, logps, losses = [], [], []
    for row in rows:
        batch = batch_of(made, row, PROMPTS, NAMES, weights.numpy(), (length, 3))
        answers = [a for tree in row for a in tree.answers]
        batch.extra |= {"count": counts[answers].sum(), "beta": torch.tensor(made.beta)}
        order.append(batch.extra["places"])
        logps.append(forest.logps(batch))
        assert torch.equal(made.tokens.long()[order[-1]], batch.targets[batch.targets != IGNORE])
        tokens = Tokens.of(batch, forest.device)
        loss = method.loss(logps[-1], tokens, 0.5 * tokens.values if tokens.values is not None else None)
        losses.append((loss.sum, loss.count))
    one = alone(forest, made)
    assert torch.allclose(torch.cat(logps), one[torch.cat(order)], atol=2e-5)
    total = sum(s for s, _ in losses) / sum(float(c) for _, c in losses)  # type: ignore[misc]
    used = torch.arange(6)[made.used]
    every = torch.cat([torch.arange(made.starts[a], made.starts[a + 1]) for a in used.tolist()])
    lone = Tokens(
        weights[torch.repeat_interleave(torch.arange(6), made.lengths)][every], counts[used].sum(),
        torch.repeat_interleave(torch.arange(len(used)), made.lengths[used]), made.advantages[every], made.beta, made.old[every],
        made.reference[every], made.values[every] if method.critic else None, made.returns[every] if method.critic else None,
    )  # fmt: skip
    plain = method.loss(one[every], lone, 0.5 * lone.values if lone.values is not None else None)
    weight = forest.model.model.layers[0].self_attn.q_proj.weight
    (grad,) = torch.autograd.grad(total, weight)
    (wanted,) = torch.autograd.grad(plain.sum / plain.count, weight)
    assert torch.allclose(total, plain.sum / plain.count, atol=1e-5)
    assert float(wanted.norm()) > 0 and float((grad - wanted).norm() / wanted.norm()) < 1e-4


def test_a_pass_takes_every_prompt_once() -> None:
    for turn in range(3):
        parts = parts_of(10, 3, 5, turn)
        assert sorted(int(p) for part in parts for p in part) == list(range(10)) and len(parts) == 3
    assert [p.tolist() for p in parts_of(10, 3, 5, 0)] != [p.tolist() for p in parts_of(10, 3, 5, 1)]


def test_a_phase_reads_back_bit_for_bit() -> None:
    made = phase(PPO())
    again = Phase.of({k: v.clone() for k, v in made.tensors().items()})
    for key, value in vars(made).items():
        other = getattr(again, key)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
