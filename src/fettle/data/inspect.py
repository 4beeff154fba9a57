"""What `fettle check` asks of data before the first step, and the picture of what is learned.

Each check returns sentences, one a problem; none means that it found nothing wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from fettle.core.batch import Example, Node
from fettle.data.preference import Preference
from fettle.data.source import Corpus
from fettle.data.template import Encoder

LOOKED_AT = 256  # examples of the first epoch
MARKER = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|</?s>|<(?:bos|eos|pad)>")
PROBE = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Are you there?"},
    {"role": "assistant", "content": "Yes."},
)
LEARNED, ALSO_LEARNED, WEIGHTED, SEEN, ALSO_SEEN = (
    "black on green3",
    "black on pale_green3",
    "black on gold1",
    "dim",
    "dim underline",
)


def problems(corpus: Corpus) -> list[str]:
    """Every problem that these checks find in data that is ready to train on."""
    examples = corpus.examples(LOOKED_AT)
    found = nothing_learned(corpus) + everything_cut(corpus)
    form = corpus.encoder.form
    if form is not None and form.labels:
        return found
    found += end_never_learned(examples, corpus.encoder) + pad_hides_end(examples, corpus.tokenizer)
    if corpus.template:
        served = form is None or isinstance(form, Preference)
        found += split_markers(corpus.encoder) + (serving_differs(corpus.encoder) if served else [])
    return found


def nothing_learned(corpus: Corpus) -> list[str]:
    """A source, or all of them, without a single learned token."""
    return [
        f"{c.source}: none of its {c.tokens} tokens is learned; look at its answers with `fettle check`, or say learn: all"
        for c in corpus.counts if not c.learned
    ]  # fmt: skip


def everything_cut(corpus: Corpus) -> list[str]:
    """A source whose every example lost its end, so that no answer is ever seen whole."""
    return [
        f"{c.source}: every one of its {c.examples} examples was cut to {corpus.length} tokens; raise batch.tokens"
        for c in corpus.counts if c.cut and c.cut == c.examples
    ]  # fmt: skip


def end_never_learned(examples: Sequence[Example], encoder: Encoder) -> list[str]:
    """No learned stretch ends with a special token, so the model would never learn to stop."""
    special = set(encoder.tokenizer.added_tokens_decoder)
    followed: dict[int, int] = {}
    seen = 0
    for node in (node for example in examples for node in example.nodes):
        for _, stop in stretches(node):
            seen += 1
            if int(node.tokens[stop - 1]) in special:
                return []
            after = next((int(t) for t in node.tokens[stop : stop + 3] if int(t) in special), None)
            if after is not None:
                followed[after] = followed.get(after, 0) + 1
    if not seen:
        return []
    if followed:
        name = encoder.tokenizer.convert_ids_to_tokens(max(followed, key=lambda t: followed[t]))
        return [
            f"the end of turn '{name}' follows answers but is never learned, so the model would not stop; put it inside "
            "the {% generation %} block of the chat template"
        ]
    return [
        "no answer ends with a special token, so the model would never learn to stop; give the tokenizer an eos_token that "
        "its chat template writes after an answer"
    ]


def pad_hides_end(examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """Padding and the end of a text are the same token, and the data never teaches it."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad != end:
        return []
    nodes = [node for example in examples for node in example.nodes]
    if any(bool(np.any((node.tokens == end) & (node.weights > 0))) for node in nodes):
        return []
    if any(
        int(node.tokens[stop - 1]) in tokenizer.added_tokens_decoder for node in nodes for _, stop in stretches(node)
    ):
        return []  # answers end with another token, which is learned
    return [
        f"the pad token and the end token are both '{tokenizer.eos_token}', and it is never learned, so the model would not "
        "stop; give the tokenizer a pad token of its own, or a chat template that ends answers with the end token"
    ]


def split_markers(encoder: Encoder) -> list[str]:
    """Markers that the chat template writes, or special tokens, that the tokenizer takes apart."""
    named = [v for value in encoder.special.values() for v in ([value] if isinstance(value, str) else value)]
    written = MARKER.findall(_probe(encoder, prompt=False))
    found = []
    for marker in dict.fromkeys([*written, *named]):
        pieces = encoder.ids(marker)
        if len(pieces) != 1:
            found.append(
                f"the chat template '{encoder.template.name}' writes '{marker}', which the tokenizer splits into {len(pieces)} "
                "tokens; choose the template that belongs to this tokenizer, or add the token to it"
            )
    return found


def serving_differs(encoder: Encoder) -> list[str]:
    """The prompt of a conversation has other tokens when it is served than it had in training."""
    from fettle.data.formats import Sample

    for talk in (PROBE, PROBE[1:]):
        weights = tuple(float(m["role"] == "assistant") for m in talk)
        (found,) = encoder.plain().encode([Sample(messages=talk, weights=weights)])
        if isinstance(found, str) or not found or not found[-1].spans:
            continue
        served = encoder.ids(encoder.render(talk[:-1]))
        trained = found[-1].tokens[: found[-1].spans[0][0]].tolist()
        if served == trained:
            return []
        return [
            f"in training an answer follows {encoder.tokenizer.decode(trained)[-40:]!r}, but a prompt for generation ends "
            f"{encoder.tokenizer.decode(served)[-40:]!r}: the model would be asked in other tokens than it was taught; "
            "give the tokenizer a chat template whose generation prompt is how an assistant's turn begins"
        ]
    return []


def _probe(encoder: Encoder, prompt: bool) -> str:
    from fettle.core.errors import FettleError

    try:
        return encoder.render(PROBE, prompt=prompt)
    except FettleError:  # no system turns in this template
        return encoder.render(PROBE[1:], prompt=prompt)


def stretches(node: Node) -> list[tuple[int, int]]:
    """[start, stop) of every run of learned tokens."""
    learned = np.concatenate([[0], (node.weights > 0).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(learned))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def legend(coloured: bool = True) -> Text:
    """What the looks of `show` mean."""
    if not coloured:
        return Text("⟦learned│token│by│token⟧ with a weight behind it where that is not 1; the rest is read only\n")
    parts = (
        ("learned", LEARNED),
        (" token by ", ""),
        ("token", ALSO_LEARNED),
        (", ", ""),
        ("with another weight than 1", WEIGHTED),
    )
    return Text.assemble(*parts, ", ", ("read only", SEEN), "\n")


def show(example: Example, tokenizer: Any, coloured: bool = True) -> Text:
    """An example token by token: learned tokens on green (by turns two shades), others dim, weights other than 1 on gold.

    Where there are no colours, learned tokens stand in ⟦ │ ⟧.
    """
    text = Text()
    label = f"   labels {example.extra['labels'].tolist()}" if "labels" in example.extra else ""
    text.append(f"{example.name}{label}\n", style="bold")
    said = _answers(example)
    for number, node in enumerate(example.nodes):
        if number or said:
            text.append(f"{chr(10) if number else ''}-- {said.get(number, _place(number, node))} --\n", style="bold")
        before = 0.0
        for i, (piece, start, stop) in enumerate(token_texts(node.tokens.tolist(), tokenizer)):
            weight = float(node.weights[start:stop].max())
            if coloured:
                two = (SEEN, ALSO_SEEN) if not weight else (LEARNED, ALSO_LEARNED)
                text.append(piece.replace("\n", "↵\n"), style=WEIGHTED if weight not in (0, 1) else two[i % 2])
            else:
                text.append(_between(before, weight) + piece.replace("\n", "↵\n"))
            before = weight
        text.append("" if coloured else _between(before, 0.0))
    return text


def _between(before: float, after: float) -> str:
    """What stands between two tokens of these weights where there are no colours."""
    if before == after:
        return "│" if after else ""
    return (f"⟧{'' if before == 1 else f'({before:g})'}" if before else "") + ("⟦" if after else "")


def _place(number: int, node: Node) -> str:
    return f"segment {number}, after segment {node.parent}" if number else "segment 0"


def _answers(example: Example) -> dict[int, str]:
    """What the segments of a preference are, by number; nothing for other examples."""
    if "ranks" not in example.extra:
        return {}
    ranks = [float(r) for r in example.extra["ranks"] if r > 0]
    first = len(example.nodes) - len(ranks)
    if len(ranks) == 1:
        names = ["the prompt and its answer, " + ("desired" if ranks[0] == 1 else "not desired")]
    elif len(ranks) == 2:
        names = ["chosen", "rejected"]
    else:
        names = [f"answer of rank {rank:g}" for rank in ranks]
    return {**({0: "prompt"} if first else {}), **{first + i: name for i, name in enumerate(names)}}


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[tuple[str, int, int]]:
    """(text, start, stop) for each token, or for several where only together they are whole characters."""
    found: list[tuple[str, int, int]] = []
    start, before = 0, 0  # tokens from `before` are decoded too, for the space that some tokenizers put between
    for stop in range(1, len(tokens) + 1):
        context = tokenizer.decode(list(tokens[before:start]), skip_special_tokens=False) if start > before else ""
        piece = tokenizer.decode(list(tokens[before:stop]), skip_special_tokens=False)[len(context) :]
        if piece.endswith("\ufffd") and stop < len(tokens) and stop - start < 8:
            continue
        found.append((piece, start, stop))
        before, start = start, stop
    return found
