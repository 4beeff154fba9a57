"""Laws that every edit keeps, on several architectures."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.peft import Freeze, Full, LoRA
from fettle.peft.lora import LoRALinear

CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=64
    ),
    "qwen3": Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        vocab_size=64,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0),
}  # fmt: skip
LORAS = [LoRA(rank=4), LoRA(rank=2, alpha=3.0, rslora=True), LoRA(rank=3, targets=(r".*\.1\..*",))]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIGS[request.param]).double().eval()
    return built.requires_grad_(False)


TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def disturb(edit: Edit, model: nn.Module) -> None:
    """Fill what the edit trains with something, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in edit.tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor))


@pytest.mark.parametrize("edit", [*LORAS, Full()], ids=str)
def test_identity_at_start(model: nn.Module, edit: Edit) -> None:
    before = logits(model)
    edit.apply(model)
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("edit", [*LORAS, Full(), Full(targets="1")], ids=str)
def test_exactly_the_promised_parameters_train_and_get_gradients(model: nn.Module, edit: Edit) -> None:
    edit.apply(model)
    disturb(edit, model)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == set(edit.tensors(model)) and training
    logits(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in training:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("edit", LORAS, ids=str)
def test_merged_is_unmerged_and_disabled_is_the_base(model: nn.Module, edit: LoRA) -> None:
    base = logits(model)
    names = [name for name, _ in model.named_parameters()]
    edit.apply(model)
    disturb(edit, model)
    tuned = logits(model)
    assert (tuned - base).abs().max() > 1e-3
    wrapped = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for module in wrapped:
        module.enabled = False
    assert torch.equal(logits(model), base)
    for module in wrapped:
        module.enabled = True
    edit.merge(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.allclose(logits(model), tuned, atol=1e-6, rtol=0)


@pytest.mark.parametrize("edit", [*LORAS, Full()], ids=str)
def test_tensors_replayed_on_the_base_give_the_same_model(model: nn.Module, edit: Edit) -> None:
    other = copy.deepcopy(model)
    edit.apply(model)
    disturb(edit, model)
    edit.apply(other)
    with torch.no_grad():
        for name, tensor in edit.tensors(other).items():
            tensor.copy_(edit.tensors(model)[name])
    assert torch.equal(logits(model), logits(other))


def test_gradients_of_lora_are_those_of_the_plain_formula(model: nn.Module) -> None:
    LoRA(rank=4).apply(model)
    disturb(LoRA(rank=4), model)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))
    assert name
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


def test_dropout_is_off_outside_of_training_and_on_inside(model: nn.Module) -> None:
    edit = LoRA(rank=4, dropout=0.5)
    edit.apply(model)
    disturb(edit, model)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_two_stacked_edits_keep_apart_and_merge_from_the_inside_out(model: nn.Module) -> None:
    one, two = LoRA(rank=2), LoRA(rank=3)
    for edit in (one, two):
        edit.apply(model)
        disturb(edit, model)
    assert not set(one.tensors(model)) & set(two.tensors(model))
    tuned = logits(model)
    for edit in (one, two):
        edit.merge(model)
    assert not [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert torch.allclose(logits(model), tuned, atol=1e-6, rtol=0)


def test_a_wrapper_keeps_the_mode_of_what_it_wraps(model: nn.Module) -> None:
    LoRA(rank=2, dropout=0.5).apply(model.eval())
    assert not any(m.training for m in model.modules())


def test_freeze_after_full_leaves_the_rest_training(model: nn.Module) -> None:
    Full().apply(model)
    Freeze(targets="0").apply(model)
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    blocks = [name for name in state if ".0." in name]
    assert blocks and not any(state[name] for name in blocks)
    assert all(state[name] for name in state if ".1." in name)


def test_bad_targets_and_ranks_are_sentences(model: nn.Module) -> None:
    with pytest.raises(FettleError, match="matches no linear layer"):
        LoRA(targets=("q_porj",)).apply(model)
    with pytest.raises(FettleError, match="rank 1000 is over the size"):
        LoRA(rank=1000).apply(model)
    with pytest.raises(FettleError, match="matches no module"):
        Full(targets="layerz").apply(model)
