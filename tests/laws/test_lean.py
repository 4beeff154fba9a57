"""Lean norms and feed-forward parts: the same model, value for value, with less kept for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fettle.models.lean import GatedMLP, RMSNorm, make_lean
from fettle.models.memory import saved_bytes
from fettle.peft.lora import LoRA, LoRALinear

BODY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 61,
    "d_model": 32,
    "d_ff": 80,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
# By kind: its configuration, the norms and the feed-forward parts that have a lean one.
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama": ({}, 5, 2),
    "mistral": ({}, 5, 2),
    "qwen3": ({"head_dim": 8}, 9, 2),
    "gemma3_text": ({"head_dim": 8}, 13, 2),
    "glm4": ({"head_dim": 8}, 9, 0),
    "mixtral": ({"num_local_experts": 4}, 5, 0),
    "olmo2": ({}, 9, 2),
    "gpt2": ({}, 0, 0),
    "t5": (T5, 12, 0),
}
IDS = torch.arange(1, 25).view(2, 12)


def pair(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model with weights of every kind drawn, and its lean copy."""
    torch.manual_seed(0)
    given = KINDS[kind][0]
    config = AutoConfig.for_model(kind, **(given if kind == "t5" else BODY | given))
    plain = (AutoModel if kind == "t5" else AutoModelForCausalLM).from_config(config, dtype=dtype).eval()
    for weight in plain.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    return plain, lean


def out(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    found = model(input_ids=IDS, **more)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def loss(model: nn.Module) -> Tensor:
    found = out(model).float()
    return (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_values_and_names_with_and_without_gradients(kind: str, dtype: torch.dtype):
    plain, lean = pair(kind, dtype)
    assert sum(isinstance(m, RMSNorm) for m in lean.modules()) == KINDS[kind][1]
    assert sum(isinstance(m, GatedMLP) for m in lean.modules()) == KINDS[kind][2]
    assert list(plain.state_dict()) == list(lean.state_dict())
    assert torch.equal(out(plain), out(lean))
    with torch.no_grad():
        assert torch.equal(out(plain), out(lean))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_gradients(kind: str):
    plain, lean = pair(kind, torch.float32)
    for model in (plain, lean):
        loss(model).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), lean.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=2e-5, atol=2e-5 * float(a.grad.abs().max()), msg=name)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_lora_learns_the_same_whether_its_input_is_kept_or_computed_again(
    kind: str, dropout: float, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, since what is computed again is what was there."""
    found = []
    for kept in (True, False):
        _, model = pair(kind, torch.float32)
        model.requires_grad_(False)
        torch.manual_seed(1)
        LoRA(rank=2, dropout=dropout).apply(model)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.b)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()
        model.train()
        with monkeypatch.context() as patch:
            if kept:
                patch.setattr("fettle.peft.lora.again", lambda x: None)
            torch.manual_seed(2)
            loss(model).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 28
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_a_second_backward_pass_over_the_same_graph_gives_the_same_again():
    _, model = pair("llama", torch.float32)
    model.requires_grad_(False)
    LoRA(rank=2).apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = loss(model)
    first, second = (torch.autograd.grad(total, trained, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_keeps_is_less_than_two_thirds():
    """Of all that a LoRA step keeps; in the blocks' own terms, g, u and h instead of g, u, act(g), their product, h twice."""
    sizes = []
    for model in pair("llama", torch.bfloat16):
        model.requires_grad_(False)
        LoRA(rank=2).apply(model)
        sizes.append(saved_bytes(model, lambda model=model: model.model(input_ids=IDS).last_hidden_state.float().sum()))
    assert sizes[1] < 2 / 3 * sizes[0]


def test_a_class_that_computes_something_else_is_left_alone():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    model = nn.Sequential(Odd(), nn.LayerNorm(8, bias=False))
    make_lean(model)
    assert [type(m) for m in model] == [Odd, nn.LayerNorm]
