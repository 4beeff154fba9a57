"""Laws of training with rounding: what is trained is what is packed, whatever the order of the edits, on every architecture."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fettle.core.batch import Batch, Segment
from fettle.core.errors import FettleError
from fettle.models import roles
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import AdaLoRA, Adapter, Full, LoRA
from fettle.quantize import LSQ, NF4, QAT, RTN, Activations, Grid
from fettle.quantize.linear import quantized
from fettle.quantize.simulated import SimulatedLinear
from fettle.stages.artifact import apply_edits, open_artifact, save_artifact
from laws.test_edits import build, disturb, logits, switch, trained

W4 = QAT(grid=Grid(bits=4, group=16, symmetric=False))
W4A8 = QAT(grid=Grid(bits=4), activations=Activations())
W3 = QAT(grid=Grid(bits=3, range="percentile", percentile=90))
LEARNED = LSQ(grid=Grid(bits=4, group=16))
STATIC = LSQ(activations=Activations(group="tensor", static=True))
EDITS = [W4, W4A8, W3, LEARNED, STATIC]
TRAINERS = [Full(targets=r".*(proj|c_attn|c_fc|query|value|SelfAttention\.[qv])"), LoRA(rank=2), LoRA(rank=2, dora=True), AdaLoRA(rank=4, target_rank=2)]  # fmt: skip
KINDS = ("llama", "gpt2", "bert", "t5")


def name(edit: Any) -> str:
    return "-".join([edit.kind, *(f"{k}={v}" for k, v in edit.model_dump(exclude_defaults=True).items() if k not in ("kind", "targets"))])  # fmt: skip


def made(kind: str, edits: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(kind, dtype)
    for edit in edits:
        torch.manual_seed(5)
        edit.apply(model)
    for parameter in trained(model).values():  # steps stay of their own size
        generator = torch.Generator().manual_seed(parameter.numel())
        with torch.no_grad():
            parameter.add_(
                0.1
                * float(parameter.abs().mean() + 1e-2)
                * torch.randn(parameter.shape, generator=generator).to(parameter)
            )
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trainer", "edit"), list(itertools.product(TRAINERS, EDITS)), ids=name)
def test_packed_it_computes_the_same_bit_for_bit(kind: str, trainer: Any, edit: Any) -> None:
    model = made(kind, (trainer, edit))
    found, names = logits(model), set(edit.tensors(model))
    for one in (trainer, edit):
        one.settle(model)
    assert not [m for m in model.modules() if isinstance(m, SimulatedLinear)] and quantized(model, edit)
    assert set(edit.tensors(model)) == names
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("edit", EDITS, ids=name)
def test_in_bfloat16_the_weights_are_the_same_bit_for_bit(edit: Any) -> None:
    """Products are not: kernels for packed bfloat16 sum integers, exactly, where training sums rounded numbers."""
    model = made("llama", (LoRA(rank=2), edit), torch.bfloat16)
    weights = {n: m.rounded().bfloat16() for n, m in model.named_modules() if isinstance(m, SimulatedLinear)}
    edit.settle(model)
    assert {n: m.dtype for n, m in weights.items()} and quantized(model).keys() == weights.keys()
    for key, layer in quantized(model).items():
        assert torch.equal(layer.dequantized(), weights[key]), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [W4, W4A8, W3], ids=name)
def test_rtn_of_the_trained_weights_computes_what_was_trained(kind: str, edit: QAT) -> None:
    trainer = LoRA(rank=2)
    model = made(kind, (trainer, edit))
    found = logits(model)
    plain = made(kind, (trainer,))
    trainer.merge(plain)
    RTN(grid=edit.grid, activations=edit.activations).apply(plain)
    assert torch.equal(logits(plain), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", TRAINERS[1:], ids=name)
def test_the_order_of_the_two_makes_no_difference(kind: str, trainer: Any) -> None:
    one, two = made(kind, (trainer, W4)), made(kind, (W4, trainer))
    assert torch.equal(logits(one), logits(two))
    for model, edits in ((one, (trainer, W4)), (two, (W4, trainer))):
        for edit in edits:
            edit.merge(model)
        assert not [m for m in model.modules() if getattr(m, "edit", None) is not None] and not quantized(model)
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trainer", "edit"), list(itertools.product(TRAINERS[:2], EDITS)), ids=name)
def test_switched_off_is_the_base_and_gradients_reach_what_trains(kind: str, trainer: Any, edit: Any) -> None:
    model = made(kind, (trainer, edit), torch.float64)
    logits(model).square().sum().backward()
    missing = [n for n, p in trained(model).items() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing and trained(model)
    base = build(kind, torch.float64)
    if isinstance(trainer, Full):
        trainer.apply(base)
        for key, parameter in base.named_parameters():
            parameter.data.copy_({n.replace(".base", ""): p for n, p in model.named_parameters()}[key])
    tuned = logits(model)
    switch(model, False)
    assert torch.equal(logits(model), logits(base)) and not torch.equal(tuned, logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_of_a_lora_are_those_of_the_formula(kind: str) -> None:
    """Straight through: d W^ / d W = 1 inside of the range, so A and B have the gradients of the merged weight's."""
    model = made(kind, (LoRA(rank=4), W3), torch.float64)
    layer = next(m for m in model.modules() if isinstance(m, SimulatedLinear))
    x = torch.randn(3, 5, layer.base.a.shape[1], dtype=torch.float64, requires_grad=True)
    a, b = (t.detach().clone().requires_grad_() for t in (layer.base.a, layer.base.b))
    base = layer.base.base
    weight = (base.weight.T if kind == "gpt2" else base.weight).detach() + layer.base.scale * (b @ a)
    ordered = weight.detach().abs().sort(1).values
    rank = -(-ordered.shape[1] * 90 // 100)
    step = (ordered[:, rank - 1 : rank] / 3.5).float().double()
    inside = (weight >= -4.5 * step) & (weight <= 3.5 * step)  # levels -4 to 3, and half a step beyond
    assert 0 < (~inside).sum() < inside.numel() / 5
    rounded = step * (weight / step).round().clamp(-4, 3)
    straight = weight * inside + (rounded - weight * inside).detach()
    expected = nn.functional.linear(x, straight, getattr(base, "bias", None))
    found = layer(x)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
    up = torch.randn_like(expected)
    wanted, got = (
        torch.autograd.grad(expected, (x, a, b), up),
        torch.autograd.grad(found, (x, layer.base.a, layer.base.b), up),
    )
    for one, two in zip(wanted, got, strict=True):
        assert torch.allclose(one, two, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trainer", [Full(), LoRA(rank=4)], ids=name)
def test_training_holds_no_second_model(trainer: Any) -> None:
    model = made("llama", (trainer, W4A8))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    layer = next(m for m in model.modules() if isinstance(m, SimulatedLinear))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(5, 32, requires_grad=True))
    held = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert held and max(t.numel() for t in held) < 32 * 32  # which is a weight


# The cache.


def test_a_rounded_cache_reads_what_it_would_hold(tiny_llama: Path) -> None:
    """Keys and values on their grids, in a forest and in generation, where the cache hands them over anew at every step."""
    from fettle.generate import Sampling, generate

    edit = QAT(grid=Grid(bits=8), cache=Grid(bits=4))
    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), (LoRA(rank=2), edit))
    plain = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), (LoRA(rank=2), QAT(grid=Grid(bits=8))))
    (
        forest.model.double(),
        plain.model.double(),
    )  # so that no value lies so near a boundary that the order of a sum decides
    ids = torch.arange(5, 25)
    apart = (logits(forest.model, ids[None]) - logits(plain.model, ids[None])).abs().max()
    assert apart > 1e-3
    texts = Batch(torch.cat([ids, ids.flip(0)]), torch.arange(20).repeat(2), torch.full((40,), -100), torch.zeros(40), (Segment(0, 20), Segment(20, 40)), ("a", "b"))  # fmt: skip
    together = forest.head.logits(forest.hidden(texts))
    for row, text in zip(together.split(20), (ids, ids.flip(0)), strict=True):
        assert torch.allclose(row, logits(forest.model, text[None])[0], atol=1e-6)
    (answer,) = generate(forest, [ids.tolist()], Sampling(max_tokens=6))
    whole = torch.cat([ids, torch.tensor(answer.tokens)])[None]
    again = (
        logits(forest.model, whole).log_softmax(-1)[0, len(ids) - 1 : -1].gather(1, whole[0, len(ids) :, None])[:, 0]
    )
    assert torch.allclose(again, torch.tensor(answer.logps).double(), atol=1e-5)
    with pytest.raises(FettleError, match="plain weights cannot hold"):
        edit.merge(forest.model)
    assert {e.kind for e in roles.trained(forest.model)} == {"lora", "qat"}
    edit.settle(forest.model)
    assert edit not in roles.trained(forest.model)


def test_the_reference_is_the_model_before_the_stage() -> None:
    model, base = made("llama", (LoRA(rank=2), W4A8)), build("llama", torch.float32)
    with roles.reference(model):
        assert torch.equal(logits(model), logits(base))
    assert roles.obstacle(model) is None and roles.obstacle(made("llama", (Full(), W4))) is not None


# Artifacts.


@pytest.mark.parametrize("edits", [(Full(targets="mlp"), W4), (LoRA(rank=4), W4A8), (W4, LoRA(rank=4)), (LoRA(rank=2), LEARNED), (Full(), STATIC), (NF4(), LoRA(rank=2), W4)], ids=lambda e: "+".join(map(name, e)))  # fmt: skip
def test_saved_and_opened_it_is_packed_and_the_same(edits: Any, tiny_llama: Path, tmp_path: Path) -> None:
    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), edits)
    with torch.no_grad():
        for p in trained(forest.model).values():
            p.mul_(1.05)
    found = logits(forest.model, torch.arange(20)[None])
    for edit in edits:
        edit.settle(forest.model)
    save_artifact(tmp_path / "artifact", forest, edits, {})
    opened, _ = open_artifact(tmp_path / "artifact")
    assert torch.equal(logits(opened.model, torch.arange(20)[None]), found)
    assert quantized(opened.model) and not [m for m in opened.model.modules() if isinstance(m, SimulatedLinear)]
    stored = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["edits"]
    assert [e["kind"] for e in stored] == [e.kind for e in edits]


def test_refusals_are_sentences() -> None:
    model = build("llama", torch.float32)
    for edit, said in [
        (QAT(grid=Grid(group=7)), "qat: .*q_proj: group: 7 does not divide rows of 32"),
        (QAT(cache=Grid(bits=8)), "does not hand its keys and values to fettle's attention"),
    ]:
        with pytest.raises(FettleError, match=said):
            edit.apply(copy.deepcopy(model))
    RTN(targets="q_proj").apply(model)
    with pytest.raises(FettleError, match="q_proj is quantized already"):
        QAT().apply(model)
    model = build("llama", torch.float32)
    Adapter(placement="houlsby", size=4).apply(model)
    with pytest.raises(FettleError, match="more than a change of its weight; put this edit before that one"):
        QAT().apply(model)
    model = made("llama", (LoRA(rank=2, dropout=0.5), W4)).train()
    with pytest.raises(FettleError, match="dropout has no place in a weight that is rounded"):
        logits(model)
    with pytest.raises(FettleError, match="what the layers are given is rounded too"):
        W4A8.merge(made("llama", (W4A8,)))


def test_disturbed_steps_stay_over_zero() -> None:
    model = made("llama", (LEARNED,))
    disturb(model, 10.0)
    LEARNED.after_step(model, 0, 1)
    assert all(float(p.detach().min()) > 0 for p in trained(model).values())
