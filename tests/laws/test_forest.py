"""The law of the forest: a batch of trees = each path alone with plain transformers, logits and gradients.

Every architecture that fettle names, on every attention backend that runs on a CPU, with a tiny random model in float64.
transformers computes softmax and rotary tables in float32 whatever the model, hence 1e-5.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.batch import Batch, Example, Node, ancestors, pack
from fettle.models.forest import Forest
from fettle.models.proof import PROVEN

VOCABULARY, LENGTH, WINDOW = 61, 96, 6
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": {**LLAMA, "sliding_window": WINDOW},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": LLAMA | {"partial_rotary_factor": 0.5},
    "phi3": LLAMA | {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": LLAMA | {"rotary_pct": 0.5},
    "glm4": LLAMA | {"head_dim": 8, "pad_token_id": 0},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": False},
    "qwen3_moe": LLAMA | MOE | {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": LLAMA,
    "starcoder2": LLAMA | {"sliding_window": WINDOW},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip
WITHOUT_INTERFACE = ("bloom", "falcon", "gptj", "mamba")
DROPOUTS = ("attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout")


def tiny(kind: str) -> nn.Module:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **CONFIGS[kind])
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .double()
        .eval()
    )
    for name, parameter in model.named_parameters():  # larger than at the usual start, so that a leak shows
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 if "embed" not in name and "wte" not in name else 0.5)
    return model


def node(rng: np.random.Generator, length: int, parent: int = -1, causal: bool = True) -> Node:
    return Node(rng.integers(3, VOCABULARY, length).astype(np.int32), np.ones(length, np.float32), parent, causal)


def forest_batch(ahead: bool = False) -> Batch:
    """Three trees and a tail: a document, a prompt with two children of which one has a child, a pair of levels."""
    rng = np.random.default_rng(7)
    trees = [
        Example((node(rng, 11),), "document"),
        Example((node(rng, 5, causal=not ahead), node(rng, 4, 0), node(rng, 9, 0), node(rng, 3, 2)), "tree"),
        Example((node(rng, 8), node(rng, 6, 0), node(rng, 1, 0)), "pair"),
    ]
    trees = [Example(tuple(bare(n, t.nodes) for n in t.nodes), t.name) for t in trees]
    return pack(trees, LENGTH, 0)


def bare(one: Node, nodes: tuple[Node, ...]) -> Node:
    """Without weights: the law compares all logits, and two children may not share a target."""
    return Node(one.tokens, np.zeros_like(one.weights), one.parent, one.causal)


def paths(batch: Batch) -> list[list[int]]:
    parents = {s.parent for s in batch.segments}
    leaves = [i for i, name in enumerate(batch.names) if name and i not in parents]
    return [ancestors(batch.segments, i) for i in leaves]


def alone(model: nn.Module, batch: Batch) -> Tensor:
    """[T, V]: logits of each token computed in the first path it belongs to, by transformers' own forward pass."""
    logits = torch.zeros(LENGTH, VOCABULARY, dtype=torch.float64)
    seen: set[int] = set()
    for path in paths(batch):
        spans = [batch.segments[i] for i in path]
        index = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        extra = {}
        if not spans[0].causal:
            n, free = len(index), spans[0].stop - spans[0].start
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            mask[:free, :free] = True
            low = torch.finfo(torch.float64).min
            extra["position_ids"] = torch.arange(n)[None]
            extra["attention_mask"] = torch.zeros(1, 1, n, n, dtype=torch.float64).masked_fill(~mask, low)
        out = model(input_ids=batch.tokens[index][None], use_cache=False, **extra).logits[0].double()
        new = torch.tensor([int(t) not in seen for t in index])
        logits = logits.index_put((index[new],), out[new])
        seen.update(index.tolist())
    return logits


def backends(kind: str) -> tuple[str, ...]:
    return ("paths",) if kind in WITHOUT_INTERFACE else ("dense", "segments", "paths")


def check(forest: Forest, reference: nn.Module, batch: Batch) -> None:
    real = torch.tensor(
        [bool(n) for n, s in zip(batch.names, batch.segments, strict=True) for _ in range(s.start, s.stop)]
    )
    expected = alone(reference, batch)
    found = forest.logits(batch, torch.arange(LENGTH))
    assert torch.isfinite(found).all()  # the tail too
    torch.testing.assert_close(found[real].double(), expected[real], rtol=0, atol=2e-5)
    cotangent = (
        torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * real[:, None]
    )
    (expected * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(forest.model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=0, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_forest_is_each_path_alone(kind: str) -> None:
    reference = tiny(kind)
    for backend in backends(kind):
        reference.zero_grad()
        check(Forest(copy.deepcopy(reference), backend=backend), reference, forest_batch())


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - set(WITHOUT_INTERFACE)))
def test_a_segment_that_sees_ahead(kind: str) -> None:
    reference = tiny(kind)
    if getattr(reference.config, "sliding_window", None):
        reference.config.sliding_window = None  # the reference's mask for seeing ahead has no window
        reference = widened(reference)
    for backend in ("dense", "segments"):
        reference.zero_grad()
        check(Forest(copy.deepcopy(reference), backend=backend), reference, forest_batch(ahead=True))


def widened(model: nn.Module) -> nn.Module:
    """The same model with a window larger than any path."""
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = LENGTH
    model.config.sliding_window = LENGTH
    return model


def test_every_proven_architecture_is_in_this_table() -> None:
    assert set(CONFIGS) == PROVEN
