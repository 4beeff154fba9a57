"""Rows of human preference to samples: several answers to one prompt, the best first, or one answer that was judged.

    {"prompt": ..., "chosen": ..., "rejected": ...}            a pair; "margin" says by how much, where people said so
    {"prompt": ..., "answers": [...], "ranks": [1, 3, 2]}      K answers; ranks may be equal; without them the best comes first
    {"prompt": ..., "completion": ..., "label": true}          one answer, desired or not

The prompt is a text or turns, under `prompt`, `messages` or `conversations`, or alpaca's `instruction`, `input` and `history`. An
answer is a text, a turn, or turns; where answers are whole conversations (as texts, with "Human:" and "Assistant:"), the prompt is
what they have in common, and they must not part before an answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fettle.data.formats import Sample, alpaca_turns, completed, conversation, instructed, text_of, weight_of
from fettle.data.parse import BadRow, kind_of

MOST = 16  # answers to one prompt
TALKS = ("messages", "conversations", "conversation")
LABELS = ("label", "kto_tag")  # of one answer
SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def ranked(row: dict[str, Any]) -> Sample:
    """A row of preference as a sample; BadRow says why it is none."""
    key = next((key for key in LABELS if key in row), None)
    names: tuple[str, ...]
    if "chosen" in row or "rejected" in row:
        names, values, ranks = ("chosen", "rejected"), [_present(row, k) for k in ("chosen", "rejected")], [1.0, 2.0]
    elif "answers" in row:
        values, ranks = _several(row)
        names = tuple(f"answer {i + 1}" for i in range(len(values)))
    elif key is not None:
        return _judged(row, key)
    else:
        raise BadRow("no preference: the keys 'chosen' and 'rejected', 'answers', or 'label' are missing")
    answers = _answers(row, values, names)
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    _all_differ([answers[i] for i in order], [names[i] for i in order])
    return Sample(
        answers=tuple(answers[i] for i in order), ranks=tuple(ranks[i] for i in order), margin=_margin(row),
    )  # fmt: skip


def _present(row: dict[str, Any], key: str) -> Any:
    if row.get(key) is None:
        raise BadRow(f"'{key}' is null" if key in row else f"the key '{key}' is missing")
    return row[key]


def _several(row: dict[str, Any]) -> tuple[list[Any], list[float]]:
    values = row["answers"]
    if not isinstance(values, list) or not 2 <= len(values) <= MOST:
        found = f"{len(values)} of them" if isinstance(values, list) else kind_of(values)
        raise BadRow(f"'answers' must be a list of 2 to {MOST} answers, found {found}")
    ranks = row.get("ranks")
    if ranks is None:
        return values, [float(i) for i in range(1, len(values) + 1)]
    if not isinstance(ranks, list) or len(ranks) != len(values):
        raise BadRow(f"'ranks' must be a list of {len(values)} numbers, one an answer")
    if not all(isinstance(r, int | float) and not isinstance(r, bool) and math.isfinite(r) and r >= 1 for r in ranks):
        raise BadRow("'ranks' must be numbers, 1 for the best")
    if len(set(ranks)) == 1:
        raise BadRow("all answers have the same rank, so nothing is preferred")
    places = sorted(set(ranks))
    return values, [1.0 + places.index(r) for r in ranks]  # the best is 1, whatever the row counts from


def _judged(row: dict[str, Any], key: str) -> Sample:
    label = _present(row, key)
    if isinstance(label, str) and label.lower() in ("true", "false"):  # a CSV cell
        label = label.lower() == "true"
    if not isinstance(label, bool) and label not in (0, 1):
        raise BadRow(f"'{key}' must be true or false, found {label!r}"[:120])
    name = next((k for k in ("completion", "response") if k in row), "")
    if not name:
        if not any(isinstance(row.get(k), list) for k in TALKS):
            raise BadRow("the key 'completion' is missing")
        answer = _talk([], _turns(next(row[k] for k in TALKS if k in row)), row)
    else:
        (answer,) = _answers(row, [_present(row, name)], [name])
    return Sample(answers=(_last_only(answer),), ranks=(1.0 if label else 2.0,))


def _margin(row: dict[str, Any]) -> float:
    return 0.0 if row.get("margin") is None else weight_of(row["margin"], "margin")


def _answers(row: dict[str, Any], values: Sequence[Any], names: Sequence[str]) -> list[Sample]:
    """Each answer with its prompt; only the answer is learned."""
    prompt = _prompt(row)
    if prompt is None and all(isinstance(v, str) for v in values):
        values = [_spoken(v, name) for v, name in zip(values, names, strict=True)]
    whole = all(isinstance(v, list) and len(v) > 1 and _role(v[0]) != "assistant" for v in values)
    if whole:
        return _parted([_turns(v) for v in values], row, names)
    if prompt is None:
        raise BadRow("the key 'prompt' is missing")
    if isinstance(prompt, str) and all(isinstance(v, str) for v in values):
        return [completed(prompt, text_of({n: v}, n), row) for v, n in zip(values, names, strict=True)]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)
    return [_talk(turns, _as_turns(v, n), row) for v, n in zip(values, names, strict=True)]


def _prompt(row: dict[str, Any]) -> str | list[Any] | None:
    """The prompt as a text, or as turns; None where the row has none."""
    for key in ("prompt", *TALKS):
        if isinstance(row.get(key), list):
            return row[key]  # type: ignore[no-any-return]
    if "instruction" in row:
        return alpaca_turns(row)
    return text_of(row, "prompt", empty=True) if "prompt" in row else None


def _turns(values: Sequence[Any]) -> list[Any]:
    """Turns under one pair of names, 'role' and 'content', whatever theirs are."""
    return [
        {**{k: v for k, v in t.items() if k not in ("from", "value")}, "role": t["from"], "content": t.get("value")}
        if isinstance(t, dict) and "from" in t
        else t
        for t in values
    ]


def _as_turns(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": text_of({name: value}, name)}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"'{name}' must be a text, a turn or a list of turns, found {kind_of(value)}")
    if not value:
        raise BadRow(f"'{name}' is empty")
    return _turns(value)


def _role(turn: Any) -> str:
    said = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return "assistant" if said in ("assistant", "gpt", "chatgpt", "model") else str(said)


def _talk(prompt: list[Any], answer: list[Any], row: dict[str, Any]) -> Sample:
    """A conversation of which only what comes after the prompt is learned."""
    turns = [*prompt, *answer]
    talk = instructed(turns, row) if "instruction" in row else conversation(turns, "role", "content", row)
    first = len(talk.messages) - len(answer)
    return replace(talk, weights=tuple(float(i >= first and w > 0) for i, w in enumerate(talk.weights)))


def _last_only(talk: Sample) -> Sample:
    if not talk.messages:
        return talk
    last = len(talk.messages) - 1
    return replace(talk, weights=tuple(float(i == last) for i in range(last + 1)))


def _parted(talks: list[list[Any]], row: dict[str, Any], names: Sequence[str]) -> list[Sample]:
    """Whole conversations: the prompt is where they are the same."""
    shortest = min(map(len, talks))
    at = next((i for i in range(shortest) if any(talk[i] != talks[0][i] for talk in talks)), shortest)
    if at == shortest:
        raise BadRow(
            f"{' and '.join(names)} are the same"
            if len({*map(len, talks)}) == 1
            else "one answer is the beginning of another"
        )
    if wrong := next((n for n, talk in zip(names, talks, strict=True) if _role(talk[at]) != "assistant"), None):
        raise BadRow(f"the prompts differ: turn {at + 1} of '{wrong}' is no answer, and the conversations part there")
    return [_talk(talk[:at], talk[at:], row) for talk in talks]


def _spoken(text: str, name: str) -> list[dict[str, str]]:
    """A conversation that is written as one text."""
    parts = SPOKEN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise BadRow(
            f"the key 'prompt' is missing, and '{name}' is no conversation written with 'Human:' and 'Assistant:'"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _all_differ(answers: Sequence[Sample], names: Sequence[str]) -> None:
    for i, answer in enumerate(answers):
        for j in range(i):
            if (answers[j].messages, answers[j].completion) == (answer.messages, answer.completion):
                raise BadRow(f"{names[j]} and {names[i]} are the same")
