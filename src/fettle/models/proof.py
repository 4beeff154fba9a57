"""A proof by trial that an architecture nobody tried here takes forest batches, made as it loads.

Two small trees go through the model at once, then their paths one by one through transformers' own forward pass. What
differs by more than rounding would have trained on leaks: a mask that the architecture ignores, positions it counts by
itself, a state that runs from document to document, a head with a factor that fettle does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import Batch, Example, Node, ancestors, pack
from fettle.core.errors import FettleError
from fettle.models.encdec import start_token

if TYPE_CHECKING:
    from fettle.models.forest import Forest

# Architectures that the package's own tests hold to the law; see tests/laws/test_forest.py.
PROVEN = frozenset({
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "opt", "bloom", "gpt_neox", "glm4",
    "falcon", "qwen3_moe", "mixtral", "olmo2", "starcoder2", "cohere", "granite", "gptj", "mamba",
})  # fmt: skip
# The same with encoder-decoders (tests/laws/test_encdec.py), and with a head that scores texts or words (test_scores.py).
PROVEN_PAIRS = frozenset({"t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100"})
PROVEN_ENCODERS = frozenset({
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert",
})  # fmt: skip
LENGTH = 32
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the logits' spread; 0.2 for narrower types


@torch.no_grad()
def difference(forest: Forest) -> float:
    """How far logits in a forest are from those of each path alone, as a share of their spread.

    The median over tokens: a router of experts that ties in bfloat16 may send one token elsewhere, a leak moves all.
    """
    if forest.config.is_encoder_decoder:
        return _difference_of_pairs(forest)
    if forest.task != "causal":
        return _difference_of_scores(forest)
    batch = _batch(int(forest.config.get_text_config().vocab_size)).to(forest.device)
    found = forest.logits(batch, torch.arange(LENGTH)).float()
    worst: list[float] = []
    with plain(forest):
        for i, segment in enumerate(batch.segments):
            if not batch.names[i]:
                continue
            index = torch.cat([_span(batch, k) for k in ancestors(batch.segments, i)])
            own = slice(len(index) - (segment.stop - segment.start), None)
            alone = forest.model(input_ids=batch.tokens[index][None], use_cache=False).logits[0, own].float()
            apart = (alone - found[segment.start : segment.stop]).abs().amax(1) / alone.std()
            worst.append(float(apart.median()))
    return max(worst)


def _difference_of_pairs(forest: Forest) -> float:
    """The same for sources with targets."""
    batch = _batch(int(forest.config.get_text_config().vocab_size), ahead=True, first=start_token(forest.model))
    batch = batch.to(forest.device)
    found = forest.logits(batch, torch.arange(LENGTH)).float()
    worst: list[float] = []
    for segment in batch.segments:
        if segment.parent < 0:
            continue
        source, target = _span(batch, segment.parent), batch.tokens[segment.start : segment.stop]
        alone = forest.model(input_ids=batch.tokens[source][None], decoder_input_ids=target[None], use_cache=False)
        apart = (alone.logits[0].float() - found[segment.start : segment.stop]).abs().amax(
            1
        ) / alone.logits.float().std()
        worst.append(float(apart.median()))
    return max(worst)


def _difference_of_scores(forest: Forest) -> float:
    """The same for the scores of whole texts, or of all their words."""
    batch = _batch(int(forest.config.get_text_config().vocab_size), ahead=forest.sees_ahead, alone=True).to(
        forest.device
    )
    found = forest.scores(batch).float()
    with plain(forest):
        rows = [
            forest.model(input_ids=batch.tokens[_span(batch, i)][None]).logits[0].float()
            for i, name in enumerate(batch.names) if name
        ]  # fmt: skip
    wanted = torch.stack(rows) if forest.task == "classify" else torch.cat(rows)
    return float((wanted - found).abs().amax(1).median() / wanted.std().clamp_min(1e-3))


class plain:
    """Within it, a forest's model attends as transformers does by itself."""

    def __init__(self, forest: Forest) -> None:
        self.model, self.ours = forest.model, None if forest.backend == "paths" else f"fettle_{forest.backend}"

    def __enter__(self) -> None:
        if self.ours:
            self.model.set_attn_implementation("eager")

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.model.set_attn_implementation(self.ours)


def prove(forest: Forest) -> Forest:
    """The forest, switched to paths where its attention does not keep segments apart; FettleError where that differs too."""
    kind = forest.config.model_type
    if kind in PROVEN | PROVEN_PAIRS or kind in PROVEN_ENCODERS and forest.task != "causal":
        return forest
    allowed = TOLERANCE.get(forest.dtype, 0.2)
    try:
        apart = difference(forest)
    except FettleError:
        apart = float("inf")
    if apart <= allowed:
        return forest
    if forest.backend != "paths" and forest.spec.attention == "auto":
        return prove(forest.with_backend("paths"))
    raise FettleError(
        f"{type(forest.model).__name__} ('{kind}'): the logits of a packed batch differ from those of each document alone by "
        f"{apart:.2g} of their spread (backend '{forest.backend}'); fettle would train something else than the model computes"
    )


def _batch(vocabulary: int, ahead: bool = False, alone: bool = False, first: int | None = None) -> Batch:
    """Two trees, whose roots may see ahead and whose other nodes may begin with `first`; or only their roots, all words marked."""
    rng = np.random.default_rng(0)

    def node(length: int, parent: int = -1) -> Node:
        tokens = rng.integers(min(3, vocabulary - 1), vocabulary, length).astype(np.int32)
        if first is not None and parent >= 0:
            tokens[0] = first
        marks = np.zeros(length, np.int64) if alone else None
        return Node(tokens, np.full(length, float(alone), np.float32), parent, parent >= 0 or not ahead, marks)

    trees = [Example((node(7), node(4, 0), node(5, 0)), "first"), Example((node(6), node(3, 0)), "second")]
    return pack([Example(t.nodes[:1], t.name) for t in trees] if alone else trees, LENGTH, 0)


def _span(batch: Batch, index: int) -> Tensor:
    segment = batch.segments[index]
    return torch.arange(segment.start, segment.stop, device=batch.tokens.device)
