"""The law of pairs: a forest batch on an encoder-decoder = transformers' own forward pass on each source and target.

Log-probabilities, logits and gradients, with tiny random models in float64; one source with several targets is encoded once.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from fettle.core.batch import IGNORE, Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.proof import PROVEN_PAIRS

VOCABULARY, LENGTH = 61, 128
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "decoder_start_token_id": 2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
TIED, START = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}, "decoder_start_token_id"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5 | TIED),
    "t5 v1.1": ("t5", T5 | TIED | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": ("mt5", T5 | TIED | {"tie_word_embeddings": False}),
    "umt5": ("umt5", T5 | TIED),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART | {"scale_embedding": True}),
    "pegasus": ("pegasus", BART | {START: 0, "pad_token_id": 0, "eos_token_id": 1}),
    "marian": ("marian", BART | {START: 58, "pad_token_id": 58}),
    "m2m_100": ("m2m_100", BART),
}


def tiny(name: str) -> nn.Module:
    kind, settings = CONFIGS[name]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():  # larger than at the usual start, so that a leak shows
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 if "shared" not in name and "embed" not in name else 0.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def node(
    rng: np.random.Generator, length: int, parent: int = -1, causal: bool = True, first: int | None = None
) -> Node:
    tokens = rng.integers(3, 58, length).astype(np.int32)
    weights = np.zeros(length, np.float32) if parent < 0 else np.ones(length, np.float32)
    if first is not None:
        tokens[0], weights[0] = first, 0
    return Node(tokens, weights, parent, causal)


def forest_batch(start: int) -> Batch:
    """Pairs of several lengths; a source with two targets, of which one goes on in two ways; a source alone; a tail."""
    rng = np.random.default_rng(7)
    trees = [
        Example((node(rng, 11, causal=False), node(rng, 5, 0)), "pair"),
        Example((node(rng, 7, causal=False), node(rng, 4, 0, first=start), node(rng, 9, 0, first=start)), "several"),
        Example((node(rng, 34, causal=False), node(rng, 3, 0)), "long"),
        Example(
            (node(rng, 5, causal=False), node(rng, 6, 0, first=start), node(rng, 2, 1), bare(node(rng, 3, 1))), "deep"
        ),
        Example((node(rng, 6, causal=False),), "alone"),
    ]
    return pack(trees, LENGTH, 0)


def bare(one: Node) -> Node:
    return Node(one.tokens, np.zeros_like(one.weights), one.parent, one.causal)


def alone(model: nn.Module, batch: Batch, start: int) -> dict[int, Tensor]:
    """By place in the row: logits [V] that transformers itself computes there, one source and target at a time."""
    found: dict[int, Tensor] = {}
    for i, segment in enumerate(batch.segments):
        if not batch.names[i] or segment.parent < 0 and any(s.parent == i for s in batch.segments):
            continue
        path = []
        while i >= 0:
            path.insert(0, i)
            i = batch.segments[i].parent
        source, *rest = [torch.arange(batch.segments[k].start, batch.segments[k].stop) for k in path]
        rows = torch.cat([torch.zeros(0, dtype=torch.long), *rest])
        if len(rows) and int(batch.tokens[rows[0]]) == start:
            ids = batch.tokens[rows]
        else:
            ids, rows = torch.cat([torch.tensor([start]), batch.tokens[rows]]), torch.cat([source[-1:], rows])
        out = model(input_ids=batch.tokens[source][None], decoder_input_ids=ids[None], use_cache=False).logits[0]
        found |= dict(zip(rows.tolist(), out, strict=True))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_forest_is_each_pair_alone(name: str) -> None:
    reference = tiny(name)
    start = reference.config.decoder_start_token_id
    forest, batch = Forest(copy.deepcopy(reference)), forest_batch(start)
    expected = alone(reference, batch, start)
    places = torch.tensor(sorted(expected))
    wanted = torch.stack([expected[int(p)] for p in places])
    found = forest.logits(batch, places)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    learned = torch.nonzero(batch.targets != IGNORE)[:, 0]
    logps = torch.stack([expected[int(p)].log_softmax(-1)[batch.targets[p]] for p in learned])
    torch.testing.assert_close(forest.logps(batch), logps, rtol=0, atol=1e-5)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (wanted * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for (weight, ours), theirs in zip(forest.model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=0, atol=1e-5 * largest, msg=lambda m, n=weight: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_log_probabilities_are_those_of_the_labels_of_transformers(name: str) -> None:
    model = tiny(name)
    rng = np.random.default_rng(1)
    example = Example((node(rng, 9, causal=False), node(rng, 6, 0)), "pair")
    batch = pack([example], 32, 0)
    labels = torch.tensor(example.nodes[1].tokens, dtype=torch.long)[None]
    loss = model(input_ids=torch.tensor(example.nodes[0].tokens)[None], labels=labels).loss
    torch.testing.assert_close(-Forest(model).logps(batch).mean(), loss, rtol=0, atol=1e-10)


def test_a_source_is_encoded_once_for_all_its_targets() -> None:
    model = tiny("t5")
    seen: list[int] = []
    model.get_encoder().register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    Forest(model).hidden(forest_batch(0))
    assert sum(seen) == 5


@pytest.mark.parametrize(
    "nodes", [(Node(np.arange(3, 9), np.ones(6)),), (Node(np.arange(3, 9), np.ones(6), causal=False),) * 2]
)
def test_what_is_no_pair_is_refused(nodes: tuple[Node, ...]) -> None:
    first, *rest = nodes
    batch = pack([Example((first, *(Node(n.tokens, n.weights * 0, 0, n.causal) for n in rest)), "x")], 16, 0)
    with pytest.raises(FettleError, match="reads a source"):
        Forest(tiny("t5")).hidden(batch)


def test_every_proven_kind_is_in_this_table() -> None:
    assert {kind for kind, _ in CONFIGS.values()} == PROVEN_PAIRS
