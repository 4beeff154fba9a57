"""What the table of laws does not say: BitFit's, TinyTL's and the adapters' own promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.peft import Adapter, BitFit, Full, LoRA, Norms, TinyTL
from fettle.peft.tinytl import lite

TOKENS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(1))
LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 160, "vocab_size": 64,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}


def build(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(LLAMA if kind == "llama" else GPT2), **settings)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits.square().mean()


@pytest.mark.parametrize("edit", [BitFit(), Norms()], ids=lambda e: e.kind)
def test_the_gradient_of_a_change_is_that_of_the_weight_itself(edit: Edit) -> None:
    model, plain = build("gpt2"), build("gpt2")
    edit.apply(model)
    loss(model).backward()
    wanted = "bias" if isinstance(edit, BitFit) else "ln_"
    own = {n: p.requires_grad_() for n, p in plain.named_parameters() if wanted in n}
    loss(plain).backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in own.items():
        layer, _, weight = name.rpartition(".")
        key = f"{layer}.delta" if isinstance(edit, BitFit) else f"{layer}.d_{weight}"
        assert torch.allclose(mine.pop(key), parameter.grad, atol=1e-12), name
    assert not mine


def test_a_llama_with_added_biases_is_the_llama_whose_configuration_has_them() -> None:
    model, other = build("llama"), build("llama", attention_bias=True, mlp_bias=True)
    edit = BitFit()
    edit.apply(model)
    weights = build("llama").state_dict()
    for name, tensor in edit.tensors(model).items():
        tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
        weights[name.replace(".delta", ".bias")] = tensor.clone()
    assert not any(other.load_state_dict(weights))
    assert torch.allclose(loss(model), loss(other), atol=1e-12)
    edit.merge(model)
    assert model.config.attention_bias and model.config.mlp_bias


def test_the_papers_subset_is_queries_and_the_layers_that_enter_the_mlp() -> None:
    model, edit = build("gpt2"), BitFit(which="query-mlp")
    edit.apply(model)
    found = {name.removeprefix("transformer.h."): len(t) for name, t in edit.tensors(model).items()}
    assert found == {f"{i}.{n}": w for i in (0, 1) for n, w in (("attn.c_attn.delta", 32), ("mlp.c_fc.delta", 128))}


def test_queries_that_cannot_be_told_from_keys_are_a_sentence() -> None:
    config = AutoConfig.for_model("gpt_neox", **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    with pytest.raises(FettleError, match="which of its outputs are queries"):
        BitFit(which="query-mlp").apply(AutoModelForCausalLM.from_config(config))


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(size for _, size in storages.values())


def activations(edit: Edit) -> int:
    model = build("llama", torch.float32)
    edit.apply(model)
    embedding = model.get_input_embeddings()(TOKENS.repeat(1, 12))
    body = lambda: model.model(inputs_embeds=embedding, use_cache=False).last_hidden_state  # noqa: E731
    return kept_bytes(model, body)


def test_tinytl_keeps_fewer_activations_than_lora_and_full() -> None:
    found = {
        name: activations(edit)
        for name, edit in {
            "full": Full(), "lora": LoRA(rank=8), "tinytl": TinyTL(size=8), "bitfit": BitFit(), "adapter": Adapter(size=8),
        }.items()
    }  # fmt: skip
    print(found)
    assert found["tinytl"] < 0.8 * found["lora"] and found["tinytl"] < 0.8 * found["full"]
    assert found["tinytl"] < 1.1 * found["bitfit"]  # what the residuals themselves keep is little


def test_a_lite_residual_keeps_its_narrow_input_and_inside_only() -> None:
    x = torch.randn(1, 50, 64, requires_grad=True)
    grouped, up = torch.randn(2, 4, 16, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    holder = nn.ParameterList([grouped, up])
    floats = kept_bytes(holder, lambda: lite(x, grouped, up, 2)) / 4
    assert floats <= 50 * (64 // 2 + 8)


def test_a_lite_residual_by_its_formula() -> None:
    x, grouped, up = torch.randn(5, 12).double(), torch.randn(2, 3, 3).double(), torch.randn(12, 6).double()
    pooled = x.view(5, 6, 2).mean(-1)
    inner = torch.cat([pooled[:, :3] @ grouped[0].T, pooled[:, 3:] @ grouped[1].T], 1).relu()
    assert torch.allclose(lite(x, grouped, up, 2), inner @ up.T, atol=1e-14)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_adapters_answer_with_a_cache_as_without(placement: Any) -> None:
    model = build("gpt2")
    edit = Adapter(placement=placement, size=8)
    edit.apply(model)
    for name, tensor in edit.tensors(model).items():
        tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    whole = model(input_ids=TOKENS, use_cache=False).logits
    first = model(input_ids=TOKENS[:, :6], use_cache=True)
    second = model(input_ids=TOKENS[:, 6:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-6)
