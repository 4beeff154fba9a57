"""Laws that every edit keeps, on every kind of architecture. A new edit is one row of `ROWS`.

All in float64 (but for the last laws), with tiny random models; transformers computes norms and softmax in float32 there.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fettle.core.batch import Batch, Segment
from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.forest import Forest
from fettle.models.load import checkpoint_layers
from fettle.peft import (
    IA3,
    AdaLoRA,
    Adapter,
    BitFit,
    Freeze,
    Full,
    LoRA,
    NewTokens,
    Norms,
    PromptTuning,
    TaskHead,
    TinyTL,
)
from fettle.peft.lora import LoRALinear
from fettle.quantize.nf4 import NF4

VOCABULARY = 64
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48}
BERT = {**WIDE, "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
    "opt": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "qwen3_moe": {
        **LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
}  # fmt: skip
OTHERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "bert": (AutoModelForSequenceClassification, "bert", BERT),
    "roberta": (AutoModelForTokenClassification, "roberta", {**BERT, "max_position_embeddings": 64}),
    "t5": (
        AutoModelForSeq2SeqLM, "t5",
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    ),
    "bart": (
        AutoModelForSeq2SeqLM, "bart",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0, "decoder_start_token_id": 2,
        },
    ),
}  # fmt: skip
EVERY = (*CAUSAL, *OTHERS)


@dataclass(frozen=True)
class Row:
    """An edit and what its paper promises of it."""

    edit: Edit
    start: bool = True  # the model is unchanged at start
    merge: str = ""  # what an error says where merging is not exact; '' where it is
    on: tuple[str, ...] = EVERY
    switch: bool = True  # its modules have `.enabled`

    def __str__(self) -> str:
        said = self.edit.model_dump(exclude_defaults=True)
        return "-".join([type(self.edit).__name__, *(f"{k}={v}" for k, v in said.items() if k != "kind")])


BIASED = ("gpt2", "opt", "bert", "roberta", "bart")  # every linear layer of theirs has a bias
ROOM = ("llama", "qwen3_moe", *BIASED)  # ... or can be given one by the configuration
NO_ROOM = tuple(sorted(set(EVERY) - set(ROOM)))
ROWS = [
    Row(LoRA(rank=4)),
    Row(LoRA(rank=2, alpha=3.0, rslora=True)),
    Row(LoRA(rank=3, targets=(r".*\.1\..*",))),
    Row(LoRA(rank=2, dora=True, rslora=True)),
    Row(LoRA(rank=2, init="pissa")),
    Row(LoRA(rank=2, init="pissa", dora=True, iterations=4), on=("llama", "gpt2")),
    Row(LoRA(rank=4, ranks={r".*\.1\..*": 2}, alphas={r".*\.0\..*": 3.0})),
    Row(LoRA(rank=4, targets=("embed_tokens", "lm_head", "k_proj")), on=("llama", "opt")),  # tied in OPT
    Row(LoRA(rank=4, targets=("wte",), dora=True), on=("gpt2",)),
    Row(LoRA(rank=4, targets=("lm_head",), init="pissa"), on=("gpt2",)),
    Row(LoRA(rank=4, targets=("word_embeddings",)), on=("bert", "roberta")),
    Row(AdaLoRA(rank=4, target_rank=2)),
    Row(Full(), switch=False),
    Row(Full(targets="1"), switch=False),
    Row(TaskHead(), on=("bert", "roberta"), switch=False),
    Row(Adapter(placement="houlsby", size=8, activation="silu"), merge="not linear"),
    Row(Adapter(placement="pfeiffer", size=8), merge="not linear"),
    Row(Adapter(placement="parallel", size=8), merge="not linear"),
    Row(BitFit(), on=ROOM),
    Row(BitFit(), on=NO_ROOM, merge="no setting that gives such layers a bias"),
    Row(BitFit(add=False), on=BIASED),
    Row(BitFit(which="query-mlp"), on=ROOM),
    Row(Norms()),
    Row(IA3()),
    Row(TinyTL(size=8), merge="not linear"),
    Row(NewTokens(tokens=("one", "two"))),
    Row(PromptTuning(tokens=3), start=False, merge="cannot be merged"),  # the other prompts: laws/test_prompts.py
]  # fmt: skip


def pairs(*, on: tuple[str, ...] = EVERY, **wanted: Any) -> list[Any]:
    """(row, architecture) of every row with these fields."""
    rows = [r for r in ROWS if all(bool(getattr(r, key)) == value for key, value in wanted.items())]
    return [pytest.param(row, kind, id=f"{row}-{kind}") for row, kind in itertools.product(rows, on) if kind in row.on]


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A frozen random model, with larger weights than at the usual start, so that a difference shows."""
    torch.manual_seed(0)
    auto, name, settings = OTHERS.get(kind) or (AutoModelForCausalLM, kind, CAUSAL[kind])
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, **ids, **settings)
    config._experts_implementation = "eager"
    model = auto.from_config(config, experts_implementation="eager")
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    if (beside := getattr(model, "final_logits_bias", None)) is not None:
        nn.init.normal_(beside)
    return model.to(dtype).eval().requires_grad_(False)


TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, ids: Tensor = TOKENS) -> Tensor:
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model(**inputs).logits


def with_new(ids: Tensor, model: nn.Module) -> Tensor:
    """The ids, and where the vocabulary has grown, the new ones."""
    size = int(model.config.get_text_config().vocab_size)
    return torch.cat([ids, torch.arange(VOCABULARY, size).expand(len(ids), -1)], 1)


def known(out: Tensor, like: Tensor) -> Tensor:
    """The logits of what the base knows."""
    return out[..., : like.shape[-1]]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def disturb(model: nn.Module, by: float = 0.1) -> None:
    """Move what trains, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))


def adapted(row: Row, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with the row's edit, moved."""
    model = build(kind, dtype)
    row.edit.apply(model)
    disturb(model)
    return model


def switch(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = on


@pytest.mark.parametrize(("row", "kind"), pairs(start=True))
def test_identity_at_start(row: Row, kind: str) -> None:
    model = build(kind)
    before = logits(model)
    row.edit.apply(model)
    assert torch.allclose(known(logits(model), before), before, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("row", "kind"), pairs())
def test_exactly_the_promised_parameters_train_and_get_gradients(row: Row, kind: str) -> None:
    model = adapted(row, kind)
    promised = set(row.edit.tensors(model)) - set(row.edit.state(model))  # of a state, what is kept does not train
    assert set(trained(model)) == promised and promised
    logits(model, with_new(TOKENS, model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in promised:
            assert parameter.grad is not None, name
            # what moves all scores of a softmax alike, as the keys' bias does without rotation, has a gradient of 0
            assert parameter.grad.abs().sum() > 0 or "key" in name or "k_proj" in name, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("row", "kind"), pairs(switch=True))
def test_disabled_is_the_base(row: Row, kind: str) -> None:
    base = logits(build(kind))
    model = adapted(row, kind)
    tuned = logits(model)
    if not isinstance(row.edit, NewTokens):
        assert (tuned - base).abs().max() > 1e-4
    switch(model, False)
    assert torch.equal(logits(model), base)
    switch(model, True)
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize(("row", "kind"), pairs(merge=False))
def test_merged_is_unmerged(row: Row, kind: str) -> None:
    model = adapted(row, kind)
    ids = with_new(TOKENS, model)
    tuned = logits(model, ids)
    row.edit.merge(model)
    assert not [m for m in model.modules() if getattr(m, "edit", None) is not None]
    fresh = type(model)(copy.deepcopy(model.config)).double().eval()  # what others would build from the configuration
    missing = fresh.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    for merged in (model, fresh):
        assert torch.allclose(logits(merged, ids), tuned, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("row", "kind"), pairs(merge=True))
def test_what_cannot_be_merged_says_so(row: Row, kind: str) -> None:
    with pytest.raises(FettleError, match=row.merge):
        row.edit.merge(adapted(row, kind))


@pytest.mark.parametrize(("row", "kind"), pairs())
def test_tensors_replayed_on_the_base_give_the_same_model(row: Row, kind: str) -> None:
    model, other = adapted(row, kind), build(kind)
    row.edit.apply(other)
    kept = {name: t.clone() for name, t in row.edit.tensors(model).items()}
    row.edit.settle(other)
    there = row.edit.tensors(other)
    assert set(there) == set(kept)
    with torch.no_grad():
        for name, tensor in there.items():
            tensor.copy_(kept[name])
    ids = with_new(TOKENS, model)
    assert torch.allclose(logits(model, ids), logits(other, ids), atol=1e-12, rtol=0)


# A document; a prompt with two children, of which one has a child; padding that nobody sees.
SEGMENTS = (Segment(0, 7), Segment(7, 12), Segment(12, 15, 1), Segment(15, 21, 1), Segment(21, 24, 3), Segment(24, 32))
PATHS = ((0,), (1, 2), (1, 3, 4))


def forest_batch(ids: Tensor) -> Batch:
    positions = torch.zeros(32, dtype=torch.int64)
    for s in SEGMENTS:
        first = int(positions[SEGMENTS[s.parent].stop - 1]) + 1 if s.parent >= 0 else 0
        positions[s.start : s.stop] = torch.arange(first, first + s.stop - s.start)
    names = tuple("" if i == len(SEGMENTS) - 1 else "x" for i in range(len(SEGMENTS)))
    return Batch(ids, positions, torch.full((32,), -100), torch.zeros(32), SEGMENTS, names)


@pytest.mark.parametrize(("row", "kind"), pairs(on=tuple(CAUSAL)))
def test_a_forest_is_each_path_alone(row: Row, kind: str) -> None:
    model = adapted(row, kind)
    top = int(model.config.vocab_size)
    ids = torch.randint(3, top, (32,), generator=torch.Generator().manual_seed(3))
    rows = [torch.cat([torch.arange(SEGMENTS[i].start, SEGMENTS[i].stop) for i in path]) for path in PATHS]
    alone = [logits(model, ids[index][None])[0] for index in rows]
    for backend in ("segments", "dense", "paths"):
        forest = Forest(copy.deepcopy(model), backend=backend)
        together = forest.head.logits(forest.hidden(forest_batch(ids)))
        for index, expected in zip(rows, alone, strict=True):
            assert torch.allclose(together[index], expected, atol=1e-6, rtol=0), backend


@pytest.mark.parametrize(("row", "kind"), pairs())
def test_checkpointing_changes_no_gradient_in_float64_and_bf16(row: Row, kind: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        plain = adapted(row, kind, dtype)
        again = copy.deepcopy(plain)
        checkpoint_layers(again)
        again.train()
        ids = with_new(TOKENS, plain)
        for model in (plain, again):
            logits(model, ids).float().square().sum().backward()
        assert trained(plain).keys() == trained(again).keys()
        for (name, one), two in zip(trained(plain).items(), trained(again).values(), strict=True):
            assert one.grad is not None and two.grad is not None and one.grad.isfinite().all()
            assert one.dtype in (torch.float64, torch.float32) or not row.switch, name
            # checkpointing makes T5's position bias ask for a gradient, so that torch takes another attention kernel
            loose = 0.0 if kind != "t5" else 1e-12 if dtype == torch.float64 else torch.inf
            assert (one.grad - two.grad).norm() <= loose * (1 + one.grad.norm()), name


@pytest.mark.parametrize(("row", "kind"), pairs(on=("llama", "gpt2", "bert", "t5"), switch=True))
def test_on_a_base_of_four_bits(row: Row, kind: str) -> None:
    model, quantized = build(kind, torch.float32), NF4()
    quantized.apply(model)
    held = set(quantized.tensors(model))
    base = logits(model)
    row.edit.apply(model)
    assert not row.start or torch.allclose(known(logits(model), base), base, atol=1e-4, rtol=0)
    disturb(model)
    assert set(trained(model)) <= set(row.edit.tensors(model)) and not held & set(trained(model))
    logits(model, with_new(TOKENS, model)).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


STACKS = [
    [LoRA(rank=2), LoRA(rank=3)],
    [LoRA(rank=2), BitFit(), IA3(), Norms()],
    [IA3(), Norms(), BitFit(), LoRA(rank=2)],
    [BitFit(), Norms(), BitFit(which="query-mlp"), Norms(biases=False)],
    [NewTokens(tokens=("one",)), LoRA(rank=2), NewTokens(tokens=("two", "three"))],
]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("edits", STACKS, ids=lambda edits: "+".join(e.kind for e in edits))
def test_stacked_edits_keep_apart_and_merge_in_their_order(kind: str, edits: list[Edit]) -> None:
    model = build(kind)
    for edit in edits:
        edit.apply(model)
    names = [set(edit.tensors(model)) for edit in edits]
    disturb(model)
    ids = with_new(TOKENS, model)
    tuned = logits(model, ids)
    assert sum(map(len, names)) == len(set().union(*names))
    for edit in edits:
        edit.merge(model)
    assert not [m for m in model.modules() if getattr(m, "edit", None) is not None]
    assert torch.allclose(logits(model, ids), tuned, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "qwen3_moe"])
def test_an_adapter_stands_with_what_comes_after_it(kind: str) -> None:
    edits = [
        LoRA(rank=2),
        Adapter(placement="parallel", size=4),
        Adapter(placement="houlsby", size=4),
        TinyTL(size=4),
        IA3(),
    ]
    model = build(kind)
    base = logits(model)
    for edit in edits:
        edit.apply(model)
    assert torch.allclose(logits(model), base, atol=1e-12, rtol=0)
    disturb(model)
    logits(model).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())
    assert set(trained(model)) == set().union(*(e.tensors(model) for e in edits))
    switch(model, False)
    assert torch.equal(logits(model), base)


def lora_model(kind: str, edit: LoRA) -> nn.Module:
    return adapted(Row(edit), kind)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_of_lora_are_those_of_the_plain_formula(kind: str) -> None:
    model = lora_model(kind, LoRA(rank=4))
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    x = torch.randn(3, 5, layer.a.shape[1], dtype=torch.float64, requires_grad=True)
    a, b = layer.a.detach().double().requires_grad_(), layer.b.detach().double().requires_grad_()
    expected = layer.base(x) + layer.scale * (x @ a.T @ b.T)
    found = layer(x)
    assert torch.allclose(found, expected, atol=1e-12)
    up = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, a, b), up)
    got = torch.autograd.grad(found, (x, layer.a, layer.b), up)
    for one, two in zip(wanted, got, strict=True):
        assert torch.allclose(one, two.double(), atol=1e-5 if two.dtype == torch.float32 else 1e-12)


DROPPING = [
    LoRA(rank=4, dropout=0.5),
    LoRA(rank=4, dropout=0.5, dora=True),
    AdaLoRA(rank=4, target_rank=2, dropout=0.5),
    Adapter(size=4, dropout=0.5),
]


@pytest.mark.parametrize("edit", DROPPING, ids=lambda e: e.kind)
def test_dropout_is_off_outside_of_training_and_on_inside(edit: Edit) -> None:
    model = adapted(Row(edit), "llama").eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    still = logits(model.eval())
    assert torch.equal(logits(model.train().requires_grad_(False)), still), "frozen, under the edits of a later stage"


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_wrapper_keeps_the_mode_of_what_it_wraps(row: Row) -> None:
    model = build(row.on[0]).eval()
    row.edit.apply(model)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("kind", EVERY)
def test_freeze_after_full_leaves_the_rest_training(kind: str) -> None:
    model = build(kind)
    Full().apply(model)
    Freeze(targets=r".*\.0").apply(model)
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    blocks = [name for name in state if ".0." in name]
    assert blocks and not any(state[name] for name in blocks)
    assert all(state[name] for name in state if ".0." not in name)


def test_bad_targets_and_sizes_are_sentences() -> None:
    model = build("llama")
    for edit, said in [
        (LoRA(targets=("q_porj",)), "matches no linear layer"),
        (LoRA(rank=1000), "rank 1000 is over the size"),
        (Full(targets="layerz"), "matches no module"),
        (Adapter(size=33), "adapter.size: 33 is over the width"),
        (BitFit(add=False), "has no biases"),
        (Norms(targets="nrom"), "matches none of the 5 norms"),
        (TinyTL(size=9), "must divide"),
    ]:
        with pytest.raises(FettleError, match=said):
            edit.apply(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "t5", "bart"])
def test_adapters_around_a_grown_vocabulary_merge(kind: str) -> None:
    model = build(kind)
    names = {id(m): n for n, m in model.named_modules()}
    stacks = (model.get_encoder(), model.get_decoder()) if model.config.is_encoder_decoder else (model,)
    ends = [*(stack.get_input_embeddings() for stack in stacks), model.get_output_embeddings()]
    targets = tuple(names[id(m)] for m in ends if m is not None)
    edits = [NewTokens(tokens=("one", "two")), LoRA(rank=2, targets=targets), NewTokens(tokens=("three",))]
    for edit in edits:
        edit.apply(model)
    assert model.config.vocab_size == VOCABULARY + 3
    disturb(model)
    ids = with_new(TOKENS, model)
    tuned = logits(model, ids)
    for edit in edits:
        edit.merge(model)
    assert torch.allclose(logits(model, ids), tuned, atol=1e-10, rtol=1e-8)


def test_equal_edits_of_a_list_are_two_also_in_a_copy() -> None:
    model = build("llama")
    edits = [LoRA(rank=2), LoRA(rank=2)]
    for edit in edits:
        edit.apply(model)
    assert edits[0] == edits[1]
    for there in (model, copy.deepcopy(model)):
        inner, outer = (set(edit.tensors(there)) for edit in edits)
        assert inner and not inner & outer and all(".base." in name for name in inner)
    assert set(LoRA(rank=2).tensors(model)) == inner | outer  # read again, it is as good as either


@pytest.mark.parametrize("other", [LoRA(rank=2), NewTokens(tokens=("one",)), BitFit(), Norms(), PromptTuning(tokens=2)])
def test_full_owns_the_weights_of_the_model_alone(other: Edit) -> None:
    for edits in ([Full(), other], [other, Full()]):
        model = build("llama")
        own = {id(p) for p in model.parameters()}
        for edit in edits:
            edit.apply(model)
        full, added = (next(e for e in edits if isinstance(e, Full) == is_full) for is_full in (True, False))
        assert {id(p) for n, p in model.named_parameters() if n in full.tensors(model)} == own
        assert not set(full.tensors(model)) & set(added.tensors(model))
        assert set(trained(model)) == set(full.tensors(model)) | set(added.tensors(model))


def test_a_quantizer_refuses_what_an_edit_before_it_trains_also_in_a_later_stage() -> None:
    for later in (False, True):
        model = build("llama", torch.float32)
        Full(targets=r".*\.1\..*").apply(model)
        if later:
            model.requires_grad_(False)
        with pytest.raises(
            FettleError, match=r"nf4 comes after an edit that trains model\.layers\.1\.\S+,.* put nf4 before it"
        ):
            NF4().apply(model)
    model = build("llama", torch.float32)
    Full(targets=r".*\.1\..*").apply(model)
    NF4(targets=r".*\.0\..*").apply(model)
    assert len(trained(model)) == len(Full(targets=r".*\.1\..*").tensors(model))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
def test_either_name_of_a_tied_weight_means_it(kind: str) -> None:
    if kind == "bert":
        auto, settings = AutoModelForMaskedLM, BERT
        model = auto.from_config(AutoConfig.for_model("bert", vocab_size=VOCABULARY, **settings)).requires_grad_(False)
    else:
        model = build(kind)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    Full(targets=(head,)).apply(model)
    weight = model.get_output_embeddings().weight
    assert weight is model.get_input_embeddings().weight and weight.requires_grad
    assert any(t.data_ptr() == weight.data_ptr() for t in Full(targets=(head,)).tensors(model).values())
    Freeze(targets=(head,)).apply(model)
    assert not weight.requires_grad
