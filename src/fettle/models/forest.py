"""Forest: a model that takes forest batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch, with_prefix
from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models import attention, prompt, roles, words
from fettle.models.encdec import halves, hidden_of_pairs, output_scale, start_token
from fettle.models.head import Head
from fettle.models.paths import hidden_by_paths
from fettle.models.plan import Plan
from fettle.models.scores import first_position, pooled, text_scores, word_scores
from fettle.models.spec import ModelSpec
from fettle.models.tasks import Task, is_encoder, task_of


class Forest:
    """A transformers model, its tokenizer, and attention over segments.

    T tokens of a batch, C width, V vocabulary, N learned targets; of a model with a task's head: E texts, L labels.
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

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where it was loaded without one. The model lends it to its edits."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        words.lend(self.model, tokenizer)

    @property
    def context(self) -> int | None:
        """The most tokens that a text may have: what the model can see, less its soft prompt; None where there is no bound."""
        bound, front = context_length(self.config), prompt.active(self.model)
        if bound is None:
            return None
        return bound - first_position(self.model) - (0 if front is None else front.length)

    def may_pad(self, columns: int) -> bool:
        """Whether generation may pad rows of up to `columns` tokens on the left."""
        front = prompt.active(self.model)
        return front is None or front.may_pad(self.model, columns)

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
    def dtype(self) -> torch.dtype:
        """The type of the model's own weights, whatever type those of its edits have."""
        plain = (m for m in self.model.modules() if not isinstance(getattr(m, "edit", None), Edit))
        held = (p.dtype for m in plain for p in m.parameters(recurse=False) if p.is_floating_point())
        return next(held, self.model.dtype)

    @property
    def task(self) -> Task:
        """What the model is for: 'causal' (a language model, an encoder-decoder too), 'classify' or 'tag'."""
        return task_of(self.model)

    @property
    def sees_ahead(self) -> bool:
        """Whether the model reads a whole text both ways, so that a text of its own is a segment that is not causal."""
        return is_encoder(self.config)

    @property
    def head(self) -> Head:
        """The way from hidden states to logits, with whatever module stands there now."""
        module = self.model.get_output_embeddings()
        if module is None:
            raise FettleError(f"{type(self.model).__name__} has no output embedding: it is not a language model")
        text = self.config.get_text_config()
        scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
        scale *= output_scale(self.config)
        bias = getattr(self.model, "final_logits_bias", None)
        return Head(module, scale, getattr(text, "final_logit_softcapping", None), bias)

    def hidden(self, batch: Batch) -> Tensor:
        """[T, C]: the states after the final norm, before the head."""
        plan = self._plan(batch)
        batch = batch.to(self.device)
        if self.config.is_encoder_decoder:
            return hidden_of_pairs(batch.tokens, plan, *halves(self.model), start_token(self.model), self.context)
        types = batch.extra.get("types")
        if self._by_paths:

            def run(index: Tensor, real: Tensor | None) -> Tensor:
                mask = {} if real is None else {"attention_mask": real.long()}
                return self._body(
                    input_ids=batch.tokens[index], **mask, **_typed(None if types is None else types[index])
                )

            return hidden_by_paths(plan, self.device, run, self.sees_ahead, self.context)
        positions = batch.positions[None] + first_position(self.model)
        with attention.running(plan):
            kinds = _typed(None if types is None else types[None])
            return self._body(input_ids=batch.tokens[None], position_ids=positions, **kinds)[0]

    @property
    def _by_paths(self) -> bool:
        """Whether texts run one by one. In an encoder a shallow prompt sees its text, so texts cannot share it."""
        front = prompt.active(self.model)
        return self.backend == "paths" or front is not None and front.heads is None and self.sees_ahead

    def _plan(self, batch: Batch) -> Plan:
        """Who sees whom, a soft prompt included; paths are called one by one, and each gets the prompt by itself."""
        front, bound = prompt.active(self.model), self.context
        if front is None:
            return Plan.of(batch)
        longest = int(batch.positions.max()) + 1
        if bound is not None and longest > bound and not self.config.is_encoder_decoder:
            raise FettleError(
                f"{front.edit.kind}: a text of {longest} tokens behind a soft prompt of {front.length} is longer than the "  # type: ignore[attr-defined]
                f"{bound + front.length} tokens that the model can see; lower batch.tokens to {bound} or take fewer virtual tokens"
            )
        if self._by_paths:
            return Plan.of(batch)
        return Plan.of(with_prefix(batch, front.length), front.states())

    def _body(self, **inputs: Tensor) -> Tensor:
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state

    @contextmanager
    def reference(self) -> Iterator[Forest]:
        """Within it this is the model from before this stage: what trains is off, without gradients and dropout.

        FettleError where what trains cannot be switched off.
        """
        with roles.reference(self.model):
            yield self

    def logps(self, batch: Batch) -> Tensor:
        """float32 [N]: log-probabilities of the learned targets, in the order of their positions."""
        hidden = self.hidden(batch)
        targets = batch.targets.to(hidden.device)
        learned = (targets != IGNORE).nonzero()[:, 0]
        return self.head.logps(hidden.index_select(0, learned), targets[learned])

    def scores(self, batch: Batch) -> Tensor:
        """The head's logits: [E, L], a row a text (each leaf of the forest), or for 'tag' [N, L], a row a learned target.

        FettleError where the model has no such head.
        """
        if self.task == "causal":
            raise FettleError(
                f"{type(self.model).__name__} has no head that gives labels; set model.task: classify or model.task: tag"
            )
        hidden = self.hidden(batch)
        if self.task == "classify":
            return text_scores(self.model, pooled(self.model, hidden, batch))
        learned = (batch.targets != IGNORE).nonzero()[:, 0].to(hidden.device)
        return word_scores(self.model, hidden.index_select(0, learned))

    def logits(self, batch: Batch, positions: Tensor) -> Tensor:
        """[len(positions), V]: logits at some positions of the row."""
        return self.head.logits(self.hidden(batch)[positions.to(self.device)])


def _typed(types: Tensor | None) -> dict[str, Tensor]:
    return {} if types is None else {"token_type_ids": types}


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
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "has no attention interface"
    text = model.config.get_text_config()
    if is_encoder(model.config) and "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "has windows to both sides"
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    if other := kinds - {"full_attention", "sliding_attention", "attention"}:
        return f"has layers of another kind ({', '.join(sorted(other))})"
    return None


def context_length(config: Any) -> int | None:
    """The most tokens a model can see, by its configuration; None where it states no bound."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    return None
