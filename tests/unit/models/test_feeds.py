"""What feeds what is found by structure and proved by trial, on architectures of every habit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.models.feeds import Feed, feeds, move
from fettle.models.surgery import train

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
# By architecture: its configuration, and the feeds of a block: kind, source, readers.
EXPECTED: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]]]] = {
    "llama": (LLAMA, [("norm", "input_layernorm", "q_proj k_proj v_proj"), ("linear", "v_proj", "o_proj"),
                      ("norm", "post_attention_layernorm", "gate_proj up_proj"), ("linear", "up_proj", "down_proj")]),
    "gpt2": (GPT2, [("norm", "ln_1", "c_attn"), ("linear", "c_attn", "c_proj"), ("norm", "ln_2", "c_fc")]),
    "opt": ({**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32},
            [("norm", "self_attn_layer_norm", "q_proj k_proj v_proj"), ("linear", "v_proj", "out_proj"),
             ("norm", "final_layer_norm", "fc1"), ("linear", "fc1", "fc2")]),  # ReLU lets a scale through
    "phi3": ({**LLAMA, "pad_token_id": 0}, [("norm", "input_layernorm", "qkv_proj"), ("linear", "qkv_proj", "o_proj"),
                     ("norm", "post_attention_layernorm", "gate_up_proj"), ("linear", "gate_up_proj", "down_proj")]),
    "gemma2": ({**LLAMA, "head_dim": 8},
               [("offset", "input_layernorm", "q_proj k_proj v_proj"), ("linear", "v_proj", "o_proj"),
                ("offset", "pre_feedforward_layernorm", "gate_proj up_proj"), ("linear", "up_proj", "down_proj")]),
    "cohere": (LLAMA, [("norm", "input_layernorm", "q_proj k_proj v_proj gate_proj up_proj"), ("linear", "v_proj", "o_proj"),
                       ("linear", "up_proj", "down_proj")]),  # one norm feeds both halves
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
              [("norm", "input_layernorm", "query_key_value"), ("linear", "query_key_value", "dense"),
               ("norm", "post_attention_layernorm", "dense_h_to_4h")]),  # heads apart in one layer
    "qwen3_moe": ({**LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
                  [("norm", "input_layernorm", "q_proj k_proj v_proj"), ("linear", "v_proj", "o_proj")]),
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **EXPECTED[kind][0])
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(3, 13)[None]).logits.double()


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPECTED)
def test_they_are_found_and_moving_scale_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = feeds(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), (
        "the trials leave no trace"
    )
    by_block: dict[str, list[tuple[str, str, str]]] = {}
    for feed in found.found:
        seen = (feed.kind, last(feed.source), " ".join(last(r) for r in feed.readers))
        by_block.setdefault(feed.reading.block, []).append(seen)
    assert len(by_block) == 2 and all(seen == EXPECTED[kind][1] for seen in by_block.values())
    before = logits(model)
    generator = torch.Generator().manual_seed(1)
    for feed in found.found:
        move(model, feed, 0.3 + 3 * torch.rand(len(feed.rows), generator=generator, dtype=torch.float64))
    exact = {torch.float64: 1e-6, torch.bfloat16: 0.2}  # transformers' own norms compute in float32
    assert (logits(model) - before).abs().max() < exact[dtype] * before.std()
    assert any(not torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_is_not_understood_is_listed_with_the_reason() -> None:
    left = feeds(build("gpt2")).left
    assert [r.readers for r in left] == [(f"transformer.h.{i}.mlp.c_proj",) for i in range(2)]
    assert all("without changing the block" in why for why in left.values())
    model = build("llama")
    train(model.model.layers[0].mlp.up_proj.weight)
    reasons = {r.readers[0]: why for r, why in feeds(model).left.items()}
    assert reasons["model.layers.0.mlp.gate_proj"] == "an edit trains model.layers.0.mlp.up_proj"


def test_a_source_that_something_else_reads_too_is_left_alone() -> None:
    model = build("llama")
    layer = model.model.layers[0]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x) + x  # the norm's output now goes on beside the layers
    found = feeds(model)
    assert "model.layers.0.post_attention_layernorm" not in {f.source for f in found.found}
    assert "model.layers.1.post_attention_layernorm" in {f.source for f in found.found}


def test_inputs_that_share_a_channel_share_a_factor() -> None:
    feed = next(f for f in feeds(build("llama")).found if last(f.source) == "v_proj")
    assert isinstance(feed, Feed) and len(feed.rows) == 16 and len(feed.spread) == 32
    values = torch.arange(32.0)
    by_hand = values.view(2, 2, 8).amax(1).flatten()  # two query heads a key head, of 8
    assert torch.equal(feed.reduce(values), by_hand)
