"""The law of scores: what a head says of a text or word in a forest batch = what transformers says of it alone.

Scores and gradients, on every backend that runs on a CPU, with tiny random models in float64; losses against transformers' own.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from fettle.core.batch import IGNORE, Batch, Example, Node, pack
from fettle.models.forest import Forest
from fettle.models.proof import PROVEN_ENCODERS
from fettle.objectives import Classify, Tag

VOCABULARY, LENGTH, LABELS = 61, 128, 3
BERT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
PADDED = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
LLAMA = BERT | {"num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": BERT | PADDED,
    "xlm-roberta": BERT | PADDED,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    "electra": BERT | {"embedding_size": 16},
    "deberta": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "albert": BERT | {"embedding_size": 16},
    "modernbert": BERT
    | {"pad_token_id": 0, "local_attention": 6, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"},
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert")
PATHS = ("deberta", "deberta-v2", "modernbert")


def tiny(kind: str, auto: Any = AutoModelForSequenceClassification, labels: int = LABELS) -> nn.Module:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, num_labels=labels, **CONFIGS[kind])
    torch.manual_seed(0)
    # Eager attention gives NaN to a row of padding that sees nothing, as happens in ModernBERT's windows.
    model = auto.from_config(config, attn_implementation=None if kind == "modernbert" else "eager").double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 if "embed" not in name and "wte" not in name else 0.5)
    return model


def text(rng: np.random.Generator, length: int, causal: bool, number: int, types: bool) -> Example:
    tokens = rng.integers(3, VOCABULARY, length).astype(np.int32)
    marks = np.where(rng.random(length) < 0.6, rng.integers(0, LABELS, length), IGNORE)
    kinds = (np.arange(length) > length // 2).astype(np.int64) if types else None
    node = Node(tokens, np.ones(length, np.float32), causal=causal, marks=marks, types=kinds)
    return Example((node,), f"text {number}", {"labels": np.array([number % LABELS], np.float32)})


def batch_of(kind: str, task: str) -> Batch:
    rng = np.random.default_rng(5)
    types = kind in ("bert", "electra", "albert")
    texts = [text(rng, n, kind not in ENCODERS, i, types) for i, n in enumerate((9, 1, 33, 20, 5))]
    return pack(texts, LENGTH, 0)


def alone(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Logits of each text, by transformers alone."""
    found = []
    for segment, name in zip(batch.segments, batch.names, strict=True):
        if name:
            at = slice(segment.start, segment.stop)
            types = {"token_type_ids": batch.extra["types"][None, at]} if "types" in batch.extra else {}
            found.append(model(input_ids=batch.tokens[None, at], **types).logits[0])
    return found


def backends(kind: str) -> tuple[str, ...]:
    return ("paths",) if kind in PATHS else ("dense", "segments", "paths")


def compare(found: Tensor, wanted: Tensor, forest: Forest, reference: nn.Module) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reference.zero_grad()
    (wanted * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(forest.model.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=0, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_in_a_forest_are_texts_alone(kind: str) -> None:
    reference, batch = tiny(kind), batch_of(kind, "classify")
    for backend in backends(kind):
        forest = Forest(copy.deepcopy(reference), backend=backend)
        assert Forest(copy.deepcopy(reference)).backend == ("paths" if kind in PATHS else "segments")
        compare(forest.scores(batch), torch.stack(alone(reference, batch)), forest, reference)


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k != "gpt2"])
def test_words_in_a_forest_are_words_alone(kind: str) -> None:
    reference, batch = tiny(kind, AutoModelForTokenClassification), batch_of(kind, "tag")
    for backend in backends(kind):
        rows = torch.cat(alone(reference, batch))
        wanted = rows[(batch.targets != IGNORE)[: len(rows)]]
        forest = Forest(copy.deepcopy(reference), backend=backend)
        compare(forest.scores(batch), wanted, forest, reference)


def test_answers_below_a_shared_prompt_each_have_a_score() -> None:
    """What a reward model needs: the last token of each leaf, the prompt computed once."""
    model = tiny("llama", labels=1)
    rng = np.random.default_rng(2)
    parts = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in (7, 4, 6)]
    nodes = tuple(Node(p, np.zeros(len(p), np.float32), -1 if i == 0 else 0) for i, p in enumerate(parts))
    batch = pack([Example(nodes, "pair")], 32, 0)
    whole = [np.concatenate([parts[0], p]) for p in parts[1:]]
    wanted = torch.cat([model(input_ids=torch.tensor(w)[None]).logits for w in whole])
    for backend in ("dense", "segments", "paths"):
        torch.testing.assert_close(
            Forest(copy.deepcopy(model), backend=backend).scores(batch), wanted, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("problem", ["one", "number", "many"])
def test_the_loss_is_that_of_transformers(kind: str, problem: str) -> None:
    model = tiny(kind, labels=1 if problem == "number" else LABELS)
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, VOCABULARY, (4, 8)).astype(np.int32)
    if problem == "one":
        labels, given = rng.integers(0, LABELS, (4, 1)).astype(np.float32), torch.long
    elif problem == "number":
        labels, given = rng.normal(size=(4, 1)).astype(np.float32), torch.float64
    else:
        labels, given = rng.integers(0, 2, (4, LABELS)).astype(np.float32), torch.float64
    wanted = torch.tensor(labels).to(given)
    loss = model(input_ids=torch.tensor(tokens), labels=wanted if problem == "many" else wanted[:, 0]).loss
    causal = kind not in ENCODERS
    examples = [
        Example((Node(row, np.zeros(8, np.float32), causal=causal),), str(i), {"labels": labels[i]})
        for i, row in enumerate(tokens)
    ]
    found = Classify()(Forest(copy.deepcopy(model)), pack(examples, 64, 0))
    torch.testing.assert_close(found.sum / found.count, loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_the_loss_of_tags_is_that_of_transformers(kind: str) -> None:
    model, batch = tiny(kind, AutoModelForTokenClassification), batch_of(kind, "tag")
    total = torch.zeros((), dtype=torch.float64)
    for segment, name in zip(batch.segments, batch.names, strict=True):
        if name and (labels := batch.targets[None, segment.start : segment.stop].clone()).ne(IGNORE).any():
            types = (
                {"token_type_ids": batch.extra["types"][None, segment.start : segment.stop]}
                if "types" in batch.extra
                else {}
            )
            ids = batch.tokens[None, segment.start : segment.stop]
            total += model(input_ids=ids, labels=labels, **types).loss * labels.ne(IGNORE).sum()
    found = Tag()(Forest(copy.deepcopy(model)), batch)
    torch.testing.assert_close(found.sum, total, rtol=0, atol=1e-5)
    assert found.count == batch.targets.ne(IGNORE).sum()


def test_every_proven_encoder_is_in_this_table() -> None:
    assert set(ENCODERS) == PROVEN_ENCODERS
