"""Forest: a language model that takes forest batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.models import attention
from fettle.models.head import Head
from fettle.models.paths import hidden_by_paths
from fettle.models.plan import Plan
from fettle.models.spec import ModelSpec


class Forest:
    """A transformers causal language model, its tokenizer, and attention over segments.

    T tokens of a batch, C width, V vocabulary, N learned targets.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, spec: ModelSpec | None = None, backend: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer, self.spec = tokenizer, spec or ModelSpec()
        self.config = model.config
        self.backend = backend or pick(model, self.spec.attention)
        if self.backend != "paths":
            self.model.set_attn_implementation(f"fettle_{self.backend}")

    def with_backend(self, backend: str) -> Forest:
        """The same model, attending in another way; the old object is not to be used any more."""
        if self.backend != "paths" and backend == "paths":
            self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else "eager")
        return Forest(self.model, self.tokenizer, self.spec, backend)

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next(self.model.parameters()).device

    @property
    def head(self) -> Head:
        """The way from hidden states to logits, with whatever module stands there now."""
        module = self.model.get_output_embeddings()
        if module is None:
            raise FettleError(f"{type(self.model).__name__} has no output embedding: it is not a language model")
        text = self.config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
        return Head(module, scale, getattr(text, "final_logit_softcapping", None))

    def hidden(self, batch: Batch) -> Tensor:
        """[T, C]: the states after the final norm, before the head."""
        batch = batch.to(self.device)
        plan = Plan.of(batch)
        if self.backend == "paths":
            return hidden_by_paths(batch.tokens, plan, lambda ids: self._body(input_ids=ids))
        with attention.running(plan):
            return self._body(input_ids=batch.tokens[None], position_ids=batch.positions[None])[0]

    def _body(self, **inputs: Tensor) -> Tensor:
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    def logps(self, batch: Batch) -> Tensor:
        """float32 [N]: log-probabilities of the learned targets, in the order of their positions."""
        hidden = self.hidden(batch)
        targets = batch.targets.to(hidden.device)
        learned = (targets != IGNORE).nonzero()[:, 0]
        return self.head.logps(hidden.index_select(0, learned), targets[learned])

    def logits(self, batch: Batch, positions: Tensor) -> Tensor:
        """[len(positions), V]: logits at some positions of the row."""
        return self.head.logits(self.hidden(batch)[positions.to(self.device)])


def pick(model: Any, asked: str = "auto") -> str:
    """The attention backend for a model where it lies; FettleError where the one asked for cannot serve it."""
    if obstacle := _obstacle(model):
        if asked not in ("auto", "paths"):
            raise FettleError(
                f"model.attention: '{asked}' cannot serve {type(model).__name__}, which {obstacle}; use 'auto'"
            )
        return "paths"
    if asked != "auto":
        return asked
    parameter = next(model.parameters())
    if parameter.device.type == "cpu":
        return "segments"
    return "varlen" if parameter.dtype in (torch.bfloat16, torch.float16) else "flex"


def _obstacle(model: Any) -> str | None:
    """Why a model's attention cannot be told of segments, if so."""
    if not getattr(model, "_supports_attention_backend", False):
        return "has no attention interface"
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    if other := kinds - {"full_attention", "sliding_attention", "attention"}:
        return f"has layers of another kind ({', '.join(sorted(other))})"
    return None
