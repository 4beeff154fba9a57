"""Soft prompts: P virtual tokens in front of every text, trained as vectors. One mechanism for all the methods.

    shallow   the embeddings of the P tokens are trained vectors                                 rows   [P, C]
    deep      in every layer, the keys and values of the P tokens are trained                    states [L, 2, K, P, D]

In a forest batch the prompt is one more root that all others see, so it is computed once for all texts of a row
(`with_prefix` in core/batch.py; deep states travel with the attention's `Plan`). Anywhere else, in generation, in an
objective that calls the model, in `model.generate`, hooks on the model's body put the rows in front of the embeddings, or
the states into the key-value cache, and take them away from what comes out: whoever calls sees the texts alone.

States are used as they are: their keys are not rotated (as in PEFT), so the model learns where they stand.

Shapes: P virtual tokens, C width, L layers, K key heads, D head size, B rows, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models import weight
from fettle.models.attention import in_forest

NAME = "fettle_prompt"  # the name of the module on the model
_ADDED = "fettle_added"  # on a tensor of embeddings: how many rows of it are ours


class SoftPrompt(nn.Module):
    """The trained vectors `plain` [S, W], or an `encoder` that computes them until the edit settles.

    `heads` (L, K, D) makes the prompt deep: W = L 2 K D, S = P. Else W = C, and `words` int64 [P], if there are any, says
    which places are fixed words of the model's vocabulary; the S places with -1 take the trained vectors, in order.
    """

    words: Tensor | None
    soft: Tensor | None  # int64 [S]: the places of `words` that train

    def __init__(
        self, edit: Edit, vectors: Tensor | nn.Module, length: int, heads: tuple[int, int, int] | None = None,
        words: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.edit, self.length, self.heads = edit, length, heads
        self.enabled = True
        self.plain = nn.Parameter(vectors) if isinstance(vectors, Tensor) else None
        self.encoder = vectors if isinstance(vectors, nn.Module) else None
        self.register_buffer("words", None if words is None else words.clamp_min(0), persistent=False)
        self.register_buffer("soft", None if words is None else (words < 0).nonzero()[:, 0], persistent=False)

    def forward(self) -> Tensor:
        """[S, W]: the trained vectors, in the type they are trained in."""
        return self.encoder() if self.plain is None else self.plain  # type: ignore[misc, no-any-return]

    def rows(self, embedding: nn.Module) -> Tensor:
        """[P, C]: what stands in front of the texts' embeddings; only for a shallow prompt."""
        if self.words is None or self.soft is None:
            return self()
        fixed = embedding(self.words)
        return fixed.index_copy(0, self.soft, self().to(fixed.dtype))  # type: ignore[no-any-return]

    def states(self) -> Tensor | None:
        """[L, 2, K, P, D], in the type they are trained in; None for a shallow prompt."""
        if self.heads is None:
            return None
        layers, heads, size = self.heads
        return self().view(self.length, layers, 2, heads, size).permute(1, 2, 3, 0, 4)

    @torch.no_grad()
    def baked(self) -> Tensor:
        """[S, W]: the trained vectors without their encoder; the live ones where there is none."""
        if self.encoder is None:
            return self.plain.detach()  # type: ignore[union-attr]
        training = self.encoder.training
        self.encoder.eval()
        try:
            return self.encoder().detach().clone()  # type: ignore[no-any-return]
        finally:
            self.encoder.train(training)

    def settle(self) -> None:
        """Keep what the encoder computes, and let go of the encoder."""
        if self.encoder is not None:
            self.plain, self.encoder = nn.Parameter(self.baked()), None

    # Hooks of the model's body.

    def before(self, body: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Put the prompt in front of the texts that a call brings; a cache that has begun holds it already."""
        if not self.enabled:
            return None
        given = dict(zip(_arguments(body), args, strict=False)) | given
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embeds is None:
            return None
        rows, length = (ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
        past = given.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        in_cache = self.heads is not None and not in_forest()
        given.pop("cache_position", None)  # models count by themselves
        self._lengthen_mask(body, given, rows, length + max(0, seen - self.length))
        self._shift_positions(given, with_rows=not seen and not in_cache)
        if in_cache and not seen:
            given["past_key_values"] = self._filled(body, past, rows)
        elif not seen:
            self._put_rows(body, given, rows)
        return (), given

    def after(self, body: nn.Module, args: Any, given: dict[str, Any], out: Any) -> Any:
        """Take the prompt's rows away from a body's output."""
        added = getattr(given.get("inputs_embeds"), _ADDED, 0)
        return without_rows(body, out, added) if added else out

    def around(self, model: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Lengthen the mask of an encoder-decoder, whose decoder sees the prompt's rows in what the encoder returns."""
        given = dict(zip(_arguments(model), args, strict=False)) | given
        if not self.enabled or (mask := given.get("attention_mask")) is None:
            return None
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        return (), given

    def may_pad(self, model: Any, columns: int) -> bool:
        """Whether rows of up to `columns` tokens may be padded on the left, so between the prompt and the text."""
        text = model.config.get_text_config()
        kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
        return (
            window is None
            or (kinds is not None and "sliding_attention" not in kinds)
            or self.length + columns <= window
        )

    def _lengthen_mask(self, body: nn.Module, given: dict[str, Any], rows: int, texts: int) -> None:
        """`texts`: tokens of the texts so far, those in the cache included."""
        mask = given.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise FettleError(
                "a soft prompt needs an attention_mask [batch, tokens] or none; a finished mask leaves it no room"
            )
        if not self.may_pad(body, mask.shape[1]) and not bool(mask[:, 0].all()):
            raise FettleError(
                f"{type(body).__name__} sees through a window, in which the padding between a soft prompt and its text would "
                "count; give rows of one length, or pad on the right"
            )
        if mask.shape[1] <= texts:  # an encoder-decoder has lengthened its mask already
            given["attention_mask"] = torch.cat([mask.new_ones(rows, self.length), mask], 1)

    def _shift_positions(self, given: dict[str, Any], with_rows: bool) -> None:
        if (at := given.get("position_ids")) is not None:
            front = at[..., :1] + torch.arange(self.length).to(at)
            given["position_ids"] = torch.cat([front, at + self.length], -1) if with_rows else at + self.length

    def _put_rows(self, body: nn.Module, given: dict[str, Any], rows: int) -> None:
        embedding = body.get_input_embeddings()  # type: ignore[operator]
        ids, embeds = given.pop("input_ids", None), given.get("inputs_embeds")
        embeds = embedding(ids) if embeds is None else embeds
        front = embeds.new_zeros(self.length, embeds.shape[2]) if self.heads else self.rows(embedding).to(embeds.dtype)
        given["inputs_embeds"] = torch.cat([front.expand(rows, -1, -1), embeds], 1)
        setattr(given["inputs_embeds"], _ADDED, self.length)
        if (kinds := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = torch.cat([kinds.new_zeros(len(kinds), self.length), kinds], 1)

    def _filled(self, body: Any, past: Any, rows: int) -> Any:
        """A key-value cache that holds the states for each row."""
        from transformers import DynamicCache

        if body.training and any(getattr(m, "gradient_checkpointing", False) for m in body.modules()):
            raise FettleError(
                f"{type(body).__name__} drops its cache under gradient checkpointing, and a prefix with it, unless its attention "
                "knows forest batches; set model.gradient_checkpointing: false, or take prompt_tuning"
            )
        if past is None:
            past = DynamicCache(config=body.config)
        for layer, (key, value) in enumerate(self.states().to(body.dtype)):  # type: ignore[union-attr]
            past.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        return past


def without_rows(body: nn.Module, out: Any, added: int) -> Any:
    """A body's output without the first `added` rows; what was pooled is pooled again from the texts' own first row."""
    if isinstance(out, tuple):
        return (out[0][:, added:], *out[1:])
    out.last_hidden_state = out.last_hidden_state[:, added:]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(h[:, added:] for h in out.hidden_states)
    if getattr(out, "pooler_output", None) is not None:
        pooler = getattr(body, "pooler", None)
        if not isinstance(pooler, nn.Module) or isinstance(pooler, nn.Linear):
            raise FettleError(f"{type(body).__name__} pools in a way that a soft prompt cannot follow; use a lora edit")
        out.pooler_output = pooler(out.last_hidden_state)
    return out


def _arguments(body: nn.Module) -> tuple[str, ...]:
    return _named(type(body).forward)[1:]


@cache
def _named(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)


# What the edits share.


def attach(model: nn.Module, prompt: SoftPrompt) -> None:
    """Give a model its soft prompt, which trains. FettleError where it has one, or takes no embeddings."""
    kind = prompt.edit.kind  # type: ignore[attr-defined]
    if (other := find(model)) is not None:
        raise FettleError(
            f"{kind}: the model has a soft prompt already ({other.edit.kind}); a model takes one: "  # type: ignore[attr-defined]
            "give that one more tokens, or write both as one hybrid_prompt template"
        )
    body = body_of(model)
    if "inputs_embeds" not in _arguments(body):
        raise FettleError(
            f"{kind}: {type(body).__name__} takes no embeddings, so no vectors can stand before its texts"
        )
    prompt.train(model.training)
    setattr(model, NAME, prompt)
    prompt.requires_grad_(True)
    body.register_forward_pre_hook(prompt.before, with_kwargs=True)
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        model.base_model.register_forward_pre_hook(prompt.around, with_kwargs=True)  # type: ignore[operator, union-attr]
    else:
        body.register_forward_hook(prompt.after, with_kwargs=True)
        _prove_reached(model, prompt)


@torch.no_grad()
def _prove_reached(model: Any, prompt: SoftPrompt) -> None:
    """FettleError where a language model's texts pass the prompt by: it would train, and then not be there in use."""
    if model.get_output_embeddings() is None:
        return
    training, called = model.training, []
    note = prompt.register_forward_hook(lambda *_: called.append(True))
    model.eval()
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place(model)["device"]))
    finally:
        note.remove()
        model.train(training)
    if not called:
        raise FettleError(
            f"{prompt.edit.kind}: {type(model).__name__} does not call {type(body_of(model)).__name__} as a whole, so "  # type: ignore[attr-defined]
            "nothing can be put in front of its texts; tune it with lora"
        )


def body_of(model: Any) -> Any:
    """The module that every call of a model passes through with its texts: what turns their embeddings into states."""
    if model.config.is_encoder_decoder:
        return model.base_model.get_encoder()
    inner = model.get_decoder()  # OPT's head calls this directly and passes the base model by
    return inner if inner is not None and "inputs_embeds" in _arguments(inner) else model.base_model


def find(model: Any, edit: Edit | None = None) -> SoftPrompt | None:
    """The model's soft prompt; with `edit`, only if it is that edit's."""
    prompt = getattr(model, NAME, None)
    return prompt if isinstance(prompt, SoftPrompt) and edit in (None, prompt.edit) else None


def active(model: Any) -> SoftPrompt | None:
    """The model's soft prompt, unless it is switched off."""
    prompt = find(model)
    return prompt if prompt is not None and prompt.enabled else None


def kept(model: nn.Module, edit: Edit) -> dict[str, Tensor]:
    """What an artifact keeps of a prompt: the plain vectors, whatever computed them."""
    prompt = find(model, edit)
    return {f"{NAME}.plain": prompt.baked()} if prompt is not None else {}


def settle(model: nn.Module, edit: Edit) -> None:
    """Make an edit's prompt plain."""
    if (prompt := find(model, edit)) is not None:
        prompt.settle()


def cannot_merge(edit: Edit) -> FettleError:
    """Why a soft prompt stays what it is."""
    return FettleError(
        f"{edit.kind}: a soft prompt is more input, not other weights, so it cannot be merged; keep the artifact, export it "  # type: ignore[attr-defined]
        "with --to peft, or tune with lora, which merges"
    )


# Where a prompt begins.


def place(model: Any) -> dict[str, Any]:
    """Where the masters of a prompt belong: the embedding's device, and float32 or wider."""
    return weight.place(model.get_input_embeddings())


def linear_start(inputs: int, outputs: int, where: dict[str, Any]) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight [outputs, inputs] and bias [outputs] as `nn.Linear` draws them. An encoder holds them bare, so that an edit
    of the model's linear layers (a LoRA, a quantizer) never takes the prompt's for one.
    """
    drawn = nn.Linear(inputs, outputs, dtype=where["dtype"]).to(where["device"])
    return nn.Parameter(drawn.weight.detach()), nn.Parameter(drawn.bias.detach())


@torch.no_grad()
def embeddings_of(model: Any, ids: list[int]) -> Tensor:
    """[P, C]: a copy of the vectors that stand for some tokens."""
    where = place(model)
    return model.get_input_embeddings()(torch.tensor(ids, device=where["device"])).to(**where, copy=True)  # type: ignore[no-any-return]


@torch.no_grad()
def states_of(model: Any, ids: list[int], kind: str) -> Tensor:
    """[P, L, 2, K, D]: keys and values that a model computes for some tokens at the beginning of a text.

    FettleError, in the name of the edit `kind`, where the model has no cache that a prefix could stand in.
    """
    from transformers import DynamicCache

    body, training = body_of(model), model.training
    why = "it is an encoder-decoder" if model.config.is_encoder_decoder else "its layers keep no keys and values"
    found: list[Any] = []
    if not model.config.is_encoder_decoder and "past_key_values" in _arguments(body):
        past = DynamicCache()
        model.eval()
        try:
            body(input_ids=torch.tensor([ids], device=place(model)["device"]), past_key_values=past)
            found = [(layer.keys[0], layer.values[0]) for layer in past.layers]
            if len({x.shape for pair in found for x in pair}) != 1 or len(found) != layers_of(model):
                why, found = "its layers differ in the keys and values they keep", []
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            why = f"its cache cannot be used ({str(error).strip().splitlines()[0]})"
        finally:
            model.train(training)
    if not found:
        raise FettleError(f"{kind}: cannot be used with {type(model).__name__}: {why}; use prompt_tuning or p_tuning")
    pairs = torch.stack([torch.stack(pair) for pair in found])  # [L, 2, K, P, D]
    return pairs.permute(3, 0, 1, 2, 4).to(**place(model), copy=True)


def layers_of(model: Any) -> int:
    """How many layers a model has, by its configuration."""
    return int(model.config.get_text_config().num_hidden_layers)
