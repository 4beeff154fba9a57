"""What a LoRA keeps for the backward pass, how it drops, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig

from fettle.core.errors import FettleError
from fettle.models.rehearsal import fake_model, rehearsing
from fettle.models.select import adaptable, linears
from fettle.models.still import still
from fettle.peft import AdaLoRA, LoRA
from fettle.peft.adalora import budget_at, over_budget
from fettle.peft.lora import by_layer, dropout_mask, low_rank
from fettle.quantize import NF4, LoftQ
from fettle.train.optim import Masters, OptimSpec, build, set_lr


def saved_bytes(run: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass beside the tensors given to it, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    known = {t.untyped_storage().data_ptr() for t in given}
    size = sum(t.untyped_storage().nbytes() for ptr, t in kept.items() if ptr not in known)
    del out
    return size


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_adapters_of_one_input_keep_it_once_and_little_more(dropout: float, dtype: torch.dtype) -> None:
    """Also where it is dropped: not a second copy of x, not a mask; and nothing as wide as the output."""
    tokens, width, rank = 64, 256, 4
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weights = [torch.randn(width, width, dtype=dtype) for _ in range(3)]
    factors = [
        (torch.randn(rank, width, requires_grad=True), torch.randn(width, rank, requires_grad=True)) for _ in weights
    ]

    def run() -> Tensor:
        return sum(low_rank(x @ w, x, a, b, 0.5, dropout) for w, (a, b) in zip(weights, factors, strict=True))

    given = [x, *weights, *(t for pair in factors for t in pair)]
    assert saved_bytes(run, given) <= 3 * tokens * rank * x.element_size()


def test_what_is_dropped_has_the_right_share_and_mean_and_comes_again() -> None:
    x = torch.randn(300, 301, dtype=torch.float64)
    y = dropout_mask(x, 0.1, 7)
    assert y is not None
    assert abs((y == 0).double().mean().item() - 0.1) < 0.005
    assert y.max().item() == pytest.approx(1 / (1 - round(0.1 * 65536) / 65536))
    assert torch.equal(y, dropout_mask(x, 0.1, 7)) and not torch.equal(y, dropout_mask(x, 0.1, 8))
    assert dropout_mask(x, 0.0, 7) is None


def test_gradients_with_dropout_are_those_of_the_dropped_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn(5, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    a, b = (
        torch.randn(2, 8, dtype=torch.float64, generator=generator),
        torch.randn(8, 2, dtype=torch.float64, generator=generator),
    )
    for t in (x, a, b):
        t.requires_grad_()
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    found = torch.autograd.grad(low_rank(torch.zeros(5, 8, dtype=torch.float64), x, a, b, 0.7, 0.4), (x, a, b), up)
    wanted = torch.autograd.grad(0.7 * (x * dropout_mask(x, 0.4, seed)) @ a.T @ b.T, (x, a, b), up)
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-12)


def test_learning_rates_differ_by_name_and_follow_the_schedule() -> None:
    masters = Masters(
        [(n, nn.Parameter(torch.ones(2, 2))) for n in ("x.a", "x.b", "y.b")] + [("v", nn.Parameter(torch.ones(2)))]
    )
    optimizer = build(OptimSpec(weight_decay=0.1), masters, {"x.b": 16.0, "y.b": 16.0})
    set_lr(optimizer, 1e-3)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert {n: found[id(m)] for n, m in masters.masters.items()} == {
        "x.a": (1e-3, 0.1), "x.b": (16e-3, 0.1), "y.b": (16e-3, 0.1), "v": (1e-3, 0.0)
    }  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=32, tie_word_embeddings=True
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)


def test_head_and_embeddings_are_meant_only_by_name() -> None:
    model = small()
    assert set(adaptable(model)) == set(linears(model)) == set(adaptable(model, ".*"))
    assert set(adaptable(model, ("lm_head", "embed_tokens"))) == {"lm_head", "model.embed_tokens"}
    assert len(adaptable(model, ("all-linear", "model.embed_tokens"))) == 15
    with pytest.raises(FettleError, match="matches no linear layer"):
        adaptable(model, ("embed_tokns", "lm_head"))


def test_two_patterns_that_disagree_and_one_that_means_nothing() -> None:
    names = ["a.q", "a.k", "b.q"]
    assert by_layer({"q": 2, "b.q": 2}, names, "lora.ranks") == {"a.q": 2, "b.q": 2}
    with pytest.raises(FettleError, match="'q' says 2 of b.q and 'b.q' says 3; make one narrower"):
        by_layer({"q": 2, "b.q": 3}, names, "lora.ranks")
    with pytest.raises(FettleError, match="lora.ranks: 'v' matches none of the 3 targets"):
        by_layer({"v": 3}, names, "lora.ranks")


def test_what_lora_cannot_do_says_so() -> None:
    model = small()
    LoRA(rank=2, targets="q_proj").apply(model)
    for edit, said in [
        (LoRA(rank=3, dora=True, targets="q_proj"), "'dora' needs the plain weight of .*q_proj, which has an adapter"),
        (LoRA(rank=3, init="pissa", targets="q_proj"), "'init: pissa' needs the plain weight"),
        (LoRA(rank=3, init="loftq", targets="k_proj"), "finds no residual at .*k_proj"),
        (LoRA(rank=3, ranks={"k_proj": 99}, targets="k_proj"), "rank 99 is over the size"),
        (AdaLoRA(rank=99, target_rank=2), "rank 99 is over the size"),
    ]:
        with pytest.raises(FettleError, match=said):
            edit.apply(model)
    with pytest.raises(ValidationError, match="'target_rank' 9 is over 'rank' 4"):
        AdaLoRA(rank=4, target_rank=9)
    with pytest.raises(ValidationError, match="leave no step in which the budget falls"):
        AdaLoRA(warmup=0.5, final=0.5)
    with pytest.raises(FettleError, match="10 steps of 'warmup' and 3 of 'final' leave none of 12"):
        AdaLoRA(warmup=10, final=3).ends(12)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_embedding_that_only_keeps_the_weight_is_refused(kind: str) -> None:
    sizes = {"d_model": 16, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    config = AutoConfig.for_model(kind, decoder_start_token_id=0, **sizes)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(FettleError, match=r"shared only keeps the weight that .*encoder\.embed_tokens and .*decoder\."):
        LoRA(rank=2, targets="shared").apply(model)
    LoRA(rank=2, targets="embed_tokens").apply(model)
    ids = torch.arange(5)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith((".a", ".b")))


def test_the_budget_falls_as_a_cube_and_the_least_go() -> None:
    assert [budget_at(t, (2, 10), (100, 20)) for t in (1, 2, 6, 10, 11)] == [100, 100, 30, 20, 20]
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert over_budget(scores, 2).tolist() == [False, True, True, False]
    assert not over_budget(scores, 4).any()


def test_a_tied_head_is_merged_alone() -> None:
    model, ids = small(), torch.arange(9)[None]
    edit = LoRA(rank=2, targets="lm_head")
    edit.apply(model)
    with torch.no_grad():
        for tensor in edit.tensors(model).values():
            tensor.normal_()
    embedding, tuned = model.model.embed_tokens.weight.clone(), model(input_ids=ids).logits
    edit.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding) and not model.config.tie_word_embeddings
    assert torch.allclose(model(input_ids=ids).logits, tuned, atol=1e-12)


def test_loftq_hands_its_residual_to_the_lora() -> None:
    """The model starts nearer to the base than the quantized one, whatever the scale, and only for the same rank."""
    model, ids = small(), torch.arange(9)[None]
    base = model(input_ids=ids).logits
    targets = ("q_proj", "up_proj")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    NF4(targets=targets, loftq=LoftQ(rank=4, fast=False)).apply(model)
    quantized = model(input_ids=ids).logits
    with pytest.raises(FettleError, match="rank 3 of .*q_proj is not the 4 of the quantizer's loftq"):
        LoRA(rank=3, init="loftq", targets=targets).apply(model)
    LoRA(rank=4, alpha=12.0, init="loftq", targets=targets).apply(model)
    layer = model.model.layers[0].self_attn.q_proj
    left = weight - layer.base.dequantized()
    assert (left - layer.delta()).norm().item() == pytest.approx(torch.linalg.svdvals(left)[4:].norm().item(), rel=1e-6)
    assert (model(input_ids=ids).logits - base).norm() < 0.9 * (quantized - base).norm()
    assert layer.base.residual is None


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_step_can_be_rehearsed_on_fake_tensors(dropout: float) -> None:
    model = small().float()
    LoRA(rank=2, dropout=dropout, dora=True, targets=("all-linear", "embed_tokens")).apply(model)
    AdaLoRA(rank=2, target_rank=1, targets="q_proj").apply(model)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = fake_model(model, fake, torch.device("cpu")).train()
    with rehearsing(fake, 32) as rehearsal:
        twin(input_ids=torch.arange(9)[None]).logits.sum().backward()
    assert rehearsal.peak.total > 0


def test_the_scale_where_alpha_is_left_out() -> None:
    layers = {}
    for rank, rslora in itertools.product((4, 16), (False, True)):
        model = nn.ModuleDict({"up": nn.Linear(32, 32)})
        LoRA(rank=rank, rslora=rslora).apply(model)
        layers[rank, rslora] = model["up"].scale
    assert layers == {(4, False): 2.0, (16, False): 2.0, (4, True): 4.0, (16, True): 2.0}  # 8 / sqrt(r)


@pytest.mark.parametrize(
    "edit", [LoRA(rank=3), LoRA(rank=3, dora=True), LoRA(rank=3, init="pissa"), LoRA(rank=3, rslora=True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_bits(edit: LoRA, dtype: torch.dtype) -> None:
    """The path of generation, with factors rounded once, gives what the path of training gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.Linear(24, 8, dtype=dtype))
    edit.model_copy(update={"targets": ("0", "1")}).apply(model)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    x = torch.randn(2, 5, 16, dtype=dtype)
    trained = model(x)
    kept: dict = {}
    with torch.no_grad():
        assert torch.equal(model(x), trained)
        with still(kept):
            assert torch.equal(model(x), trained) and torch.equal(model(x), trained)
    assert trained.requires_grad and kept
