"""Rows to samples: what each format's columns mean, and every way in which a row can fail to be one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fettle.core.errors import FettleError
from fettle.data.parse import BadRow, kind_of, require_json
from fettle.data.tools import beside, meant, nothing, of_json, tools_of

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "tool_response": "tool", "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip


REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use; templates read the first or the second


@dataclass(frozen=True)
class Sample:
    """What a row says: a conversation, a prompt with its completion, a text, or several answers to one prompt."""

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    weights: tuple[float, ...] = ()  # a conversation's: one a message, 0 where it is not learned
    prompt: str = ""
    completion: str = ""
    beside: dict[str, Any] = field(default_factory=dict)  # `system`, `tools`, `functions` of its row that nothing reads
    text: str = ""
    weight: float = 1.0
    label: Any = None  # of a text, or of `text` with `pair`: a name, a number, or a list of them
    pair: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[Any, ...] = ()  # one a word: a name or a number
    answers: tuple[Sample, ...] = ()  # each the whole prompt with one answer, the best first
    ranks: tuple[float, ...] = ()  # one an answer, 1 the best; of a single answer 1 where it is desired, else 2
    margin: float = 0.0  # by how much the first answer is better than the last, where people said so

    @property
    def kind(self) -> str:
        """'chat', 'completion', 'text', 'labelled', 'tagged' or 'preference'."""
        if self.answers:
            return "preference"
        if self.words or self.label is not None:
            return "tagged" if self.words else "labelled"
        return "chat" if self.messages else "completion" if self.completion else "text"

    @property
    def unused(self) -> str:
        """The kind, or that of its answers, where a system turn or tools of its row are not read; else ''."""
        return next((one.kind for one in self.answers or (self,) if one.beside), "")


def detect(rows: Sequence[dict[str, Any]], where: str) -> str:
    """The format of a source by its first rows; FettleError where none fits."""
    for row in rows:
        if name := _detect(row, where):
            return name
    columns = ", ".join(sorted({str(key) for row in rows for key in row})) or "none"
    raise FettleError(
        f"{where}: no known format has the columns found ({columns}); say which is meant with format: and template:, "
        "as in template: '{{ question }} ||| {{ answer }}'"
    )


def _detect(row: dict[str, Any], where: str) -> str | None:
    if {"chosen", "rejected"} <= row.keys() or isinstance(row.get("label"), bool) and "messages" in row:
        raise FettleError(
            f"{where}: the rows hold human preferences (chosen and rejected answers, or labels); learn from them with an "
            "objective such as dpo (kto for labels), or from their conversations alone with format: messages or format: sharegpt"
        )
    talk = row.get("messages", row.get("conversations", row.get("conversation")))
    if isinstance(talk, list) and talk and isinstance(talk[0], dict):
        return "sharegpt" if "from" in talk[0] else "messages" if "role" in talk[0] else None
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "completion"
    return "text" if "text" in row else None


def to_sample(row: dict[str, Any], format: str) -> Sample:
    """A row of a named format (not 'auto', not 'template') as a sample; BadRow says why it is none."""
    sample = READERS[format](row)
    if row.get("weight") is not None:
        weight = weight_of(row["weight"], "weight")
        sample = replace(sample, weight=weight, weights=tuple(w * weight for w in sample.weights))
    if sample.messages and not any(sample.weights):
        raise BadRow("every answer has the weight 0, so nothing would be learned")
    return sample


def weight_of(value: Any, key: str) -> float:
    if isinstance(value, str):  # a CSV cell
        try:
            value = float(value)
        except ValueError:
            raise BadRow(f"'{key}' is not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"'{key}' must be a number, found {kind_of(value)}")
    if not math.isfinite(value) or value < 0:
        raise BadRow(f"'{key}' must be a finite number, 0 or more, found {value}")
    return float(value)


def text_of(row: dict[str, Any], key: str, empty: bool = False) -> str:
    """The text under a key that must be there; blank ones only where `empty`."""
    if key not in row:
        raise BadRow(f"the key '{key}' is missing")
    value = row[key]
    if value is None:
        raise BadRow(f"'{key}' is null")
    if not isinstance(value, str):
        raise BadRow(f"'{key}' must be a text, found {kind_of(value)}")
    if not empty and not value.strip():
        raise BadRow(f"'{key}' is empty")
    return value


def maybe(row: dict[str, Any], key: str) -> str:
    """The text under a key that may be missing, null or blank."""
    return "" if row.get(key) is None else text_of(row, key, empty=True)


def _plain(row: dict[str, Any]) -> Sample:
    return Sample(text=text_of(row, "text"))


def _labelled(row: dict[str, Any]) -> Sample:
    key = "label" if "label" in row else "labels" if "labels" in row else ""
    if not key or row[key] is None:
        raise BadRow("the key 'label' is missing" if not key else f"'{key}' is null")
    return Sample(text=text_of(row, "text"), pair=maybe(row, "text_pair"), label=row[key])


def _tagged(row: dict[str, Any]) -> Sample:
    for key in ("tokens", "tags"):
        if not isinstance(row.get(key), list):
            raise BadRow(
                f"'{key}' must be a list, found {kind_of(row[key])}" if key in row else f"the key '{key}' is missing"
            )
    words, tags = row["tokens"], row["tags"]
    if not words:
        raise BadRow("'tokens' is empty")
    if len(words) != len(tags):
        raise BadRow(f"{len(words)} tokens and {len(tags)} tags; each token needs one")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise BadRow("'tokens' holds something that is no word")
    return Sample(words=tuple(words), tags=tuple(tags))


def _preference(row: dict[str, Any]) -> Sample:
    from fettle.data.ranked import ranked  # which reads turns as this file does

    return ranked(row)


def _completion(row: dict[str, Any]) -> Sample:
    key = "completion" if "completion" in row else "response" if "response" in row else "completion"
    prompt, answer = row.get("prompt"), row.get(key)
    if isinstance(prompt, list) and isinstance(answer, list):
        if not answer:
            raise BadRow(f"'{key}' is empty")
        sample = conversation([*prompt, *answer], "role", "content", row)
        n = len(sample.messages) - len(answer)
        return replace(sample, weights=tuple(0.0 if i < n else w for i, w in enumerate(sample.weights)))
    return completed(text_of(row, "prompt", empty=True), text_of(row, key), row)


def completed(prompt: str, completion: str, row: dict[str, Any]) -> Sample:
    """A text with what goes on from it; it has no place for the system turn and the tools of its row, which are kept beside it."""
    return Sample(prompt=prompt, completion=completion, beside=beside(row))


def conversed(sample: Sample) -> Sample:
    """A prompt and its completion as a conversation; BadRow where the prompt is empty."""
    if not sample.prompt.strip():
        raise BadRow("the prompt is empty, and a conversation begins with the user")
    turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}]
    made = instructed(turns, sample.beside)
    return replace(made, weight=sample.weight, weights=tuple(w * sample.weight for w in made.weights))


def in_turns(sample: Sample) -> Sample:
    """A sample with a conversation in place of a prompt that is a text, of each of its answers where it has several."""
    if sample.answers:
        return replace(sample, answers=tuple(map(in_turns, sample.answers)))
    return conversed(sample) if sample.kind == "completion" else sample


def unused_notes(path: str, rows: Counter[str]) -> list[str]:
    """The notes on rows whose `system` or `tools` nothing reads, counted by `Sample.unused`."""
    whys = {
        "completion": "beside a prompt that is a text, which is gone on from as it is, without them; chat: true makes it a "
        "conversation with both",
        "chat": "that are no system turn and no list of functions, and are not read",
    }
    return [f"{path}: {rows[kind]} rows have 'system' or 'tools' {why}" for kind, why in whys.items() if rows[kind]]


def _alpaca(row: dict[str, Any]) -> Sample:
    answer = {"role": "assistant", "content": text_of(row, "output")}
    return instructed([*alpaca_turns(row), answer], row)


def instructed(turns: list[Any], row: dict[str, Any]) -> Sample:
    """A conversation of a row in other words than those of conversations: its tools are what has the shape of tools."""
    row, other = meant(row)
    return replace(conversation(turns, "role", "content", row), beside=other)


def alpaca_turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """The old turns of a row in alpaca's words, and its question."""
    question, more = text_of(row, "instruction"), maybe(row, "input")
    messages = []
    history = [] if nothing(row.get("history")) else row["history"]
    if not isinstance(history, list) or not all(isinstance(p, list) and len(p) == 2 for p in history):
        raise BadRow("'history' must be a list of [question, answer] pairs")
    for pair in history:
        turn = {"question": pair[0], "answer": pair[1]}
        messages.append({"role": "user", "content": text_of(turn, "question")})
        messages.append({"role": "assistant", "content": text_of(turn, "answer")})
    return [*messages, {"role": "user", "content": f"{question}\n\n{more}" if more.strip() else question}]


def _messages(row: dict[str, Any]) -> Sample:
    key = next((k for k in ("messages", "conversations", "conversation") if k in row), "messages")
    return conversation(_turns(row, key), "role", "content", row)


def _sharegpt(row: dict[str, Any]) -> Sample:
    key = next((k for k in ("conversations", "conversation", "messages") if k in row), "conversations")
    return conversation(_turns(row, key), "from", "value", row)


def _turns(row: dict[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise BadRow(f"the key '{key}' is missing")
    if not isinstance(row[key], list):
        raise BadRow(f"'{key}' must be a list of turns, found {kind_of(row[key])}")
    if not row[key]:
        raise BadRow(f"'{key}' is empty")
    return row[key]


def conversation(turns: list[Any], role_key: str, text_key: str, row: dict[str, Any]) -> Sample:
    messages: list[dict[str, Any]] = []
    weights: list[float] = []
    if system := _system(row):
        messages.append({"role": "system", "content": system})
        weights.append(0.0)
    for number, turn in enumerate(turns, 1):
        try:
            message, weight = _message(turn, role_key, text_key)
        except BadRow as problem:
            raise BadRow(f"turn {number}: {problem}") from None
        messages.append(message)
        weights.append(weight)
    return chat(messages, tools_of(row), weights)


def _system(row: dict[str, Any]) -> str:
    """The system turn of a row; '' where it has none."""
    system = maybe(row, "system")
    return system if system.strip() else ""


def _message(turn: Any, role_key: str, text_key: str) -> tuple[dict[str, Any], float]:
    if not isinstance(turn, dict):
        raise BadRow(f"expected an object, found {kind_of(turn)}")
    said = text_of(turn, role_key)
    role = ROLES.get(said)
    if role is None:
        raise BadRow(f"unknown role '{said[:40]}'; known: {', '.join(sorted(ROLES))}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls_of_text(text_of(turn, text_key))}, 1.0
    message: dict[str, Any] = {"role": role}
    if turn.get("tool_calls"):
        if role != "assistant":
            raise BadRow(f"'tool_calls' in a turn of the role '{said}'")
        message["tool_calls"] = _calls(turn["tool_calls"])
    message["content"] = _content(turn, text_key, empty=role == "tool" or "tool_calls" in message)
    for key in ("name", "tool_call_id"):
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
    if isinstance(reasoning, str) and role == "assistant":
        message |= {"thinking": reasoning, "reasoning_content": reasoning}
    if role != "assistant":
        return message, 0.0
    return message, 1.0 if turn.get("weight") is None else weight_of(turn["weight"], "weight")


def _content(turn: dict[str, Any], key: str, empty: bool) -> str:
    """A turn's text: a text, or a list of parts that are all texts."""
    value = turn.get(key)
    if isinstance(value, list):
        for part in value:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise BadRow(f"'{key}' holds a part that is not a text")
        value = "".join(part["text"] for part in value)
        return text_of({key: value}, key, empty)
    if value is None and empty:
        return ""
    return text_of(turn, key, empty)


def _calls_of_text(text: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call: one call or a list of them, as JSON."""
    value = of_json(text, "the function call")
    return _calls(value if isinstance(value, list) else [value])


def _calls(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadRow(f"'tool_calls' must be a list, found {kind_of(value)}")
    found = []
    for call in value:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise BadRow("a function call without a name")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = of_json(arguments, "the arguments of a function call") if arguments.strip() else {}
        require_json(arguments, f"the call of '{inner['name']}'")
        entry = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            entry["id"] = call["id"]
        found.append(entry)
    if not found:
        raise BadRow("'tool_calls' is empty")
    return found


def chat(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...] = (), weights: list[float] | None = None
) -> Sample:
    """A conversation whose order of turns makes sense; BadRow where it does not."""
    if weights is None:
        weights = [1.0 if m["role"] == "assistant" else 0.0 for m in messages]
    body = [m["role"] for m in messages]
    if "system" in body[1:]:
        raise BadRow("a system turn after the first turn")
    talk = body[1:] if body[:1] == ["system"] else body
    if "assistant" not in talk:
        raise BadRow("the conversation has no assistant turn")
    if talk[0] != "user":
        raise BadRow(f"the conversation begins with the role '{talk[0]}', expected the user")
    for before, role in zip(talk, talk[1:], strict=False):
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRow("a tool's answer that follows no call")
        if role == before == "user":
            raise BadRow("two user turns in a row")
    if talk[-1] != "assistant":
        raise BadRow(f"the conversation ends with the role '{talk[-1]}', which nothing answers")
    return Sample(messages=tuple(messages), tools=tools, weights=tuple(weights))


READERS: dict[str, Callable[[dict[str, Any]], Sample]] = {
    "alpaca": _alpaca, "sharegpt": _sharegpt, "messages": _messages, "completion": _completion, "text": _plain,
    "labelled": _labelled, "tagged": _tagged, "preference": _preference,
}  # fmt: skip
