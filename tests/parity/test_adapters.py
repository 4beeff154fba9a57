"""Bottleneck adapters against AdapterHub's `adapters`: same weights, same hidden states, same gradients, in float64.

The other side's numbers are kept in fixtures/adapters.safetensors; make_adapters.py writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from fettle.peft.bottleneck import Adapter, Bottleneck

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
MODELS: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**WIDE, max_position_embeddings=16)),
    "gpt2": lambda: GPT2Model(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=32, n_positions=16)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**WIDE, num_key_value_heads=1)),
}  # fmt: skip
EDITS = {
    "houlsby": Adapter(placement="houlsby", size=4, activation="silu"),
    "pfeiffer": Adapter(placement="pfeiffer", size=4),
    "parallel": Adapter(placement="parallel", size=4),
}
KEPT = load_file(Path(__file__).parent / "fixtures" / "adapters.safetensors")
CASES = sorted({key.partition("/")[0] for key in KEPT})


def part(case: str, what: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{case}/{what}/"): t for key, t in KEPT.items() if key.startswith(f"{case}/{what}/")}


def in_places(model: nn.Module) -> dict[str, Bottleneck]:
    """Adapters by '<block>.<attention or mlp>'; the order within a block is that of the computation."""
    found: dict[str, Bottleneck] = {}
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            block = next(p for p in name.split(".") if p.isdigit())
            attention = "attn" in name or "attention" in name
            found[f"{block}.{'attention' if attention else 'mlp'}"] = module
    return found


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_gradients(case: str) -> None:
    kind, placement = case.split(".")
    model = MODELS[kind]().double().eval()
    model.load_state_dict(part(case, "base"))
    model.requires_grad_(False)
    EDITS[placement].apply(model)
    places = in_places(model)
    theirs, grads = part(case, "adapter"), part(case, "grad")
    assert {key.rpartition(".")[0] for key in theirs} == set(places)
    for key, value in theirs.items():
        place, _, weight = key.rpartition(".")
        getattr(places[place], weight).data.copy_(value)
    hidden = model(input_ids=KEPT[f"{case}/ids"]).last_hidden_state
    expected = KEPT[f"{case}/hidden"]
    assert torch.allclose(hidden, expected, atol=1e-6, rtol=1e-6)  # norms in float32 on both sides
    hidden.square().sum().backward()
    for key, value in grads.items():
        place, _, weight = key.rpartition(".")
        assert torch.allclose(getattr(places[place], weight).grad, value, atol=1e-5, rtol=1e-5), key
