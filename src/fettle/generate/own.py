"""Text of a model's own, to adapt it where there is no data: as LLM-QAT makes it (Liu et al. 2023, arXiv 2305.17888, section 3.1).

    a start token, each of the vocabulary in turn ── 3 to 5 tokens, the likeliest each ── sampled to `length`, or to an end

All sampled, texts would begin at random and go nowhere; all greedy, they would be few and repeat themselves.

A file of JSON lines, `{"text": .., "row": i}`, which `data:` reads as plain text; the first one holds the recipe too. Row i is a function
of the recipe and of i alone, so that a run that was stopped goes on where it was: what is not whole yet lies in `<file>.part`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from pydantic import Field, model_validator

from fettle.core import FettleError, Spec
from fettle.core.files import make_folder, sync, writing
from fettle.generate.prompts import prompter
from fettle.generate.sample import Sampling, generate

if TYPE_CHECKING:
    from fettle.models.forest import Forest

AT_ONCE = 128  # rows that are written, and synced, together


class OwnText(Spec):
    """How a model's own texts are made."""

    rows: int = Field(1000, ge=1)
    length: int = Field(256, ge=2, description="most tokens of a text")
    greedy: tuple[int, int] = Field((3, 5), description="least and most tokens that are the likeliest ones")
    temperature: float = Field(1.0, gt=0, description="of the tokens after these")
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> OwnText:
        if not 0 <= self.greedy[0] <= self.greedy[1]:
            raise ValueError(f"greedy: {list(self.greedy)} is no range; give the least first, as in [3, 5]")
        return self


def write_own(
    forest: Forest, file: Path, spec: OwnText, source: str, progress: Callable[[int], None] | None = None
) -> None:
    """Write the rows of `spec`; `source` says which model it is. `progress(k)`: k more rows are written.

    FettleError where `file` is there already, or was begun with another recipe.
    """
    if file.exists():
        raise FettleError(f"{file}: is there already; choose another name, or remove it")
    recipe = {"model": source, **spec.model_dump(mode="json")}
    part = file.with_name(file.name + ".part")
    done = _begun(part, recipe)
    if progress:
        progress(done)
    make_folder(file.parent)
    with writing(file):
        with open(part, "ab") as handle:
            for start in range(done, spec.rows, AT_ONCE):
                rows = range(start, min(start + AT_ONCE, spec.rows))
                for i, text in zip(rows, own_texts(forest, spec, rows), strict=True):
                    line: dict[str, Any] = {"text": text, "row": i} | ({"recipe": recipe} if i == 0 else {})
                    handle.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
                handle.flush()
                os.fsync(handle.fileno())
                if progress:
                    progress(len(rows))
        os.replace(part, file)
    sync(file.parent)


def own_texts(forest: Forest, spec: OwnText, rows: range) -> list[str]:
    """The texts of some rows."""
    talk, starts = prompter(forest.tokenizer), start_tokens(forest, spec.seed)
    bound = spec.length if forest.context is None else min(spec.length, forest.context)
    front = list(talk.encoder.prefix)
    texts = [[*front, starts[i % len(starts)]] for i in rows]
    spans = [int(np.random.default_rng([spec.seed, i]).integers(spec.greedy[0], spec.greedy[1] + 1)) for i in rows]
    for length in sorted(set(spans)):  # of one length together, so that what a row draws depends on itself alone
        chosen = [k for k, span in enumerate(spans) if span == length]
        texts_of = [texts[k] for k in chosen]
        ended = (
            _go_on(forest, texts_of, Sampling(max_tokens=length), [0] * len(chosen))
            if length
            else [False] * len(chosen)
        )
        left = bound - len(front) - 1 - length
        open_ = [k for k, end in zip(chosen, ended, strict=True) if not end]
        if left > 0 and open_:
            draw = Sampling(
                max_tokens=left, temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p, seed=spec.seed
            )
            _go_on(forest, [texts[k] for k in open_], draw, [rows[k] for k in open_])
    shown = [forest.tokenizer.decode(text[len(front) :], skip_special_tokens=True) for text in texts]
    return [text.rstrip("\ufffd") for text in shown]  # a text may be cut in the middle of a character


def _go_on(forest: Forest, texts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[bool]:
    """Lengthen each text in place; whether it came to an end."""
    found = generate(forest, texts, sampling, seeds=seeds)
    for text, completion in zip(texts, found, strict=True):
        text += completion.tokens
    return [completion.reason != "length" for completion in found]


def start_tokens(forest: Forest, seed: int) -> list[int]:
    """Every token that is text, in an order that the seed decides."""
    tokenizer = forest.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = [
        i
        for i in sorted(tokenizer.get_vocab().values())
        if i not in special and tokenizer.decode([i]).strip(" \n\t\r\ufffd")
    ]
    return [plain[i] for i in np.random.default_rng([seed]).permutation(len(plain))]


def _begun(part: Path, recipe: dict[str, Any]) -> int:
    """How many rows a stopped run has left; a line that it left half-written is cut off."""
    if not part.is_file():
        return 0
    whole = rows = 0
    with open(part, "rb+") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            then = orjson.loads(line)["recipe"] if rows == 0 else recipe
            if then != recipe:
                key = next(k for k in recipe if then.get(k) != recipe[k])
                raise FettleError(
                    f"{part}: was begun with another recipe ({key}: {then.get(key)} then, {recipe[key]} now); go on with that one, or "
                    "remove the file"
                )
            whole, rows = whole + len(line), rows + 1
        handle.truncate(whole)
    return rows
