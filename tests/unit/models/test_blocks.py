"""Blocks found by structure, in architectures that name their parts in many ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fettle.core.errors import FettleError
from fettle.models.blocks import blocks, closing_norms, norms
from fettle.peft import IA3, Adapter, BitFit, LoRA, Norms, TinyTL

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 48}
SIDES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
OPT = {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
GATED = ("mlp", ("gate_proj", "up_proj"), "down_proj")
# kind: settings; attention's output; (module, entering layers, leaving layer) of the MLP; the norm that ends a block
TABLE: dict[str, tuple[dict[str, Any], str, tuple[str | None, tuple[str, ...], str | None], str | None]] = {
    "llama": (WIDE, "self_attn.o_proj", GATED, None),
    "gemma3_text": ({**WIDE, "head_dim": 8}, "self_attn.o_proj", GATED, None),
    "phi3": ({**WIDE, "pad_token_id": 0}, "self_attn.o_proj", ("mlp", ("gate_up_proj",), "down_proj"), None),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "attn.c_proj", ("mlp", ("c_fc",), "c_proj"), None),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64}, "attn.out_proj", ("mlp", ("fc_in",), "fc_out"), None),
    "gpt_neox": (WIDE, "attention.dense", ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"), None),
    "falcon": (WIDE, "self_attention.dense", ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"), None),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}, "self_attention.dense", ("mlp", ("dense_h_to_4h",), "dense_4h_to_h"), None),
    "opt": (OPT, "self_attn.out_proj", (None, ("fc1",), "fc2"), None),
    "mixtral": ({**WIDE, "num_key_value_heads": 2, "num_local_experts": 4}, "self_attn.o_proj", ("mlp", (), None), None),
    "bert": (WIDE, "attention.output.dense", (None, ("intermediate.dense",), "output.dense"), "output.LayerNorm"),
    "roberta": (WIDE, "attention.output.dense", (None, ("intermediate.dense",), "output.dense"), "output.LayerNorm"),
    "modernbert": ({**WIDE, "pad_token_id": 0}, "attn.Wo", ("mlp", ("Wi",), "Wo"), None),
    "albert": ({**WIDE, "embedding_size": 32}, "attention.dense", (None, ("ffn",), "ffn_output"), "full_layer_layer_norm"),
    "t5": (T5, "layer.0.SelfAttention.o", ("layer.2.DenseReluDense", ("wi",), "wo"), None),
    "bart": (SIDES, "self_attn.out_proj", (None, ("fc1",), "fc2"), "final_layer_norm"),
    "pegasus": (SIDES, "self_attn.out_proj", (None, ("fc1",), "fc2"), None),
}  # fmt: skip


def tiny(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **(TABLE[kind][0] | settings))).eval()


@pytest.mark.parametrize("kind", TABLE)
def test_the_parts_of_a_block(kind: str) -> None:
    _, out, (name, enter, leave), norm = TABLE[kind]
    model = tiny(kind)
    found = blocks(model)
    last = found[-1]
    at = lambda part: None if part is None else f"{last.name}.{part}"  # noqa: E731
    inside = lambda part: None if part is None else at(part if name is None else f"{name}.{part}")  # noqa: E731
    assert last.width == 32 and last.attentions[0].out == at(out)
    assert last.mlp is not None and last.mlp.name == at(name)
    assert last.mlp.enter == tuple(inside(part) for part in enter) and last.mlp.leave == inside(leave)
    assert bool(last.mlp.experts) == (leave is None)
    assert closing_norms(model, found)[last.name] == at(norm)
    assert last.cross == (kind in ("t5", "bart", "pegasus"))
    assert last.attentions[0].key and (last.attentions[0].fused == (last.attentions[0].key == last.attentions[0].query))
    assert all(hasattr(model.get_submodule(n), "weight") for n in last.norms) and set(last.norms) <= set(norms(model))


def test_where_a_norm_stands_is_seen_and_not_read_from_its_name() -> None:
    pre, post = tiny("opt"), tiny("opt", do_layer_norm_before=False)
    assert [*closing_norms(pre, blocks(pre)).values()] == [None, None]
    assert [name.rpartition(".")[2] for name in closing_norms(post, blocks(post)).values()] == ["final_layer_norm"] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "mixtral"])
def test_edits_do_not_hide_a_block(kind: str) -> None:
    model = tiny(kind)
    before = blocks(model)
    edits = [
        LoRA(rank=2),
        Adapter(placement="parallel", size=4),
        Adapter(size=4),
        Norms(),
        IA3(),
        TinyTL(size=4),
        BitFit(),
    ]
    for edit in edits:
        edit.apply(model)
        assert blocks(model) == before, type(edit).__name__


def test_what_is_not_understood_is_said() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=64)
    with pytest.raises(FettleError, match=r"no list of blocks with attention.*layers \(of MambaBlock\)"):
        blocks(AutoModelForCausalLM.from_config(config))
