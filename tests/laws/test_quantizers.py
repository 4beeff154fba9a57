"""Laws that every quantizer which looks at text keeps, on every kind of architecture. A new one is one row of `ROWS`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.families import Edit
from fettle.export.packed import unrounded
from fettle.models.forest import Forest
from fettle.models.proof import difference
from fettle.peft import IA3, AdaLoRA, Adapter, BitFit, LoRA, Norms, PromptTuning
from fettle.quantize import AWQ, GPTQ, HQQ, RTN, Activations, Grid, LayerDistill, LLMInt8, SmoothQuant, ZeroQuant
from fettle.quantize.calibrate import Calibration
from fettle.quantize.linear import quantized

VOCABULARY = 64
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
    "opt": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen3_moe": {
        **LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}  # fmt: skip
GRID = Grid(bits=4, symmetric=False, group=16)
ROWS: list[tuple[Edit, ...]] = [
    (GPTQ(grid=GRID),),
    (GPTQ(grid=Grid(bits=4, levels="normal", group=16), act_order=False, sequential=False),),
    (AWQ(grid=GRID, samples=2, points=4),),
    (HQQ(grid=GRID),),
    (LLMInt8(threshold=2.0),),
    (SmoothQuant(layers=True), RTN(grid=Grid(bits=8), activations=Activations())),
    (SmoothQuant(), RTN(grid=Grid(bits=8), activations=Activations(group="tensor", static=True))),
    (SmoothQuant(), GPTQ(grid=GRID)),
    (ZeroQuant(grid=Grid(bits=8, group=16), distill=LayerDistill(steps=2)),),
]
TOKENS = torch.randint(3, VOCABULARY, (1, 14), generator=torch.Generator().manual_seed(1))


def build(kind: str) -> Forest:
    torch.manual_seed(0)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **ids, **KINDS[kind])
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return Forest(model.eval().requires_grad_(False))


def batches(count: int = 2) -> list[Batch]:
    rng = np.random.default_rng(0)

    def text(n: int) -> Example:
        return Example((Node(rng.integers(3, 60, n).astype(np.int32), np.ones(n, np.float32)),), "x")

    return [pack([text(36), text(20)], 64, 0) for _ in range(count)]


def calibrated(edits: tuple[Edit, ...], kind: str) -> tuple[Forest, list[Calibration]]:
    forest, made = build(kind), []
    for place, edit in enumerate(edits):
        made.append(Calibration(forest, batches(), place=place, console=Console(quiet=True)))
        edit.calibrate(forest.model, made[-1])
    return forest, made


@torch.no_grad()
def logits(forest: Forest) -> Tensor:
    return forest.model(input_ids=TOKENS).logits


def ids(edits: tuple[Edit, ...]) -> str:
    return "+".join(
        f"{e.kind}{'-static' if getattr(getattr(e, 'activations', None), 'static', False) else ''}" for e in edits
    )  # type: ignore[attr-defined]


pairs = [pytest.param(row, kind, id=f"{ids(row)}-{kind}") for row in ROWS for kind in KINDS]


@pytest.mark.parametrize(("edits", "kind"), pairs)
def test_all_laws_of_a_quantizer(edits: tuple[Edit, ...], kind: str) -> None:
    plain = build(kind)
    forest, made = calibrated(edits, kind)
    found = logits(forest)
    apart = float((found - logits(plain)).norm() / logits(plain).norm())
    assert 0 < apart < 0.35, "it is quantized, and near the plain model"
    assert not any(p.requires_grad for p in forest.model.parameters())
    layers = quantized(forest.model)
    assert set(layers) == set(made[-1].outcomes) and all(o.error is not None for o in made[-1].outcomes.values())
    assert all(0 < o.error < 0.2 for o in made[-1].outcomes.values())  # type: ignore[operator]

    again, _ = calibrated(edits, kind)
    assert torch.equal(logits(again), found), "deterministic"

    # opened: the layout laid out, the tensors filled in, and nothing that no edit asks for
    opened = build(kind)
    for edit in edits:
        edit.outline(opened.model, frozenset(edit.tensors(forest.model)))
    for edit in edits:
        kept, there = edit.tensors(forest.model), edit.tensors(opened.model)
        assert set(kept) == set(there)
        for name, tensor in there.items():
            tensor.data.copy_(kept[name])
    assert torch.equal(logits(opened), found)

    with unrounded(forest.model):  # rounding inputs is a staircase: float32's own rounding may move a value by a step
        assert difference(forest) < 1e-4, "a forest is each path alone"
    if not any(getattr(edit, "activations", None) for edit in edits):
        twin = copy.deepcopy(forest)
        for edit in edits:
            edit.merge(twin.model)
        assert not quantized(twin.model)
        assert torch.allclose(logits(twin), found, atol=1e-4), "merged is the same"


OVER: list[Edit] = [
    LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, init="pissa"), AdaLoRA(rank=4, target_rank=2), IA3(), BitFit(), Norms(),
    Adapter(placement="houlsby", size=4), PromptTuning(tokens=2),
]  # fmt: skip


@pytest.mark.parametrize("edits", ROWS, ids=ids)
def test_every_edit_trains_over_it(edits: tuple[Edit, ...]) -> None:
    for kind in ("llama", "gpt2"):
        base, _ = calibrated(edits, kind)
        before = logits(base)
        for over in OVER:
            if kind == "llama" and isinstance(over, BitFit):
                continue  # its layers have no biases
            forest = copy.deepcopy(base)
            over.apply(forest.model)
            if not isinstance(over, PromptTuning):
                assert torch.allclose(logits(forest), before, atol=1e-4), over
            forest.model(input_ids=TOKENS).logits.square().sum().backward()
            trained = {n: p for n, p in forest.model.named_parameters() if p.requires_grad}
            assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values()), over
            held = {k for e in edits if e.role == "quantizes" for k in e.tensors(forest.model)}
            assert held.isdisjoint(n for n in trained if not n.endswith("bias"))


def test_an_encoder_decoder_is_calibrated_in_one_pass() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0
    )
    forest = Forest(AutoModelForSeq2SeqLM.from_config(config).eval().requires_grad_(False))
    rng = np.random.default_rng(0)

    def pair() -> Example:
        source, target = (rng.integers(3, 60, n).astype(np.int32) for n in (30, 20))
        target[0] = 0
        zeros = np.zeros(30, np.float32)
        return Example((Node(source, zeros, -1, False), Node(target, np.ones(20, np.float32), 0)), "x")

    made = Calibration(forest, [pack([pair()], 64, 0) for _ in range(3)], console=Console(quiet=True))
    AWQ(grid=GRID, points=4, samples=2).calibrate(forest.model, made)
    layers = quantized(forest.model)
    assert len(layers) == 2 * 6 + 2 * 10 and set(made.outcomes) == set(layers)
    assert all(o.error is not None and o.error < 0.2 for o in made.outcomes.values()), made.outcomes
