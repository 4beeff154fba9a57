"""New tokens: words join the vocabulary, and only their embeddings train.

    E' = [E; R]      logits' = [W h; R' h]        E [V, C], W [V, C] frozen; R [n, C] trains, and R' where the head is its own

A row of R starts as the mean of the rows of the pieces that the tokenizer cut the word into before (Hewitt 2021 takes the
mean of all rows, which is what `init: mean` does, and what happens where no tokenizer is at hand). The head's rows
likewise. R is in float32. The new ids are those that the tokenizer gives: they follow its last, and lie in rows that the
model has to spare (many models round V up) or beyond them. Merging gives a plain, larger model.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.surgery import made_by, replace
from fettle.models.weight import innermost, is_adapter, place
from fettle.models.words import tokenizer_of


class GrownEmbedding(nn.Module):
    """An embedding [V, C] whose ids from `first` on come from rows that train."""

    @property
    def in_out(self) -> tuple[int, int]:
        """(V', C)."""
        return rows_of(self), self.rows.shape[1]

    def __init__(self, base: nn.Module, edit: NewTokens, first: int, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True
        self.first, self.rows = first, rows

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] -> [.., C]."""
        if not self.enabled:
            return self.base(ids)
        new = (ids >= self.first) & (ids < self.first + len(self.rows))
        old = self.base(ids.masked_fill(new, 0))
        scale = getattr(innermost(self.base), "embed_scale", 1.0)
        own = F.embedding(torch.where(new, ids - self.first, 0), self.rows) * scale
        return torch.where(new[..., None], own.to(old.dtype), old)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]


class GrownHead(nn.Module):
    """A head [V, C] whose logits from `first` on come from rows that train.

    `beside` is what the model itself adds to the logits, as BART does: here it is added as long as it is, to the old ones.
    """

    beside: Tensor | None  # [1, V]

    @property
    def in_out(self) -> tuple[int, int]:
        """(C, V')."""
        return self.rows.shape[1], rows_of(self)

    def __init__(self, base: nn.Module, edit: NewTokens, first: int, rows: nn.Parameter, beside: Tensor | None) -> None:
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True
        self.first, self.rows = first, rows
        self.register_buffer("beside", beside)

    def forward(self, h: Tensor) -> Tensor:
        """h [.., C] -> [.., max(V, first + n)]."""
        old = self.base(h)
        if self.beside is not None:
            old = old + self.beside.to(old)
        if not self.enabled:
            return old
        new = F.linear(h, self.rows.to(h.dtype))
        return torch.cat([old[..., : self.first], new.to(old.dtype), old[..., self.first + len(self.rows) :]], -1)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]


class NewTokens(Edit):
    """Add words to the vocabulary and train their embeddings; all else is frozen."""

    kind: Literal["new_tokens"] = "new_tokens"
    tokens: tuple[str, ...] = Field(min_length=1)
    init: Literal["pieces", "mean"] = "pieces"
    special: bool = Field(default=False, description="tokens of control, left out where text is read for people")

    @property
    def detachable(self) -> bool:
        """False: texts hold ids that the model would not know."""
        return False

    def apply(self, model: nn.Module) -> None:
        """Grow the tokenizer that the model was loaded with, if any, and the model's embedding and head.

        FettleError where a token is known already, or the model cannot be grown.
        """
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            self._grow(model, rows_of(model.get_input_embeddings()), [])  # type: ignore[operator]
        else:
            pieces = [tokenizer.encode(token, add_special_tokens=False) for token in self.tokens]
            self._grow(model, self._added(tokenizer), pieces)

    def _added(self, tokenizer: Any) -> int:
        """The id of the first of the tokens, added to the tokenizer."""
        from tokenizers import AddedToken

        known = tokenizer.get_vocab()
        for token in self.tokens:
            if token in known:
                raise FettleError(f"new_tokens: '{token}' is in the tokenizer already, as {known[token]}; leave it out")
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=self.special) for t in self.tokens], self.special)
        ids = tokenizer.convert_tokens_to_ids(list(self.tokens))
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise FettleError(
                f"new_tokens: the tokenizer gave the ids {ids}, not one after the other; list each token once"
            )
        return int(ids[0])

    def _grow(self, model: Any, first: int, pieces: list[list[int]]) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        table = innermost(embedding)
        if type(table).forward is not nn.Embedding.forward and not hasattr(table, "embed_scale"):
            raise FettleError(f"new_tokens: the embedding is a {type(table).__name__}, which is more than a table")
        if first > (have := rows_of(embedding)):
            raise FettleError(f"new_tokens: the tokenizer's ids go on from {first}, but the model has {have} rows")
        size = max(have, first + len(self.tokens))
        chosen = pieces if self.init == "pieces" else []
        rows: dict[Tensor, nn.Parameter] = {}  # of each table, whichever places share it
        if head is not None:
            beside = getattr(model, "final_logits_bias", None)
            model.set_output_embeddings(
                GrownHead(head, self, first, self._rows(head, chosen, rows), beside).train(head.training)
            )
            if beside is not None:
                model.final_logits_bias = beside.new_zeros(1, 1)  # as wide as any logits
        before = dict(model.named_modules(remove_duplicate=False))
        one = GrownEmbedding(embedding, self, first, self._rows(embedding, chosen, rows)).train(embedding.training)
        model.set_input_embeddings(one)
        # an encoder-decoder has it in three places now, where each had a module, and maybe edits, of its own
        for name in [n for n, m in model.named_modules(remove_duplicate=False) if m is one]:
            old = before[name]
            replace(model, name, GrownEmbedding(old, self, first, self._rows(old, chosen, rows)))
        set_vocabulary(model, size)

    def _rows(self, module: nn.Module, pieces: list[list[int]], known: dict[Tensor, nn.Parameter]) -> nn.Parameter:
        """The new rows of the table that `module` looks up in or multiplies by, made where they are not `known`."""
        table: Tensor = innermost(module).weight  # type: ignore[assignment]
        if table not in known:
            known[table] = nn.Parameter(self._start(module, pieces))
        return known[table]

    @torch.no_grad()
    def _start(self, module: nn.Module, pieces: list[list[int]]) -> Tensor:
        """[n, C] in float32 or wider: the means of the rows of each token's pieces, or of all."""
        old = _full(module)
        mean = old.mean(0)
        means = [old[ids].mean(0) if ids else mean for ids in pieces or [[]] * len(self.tokens)]
        return torch.stack(means).to(**place(module))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The new rows, by name; those that embedding and head share once."""
        ours = {f"{name}.rows" for name, _ in made_by(model, self, (GrownEmbedding, GrownHead))}
        return {name: p.detach() for name, p in model.named_parameters() if name in ours}

    def merge(self, model: nn.Module) -> None:
        """Write the rows into a plain embedding and head, as large as needed, rounded once to their type."""
        grown: list[tuple[str, Any]] = made_by(model, self, (GrownEmbedding, GrownHead))
        for _, outer in grown:
            table = outer.base
            if is_adapter(table):
                raise FettleError("new_tokens: another edit stands inside; merge the edits in the order of their list")
            stop = outer.first + len(outer.rows)
            for key in ("weight", "bias"):
                _lengthen(model, getattr(table, key, None), stop)
            if (beside := getattr(outer, "beside", None)) is not None:
                there: tuple[Tensor, ...] = (beside, model.final_logits_bias)  # type: ignore[assignment]  # one is all zeros
                own, left = (F.pad(b, (0, len(table.weight) - b.shape[1])) for b in there)
                model.final_logits_bias = own + left
                model.final_logits_bias[:, outer.first : stop] = 0  # type: ignore[operator]
            table.weight.data[outer.first : stop] = outer.rows.detach().to(table.weight.dtype)
            if getattr(table, "bias", None) is not None:
                table.bias.data[outer.first : stop] = 0
            if isinstance(table, nn.Embedding):
                table.num_embeddings = len(table.weight)
            elif isinstance(table, nn.Linear):
                table.out_features = len(table.weight)
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if child is outer:
                        setattr(module, name, table)


def _lengthen(model: nn.Module, old: nn.Parameter | None, rows: int) -> None:
    """Zeros after a weight's rows, up to `rows` of them, in every module that shares it."""
    if old is None or len(old) >= rows:
        return
    new = nn.Parameter(torch.cat([old.data, old.new_zeros(rows - len(old), *old.shape[1:])]), requires_grad=False)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, key, new)


def rows_of(module: nn.Module) -> int:
    """How many ids an embedding or head knows, grown or not, whatever stands around it."""
    if isinstance(module, GrownEmbedding | GrownHead):
        return max(rows_of(module.base), module.first + len(module.rows))
    base = getattr(module, "base", None)
    return len(module.weight) if base is None else rows_of(base)  # type: ignore[arg-type]


def new_ids(model: nn.Module) -> list[int]:
    """The ids whose rows such edits hold."""
    grown = [m for m in model.modules() if isinstance(m, GrownEmbedding)]
    return sorted({i for m in grown for i in range(m.first, m.first + len(m.rows))})


def _full(module: nn.Module) -> Tensor:
    """[V', C]: all rows of an embedding or head, those that other edits added too."""
    if isinstance(module, GrownEmbedding | GrownHead):
        old = _full(module.base)
        return torch.cat([old[: module.first], module.rows.to(old.dtype), old[module.first + len(module.rows) :]])
    if (base := getattr(module, "base", None)) is not None:
        return _full(base)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def set_vocabulary(model: Any, size: int) -> None:
    """Tell the configuration, and the model where it remembers it, how many ids there are."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "vocab_size"):
            config.vocab_size = size
    for module in model.modules():
        if isinstance(getattr(module, "vocab_size", None), int):
            module.vocab_size = size
