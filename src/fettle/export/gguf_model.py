"""What llama.cpp calls a model's sizes and weights, by architecture.

llama.cpp rotates the neighbours (x0, x1), (x2, x3), .. of a Llama's heads, transformers halves (x0, xD/2), ..: the rows of q and k
are permuted, as for Meta's own format (llama.py). Qwen's are not: llama.cpp rotates their halves too. GPT-2's weights lie
transposed in transformers; here all are [N, K].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core import FettleError
from fettle.export.llama import neighbours

Facts = dict[str, int | float | str]
GATED = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GATED_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
GPT2_TOP = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "lm_head": "output"
}  # fmt: skip
# transformers' model_type: llama.cpp's architecture, its layers and the rest
ARCHITECTURES = {
    "llama": ("llama", GATED, GATED_TOP), "mistral": ("llama", GATED, GATED_TOP), "qwen2": ("qwen2", GATED, GATED_TOP),
    "qwen3": ("qwen3", GATED, GATED_TOP), "gpt2": ("gpt2", GPT2, GPT2_TOP),
}  # fmt: skip
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh")}  # what llama.cpp computes; silu in the others
BLOCK = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")


def architecture(config: Any) -> str:
    """llama.cpp's name of an architecture. FettleError for one that cannot be written, or a setting that it does not have."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FettleError(f"export: GGUF can be written for {known}; this model is '{config.model_type}'; use --to hf")
    name = ARCHITECTURES[config.model_type][0]
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if act not in ACTIVATIONS.get(name, ("silu",)):
        raise FettleError(f"export: the activation is '{act}', which llama.cpp's {name} does not compute; use --to hf")
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if sliding or config.model_type == "mistral" and getattr(config, "sliding_window", None):
        raise FettleError(f"export: attention is in windows, which llama.cpp's {name} does not have; use --to hf")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, key, False):
            raise FettleError(f"export: '{key}' is set, which llama.cpp's {name} does not have; use --to hf")
    return name


def sizes(config: Any) -> Facts:
    """Keys of the file, without the architecture before them, and their values."""
    if config.model_type == "gpt2":
        return {
            "context_length": config.n_positions, "embedding_length": config.n_embd, "block_count": config.n_layer,
            "feed_forward_length": config.n_inner or 4 * config.n_embd, "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon), "vocab_size": config.vocab_size,
        }  # fmt: skip
    head = head_size(config)
    return {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "vocab_size": config.vocab_size,
    } | _rope(config)  # fmt: skip


def head_size(config: Any) -> int:
    """D."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> Facts:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    facts: Facts = {"rope.freq_base": float(rope.get("rope_theta") or 10000.0)}
    if kind == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind not in ("default", "llama3"):
        raise FettleError(f"export: positions are scaled by '{kind}', which is not written to GGUF here; use --to hf")
    return facts


def rope_factors(config: Any) -> Tensor | None:
    """float32 [D/2]: by what llama.cpp divides each frequency, for Llama 3's scaling; None where there is none."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "llama3":
        return None
    size = head_size(config)
    length = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2).double() / size)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((rope["original_max_position_embeddings"] / length - low) / (high - low)).clamp(0, 1)
    return (1 / (smooth + (1 - smooth) / factor)).float()


def named(model: nn.Module, config: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(name here, name there, weight) of every weight, views; matrices as [N, K]. FettleError where llama.cpp has none.

    A head that is tied is left out: llama.cpp takes the embedding.
    """
    _, layers, top = ARCHITECTURES[config.model_type]
    for key, weight in model.named_parameters():
        name, _, end = key.rpartition(".")
        block = BLOCK.fullmatch(name)
        there = f"blk.{block[1]}.{layers[block[2]]}" if block and block[2] in layers else top.get(name)
        if there is None:
            raise FettleError(
                f"export: the model has a weight '{key}', which llama.cpp's {architecture(config)} does not; use --to hf"
            )
        turned = end == "weight" and isinstance(model.get_submodule(name), Conv1D)
        yield key, f"{there}.{end}", weight.detach().t() if turned else weight.detach()


def arranged(config: Any, name: str, rows: Tensor) -> Tensor:
    """A tensor whose rows are the outputs of module `name`, in llama.cpp's order. [N, ..] -> [N, ..]."""
    if ARCHITECTURES[config.model_type][0] != "llama" or not name.endswith(("q_proj", "k_proj")):
        return rows
    heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
    return neighbours(rows.reshape(len(rows), -1), heads).reshape(rows.shape)
