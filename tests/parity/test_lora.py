"""LoRA against `peft`: the same weights give the same logits and the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fettle.peft import LoRA


@pytest.mark.parametrize(("alpha", "rslora"), [(8.0, False), (6.0, True)])
def test_logits_and_gradients_equal_pefts(alpha: float, rslora: bool) -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
    )
    base = AutoModelForCausalLM.from_config(config).double()
    ours = copy.deepcopy(base).requires_grad_(False)
    LoRA(rank=4, alpha=alpha, rslora=rslora, targets=("q_proj", "down_proj")).apply(ours)
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(base, settings).double()
    pairs = []
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            stem, ab = name.rsplit(".", 1)
            other = theirs.get_parameter(f"base_model.model.{stem}.lora_{ab.upper()}.default.weight")
            with torch.no_grad():
                parameter.normal_(std=0.3)
                other.copy_(parameter)
            pairs.append((name, parameter, other))
    assert len(pairs) == 2 * 2 * 2
    tokens = torch.randint(0, 64, (2, 7))
    one, two = ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits
    assert torch.allclose(one, two, atol=1e-12)
    one.square().sum().backward()
    two.square().sum().backward()
    for name, parameter, other in pairs:
        # our gradient is rounded once, to the float32 of the master
        assert torch.allclose(
            parameter.grad.double(), other.grad, rtol=1e-6, atol=1e-6 * other.grad.abs().max().item()
        ), name
