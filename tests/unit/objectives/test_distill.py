"""Distillation: divergences against float64 formulae, a chunk of logits at a time, and whoever teaches."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from fettle.core.batch import IGNORE, Batch, Segment
from fettle.core.errors import FettleError
from fettle.models import head
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import distill
from fettle.objectives.distill import Distill, Live, Target, Teacher, distance, forward_kl, jensen_shannon, reverse_kl
from fettle.peft import Full, LoRA
from fettle.quantize import QAT, Grid
from fettle.stages.artifact import apply_edits
from fettle.stages.teacher import taught

V, N = 37, 11


def random(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: Tensor, t: float = 1.0) -> Tensor:
    return (x / t).softmax(-1)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_divergences_are_their_sums(t: float) -> None:
    z, u = random(N, V, seed=1), random(N, V, seed=2)
    q, p, target = softmax(z, t), softmax(u, t), Target.of(u, t, None)
    forward = (p * (p / q).log()).sum(1)
    reverse = (q * (q / p).log()).sum(1)
    m = 0.3 * p + 0.7 * q
    between = 0.3 * (p * (p / m).log()).sum(1) + 0.7 * (q * (q / m).log()).sum(1)
    for kind, wanted in (("forward", forward), ("reverse", reverse), ("jsd", between)):
        assert torch.allclose(distance(z, target, kind, t, 0.3), wanted, rtol=1e-12, atol=1e-14)
    assert torch.allclose(distance(z, target, "mse"), ((z - u) ** 2).mean(1), rtol=1e-14)


def test_what_a_divergence_turns_towards_at_its_ends() -> None:
    """GKD, after equation 1: JSD(b) / b goes to KL(p || q) as b goes to 0, and JSD(b) / (1 - b) to KL(q || p) as b goes to 1."""
    p, q = random(N, V, seed=1).log_softmax(-1), random(N, V, seed=2).log_softmax(-1)
    small = 1e-7
    assert torch.allclose(jensen_shannon(p, q, small) / small, forward_kl(p, q), rtol=1e-4)
    assert torch.allclose(jensen_shannon(p, q, 1 - small) / small, reverse_kl(p, q), rtol=1e-4)
    assert (jensen_shannon(p, q, 0.5) < math.log(2)).all()


def test_impossible_tokens_add_nothing() -> None:
    u = random(2, V)
    u[:, 5] = -math.inf
    z = random(2, V, seed=3).requires_grad_()
    found = distance(z, Target.of(u, 1.0, None), "forward")
    found.sum().backward()
    assert torch.isfinite(found).all() and z.grad is not None and torch.isfinite(z.grad).all()


@settings(max_examples=30)
@given(st.integers(1, V + 3), st.sampled_from(["forward", "reverse", "jsd"]), st.floats(0.5, 4), st.integers(0, 10_000))
def test_kept_logits_and_one_event_for_the_rest(k: int, kind: Any, t: float, seed: int) -> None:
    z, u = random(N, V, seed=seed), random(N, V, seed=seed + 1)
    whole, part = (distance(z, Target.of(u, t, top), kind, t, 0.4) for top in (None, k))
    assert (part <= whole + 1e-12).all() and (part >= -1e-12).all()
    p, q = softmax(u, t), softmax(z, t)
    top = u.topk(min(k, V)).indices
    events = [torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1) for x in (p, q)]
    if k >= V:
        assert torch.equal(part, whole)
    elif kind == "forward" and k < V - 1:  # beyond, the subtraction of this test loses the rest
        assert torch.allclose(part, (events[0] * (events[0] / events[1]).log()).sum(1), rtol=1e-6, atol=1e-9)
    assert torch.allclose(
        distance(u, Target.of(u, t, k), kind, t, 0.4), torch.zeros(N, dtype=torch.float64), atol=1e-12
    )


# Through a model.


def batch_of(vocabulary: int, length: int = 48) -> Batch:
    """Two documents and padding; most tokens are learned, with weights."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, vocabulary, (length,), generator=generator)
    positions = torch.cat([torch.arange(20), torch.arange(20), torch.zeros(length - 40, dtype=torch.int64)])
    targets = tokens.roll(-1)
    targets[[0, 3, 19, 39]] = IGNORE
    targets[40:] = IGNORE
    weights = torch.rand(length, generator=generator) * (targets != IGNORE)
    segments = (Segment(0, 20), Segment(20, 40), Segment(40, length))
    return Batch(tokens, positions, targets, weights, segments, ("a", "b", ""))


def forest_of(folder: Path, *edits: Any, disturb: float = 0.05) -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    forest.model.double()
    apply_edits(forest, edits)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in forest.model.parameters():
            if p.requires_grad:
                p.add_(disturb * torch.randn(p.shape, generator=generator).to(p))
    return forest


def gradients(forest: Forest) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in forest.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("edits", [(LoRA(rank=4),), (LoRA(rank=4, targets=("all-linear", "lm_head")),)], ids=["frozen head", "trained head"])  # fmt: skip
@pytest.mark.parametrize(
    "objective", [Distill(hard=0.3, temperature=2.0), Distill(divergence="jsd", beta=0.2, top_k=5)], ids=str
)
def test_chunks_change_nothing_and_no_more_than_one_has_logits(
    tiny_llama: Path, edits: Any, objective: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one sum over all rows' logits at once, with torch's own gradient."""
    forest = forest_of(tiny_llama, *edits)
    batch = batch_of(len(forest.tokenizer))
    learned = (batch.targets != IGNORE).nonzero()[:, 0]
    with forest.reference():
        u = forest.logits(batch, learned)
    z = forest.logits(batch, learned)
    rows, _ = objective.rows(z, batch.targets[learned], Target.of(u, objective.temperature, objective.top_k))
    wanted = (rows * batch.weights[learned]).sum()
    wanted.backward()
    expected = gradients(forest)
    forest.model.zero_grad()

    seen: list[int] = []
    finish = head.Head.finish
    monkeypatch.setattr(head.Head, "finish", lambda self, logits: seen.append(len(logits)) or finish(self, logits))
    monkeypatch.setattr(distill, "chunks", lambda rows, *_: [slice(i, min(i + 7, rows)) for i in range(0, rows, 7)])
    loss = objective(forest, batch)
    loss.sum.backward()
    assert max(seen) == 7 and len(seen) >= 2 * len(learned) // 7
    assert torch.allclose(loss.sum, wanted, rtol=1e-10) and float(loss.count) == pytest.approx(
        float(batch.weights.sum())
    )
    assert loss.metrics["divergence"] > 0 and torch.allclose(loss.metrics["loss"], loss.sum)
    found = gradients(forest)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-9), name


def test_hard_loss_alone_is_cross_entropy(tiny_llama: Path) -> None:
    from fettle.objectives import SFT

    forest = forest_of(tiny_llama, LoRA(rank=4))
    batch = batch_of(len(forest.tokenizer))
    one, two = Distill(hard=1.0)(forest, batch), SFT()(forest, batch)
    assert torch.allclose(one.sum, two.sum, rtol=1e-10) and torch.allclose(one.metrics["nll"], two.sum, rtol=1e-10)


def test_at_start_the_student_is_its_own_teacher(tiny_llama: Path) -> None:
    forest = forest_of(tiny_llama, LoRA(rank=4), disturb=0.0)
    batch = batch_of(len(forest.tokenizer))
    for kind in ("forward", "reverse", "jsd", "mse"):
        assert abs(float(Distill(divergence=kind)(forest, batch).sum.detach())) < 1e-10


def test_the_teacher_of_qat_is_not_rounded(tiny_llama: Path) -> None:
    forest = forest_of(tiny_llama, LoRA(rank=4), QAT(grid=Grid(bits=3)), disturb=0.0)
    plain = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    plain.model.double()
    batch = batch_of(len(forest.tokenizer))
    itself = Distill()(forest, batch).sum.detach()
    other = Distill().taught_by(Live(1.0, None, plain))(forest, batch).sum
    assert float(itself) > 0.005 and torch.allclose(itself, other, rtol=1e-9)
    forest.model.train()
    assert torch.allclose(Distill()(forest, batch).sum, itself) and all(
        m.training for m in forest.model.modules() if not isinstance(m, nn.Embedding)
    )


def test_without_a_gradient_and_without_targets(tiny_llama: Path) -> None:
    forest = forest_of(tiny_llama, LoRA(rank=4))
    batch = batch_of(len(forest.tokenizer))
    with torch.no_grad():
        quiet = Distill()(forest, batch).sum
    assert torch.equal(quiet, Distill()(forest, batch).sum.detach())
    empty = copy.copy(batch)
    empty.targets = torch.full_like(batch.targets, IGNORE)
    loss = Distill()(forest, empty)
    loss.sum.backward()
    assert float(loss.sum.detach()) == 0 and float(loss.count) == 0


def test_another_teacher_is_opened_and_must_read_the_same_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    forest = forest_of(tiny_llama, LoRA(rank=4))
    objective = taught(Distill(teacher=Teacher(path=str(tiny_llama), dtype="float32")), forest, [])
    batch = batch_of(len(forest.tokenizer))
    assert torch.allclose(objective(forest, batch).sum, Distill()(forest, batch).sum, rtol=1e-3)
    import shutil

    from conftest import small_tokenizer

    shutil.copytree(tiny_llama, tmp_path / "other")
    small_tokenizer(300).save_pretrained(tmp_path / "other")
    with pytest.raises(FettleError, match="has another tokenizer .* take a teacher of the same family"):
        taught(Distill(teacher=Teacher(path=str(tmp_path / "other"))), forest, [])


def test_refusals_are_sentences(tiny_llama: Path) -> None:
    forest = forest_of(tiny_llama, Full())
    with pytest.raises(
        FettleError, match="cannot be had by switching its edits off, since .* trains in place; name the teacher"
    ):
        taught(Distill(), forest, [])
    with pytest.raises(FettleError, match="was not given its teacher"):
        Distill(teacher=Teacher(path="x"))(forest, batch_of(len(forest.tokenizer)))
    for wrong, said in (
        ({"teacher": {"cached": True}}, "say how many, as in top_k: 64"),
        ({"divergence": "mse", "temperature": 2.0}, "compares the logits as they are"),
    ):
        with pytest.raises(ValidationError, match=said):
            Distill.model_validate(wrong)
    assert Distill.model_validate({"teacher": "runs/big"}).teacher.path == "runs/big"


def test_kl_div_of_torch_agrees() -> None:
    z, u = random(N, V, seed=1), random(N, V, seed=2)
    wanted = F.kl_div(z.log_softmax(-1), u.log_softmax(-1), log_target=True, reduction="none").sum(1)
    assert torch.allclose(distance(z, Target.of(u, 1.0, None), "forward"), wanted, rtol=1e-12)
