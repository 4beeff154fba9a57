"""Writes fixtures/adapters.safetensors: what AdapterHub's `adapters` computes with bottleneck adapters, in float64.

`adapters` needs transformers 4, so this runs in an environment of its own and its numbers are kept:

    python -m venv /tmp/hub && /tmp/hub/bin/pip install torch 'transformers==4.57.6' 'adapters==1.3.0' safetensors
    /tmp/hub/bin/python tests/parity/make_adapters.py

Keys: <case>/base/<name> weights of the base, <case>/adapter/<block>.<place>.<weight> of the adapters, <case>/grad/<the
same> gradients of the sum of squares of the last hidden states, <case>/ids and <case>/hidden.
"""

from __future__ import annotations

import re
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
MODELS = {
    "bert": (BertModel, BertConfig(**WIDE, max_position_embeddings=16)),
    "gpt2": (GPT2Model, GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=24, vocab_size=32, n_positions=16)),
    "llama": (LlamaModel, LlamaConfig(**WIDE, num_key_value_heads=1)),
}
HUB = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
}
# Before a norm `adapters` feeds a parallel adapter the residual sum, and not what the MLP sees: no parity there.
CASES = [(m, p) for m in MODELS for p in HUB if p != "parallel" or m == "bert"]
PARTS = {
    "adapter_down.0.weight": "down", "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias",
}  # fmt: skip


def place_of(name: str) -> str:
    """'1.mlp.down' of an adapter's weight."""
    block = re.search(r"\.(\d+)\.", f".{name}").group(1)
    after = "attention" if "attention" in name else "mlp"
    return f"{block}.{after}.{next(ours for theirs, ours in PARTS.items() if name.endswith(theirs))}"


def case(model_name: str, placement: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kind, config = MODELS[model_name]
    model = kind(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    base = {f"base/{n}": t.clone() for n, t in model.state_dict().items()}
    adapters.init(model)
    model.add_adapter("a", config=HUB[placement])
    model.train_adapter("a")
    model.double().eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 32, (2, 7))
    hidden = model(input_ids=ids).last_hidden_state
    hidden.square().sum().backward()
    out = base | {"ids": ids, "hidden": hidden.detach()}
    for name, parameter in trained.items():
        out[f"adapter/{place_of(name)}"] = parameter.detach().clone()
        out[f"grad/{place_of(name)}"] = parameter.grad
    return {f"{model_name}.{placement}/{key}": t.contiguous().clone() for key, t in out.items()}


if __name__ == "__main__":
    every = {k: t for m, p in CASES for k, t in case(m, p).items()}
    file = Path(__file__).parent / "fixtures" / "adapters.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(every, file)
    print(file, file.stat().st_size, sorted(k for k in every if "/adapter/" in k and k.startswith("bert.houl")))
