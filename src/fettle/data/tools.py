"""The functions that a row offers; and functions and their calls as text, for a chat template that does not know them.

It would drop them without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from fettle.data.parse import BadRow, measure, require_json

Message = dict[str, Any]
HEAD = "# Tools\n\nYou may call one or more of these functions, given as JSON:\n<tools>\n"
TAIL = "\n</tools>\n\nA call is an object with a name and arguments inside <tool_call></tool_call>."
BESIDE = ("system", "tools", "functions")  # columns beside a prompt that say how it is asked


def nothing(value: Any) -> bool:
    """Whether a column holds nothing; CSV writes an empty list as a text."""
    return not value or isinstance(value, str) and value.strip() in ("", "[]")


def of_json(text: str, what: str) -> Any:
    """What a text says as JSON; BadRow where it is none, or nested too deeply."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRow(f"{what} is not valid JSON ({str(error).split(': line')[0]})") from None
    measure(value)
    return value


def tools_of(row: dict[str, Any]) -> tuple[Message, ...]:
    """The tools of a row: a list, or a list as JSON text; each wrapped as templates expect it."""
    value = row.get("functions") if row.get("tools") is None else row["tools"]
    if isinstance(value, str):
        value = of_json(value, "'tools'") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("'tools' must be a list of objects")
    require_json(value, "'tools'")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def beside(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that may say how its prompt is asked, as they are, where they hold something."""
    return {key: row[key] for key in BESIDE if not nothing(row.get(key))}


def meant(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row with no `system` and no tools but what has the shape of them, and what it has besides under their names.

    For rows whose words are not those of conversations, where such a column may be about anything. BadRow where tools lack names.
    """
    other = {key: value for key, value in beside(row).items() if not _meant(key, value)}
    return {key: value for key, value in row.items() if key not in other}, other


def _meant(key: str, value: Any) -> bool:
    if key == "system":
        return isinstance(value, str)
    if isinstance(value, str):
        try:
            value = of_json(value, f"'{key}'")
        except BadRow:
            return False
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        return False
    if not all("name" in tool or "function" in tool for tool in value):
        raise BadRow(f"'{key}' holds an object without a name")
    return True


def spelled_out(
    messages: Sequence[Message], tools: Sequence[Message], template: str
) -> tuple[list[Message], list[Message]]:
    """The same conversation with whatever `template` never mentions written into its texts.

    Functions go into the system turn, calls into the assistant's, and a tool's answer becomes a user's turn.
    """
    out = [dict(m) for m in messages]
    left = list(tools)
    if "tool_calls" not in template:
        out = [_call(m) for m in out]
        if "'tool'" not in template and '"tool"' not in template:
            out = _answers(out)
    if left and "tools" not in template:
        text = HEAD + "\n".join(orjson.dumps(tool).decode() for tool in left) + TAIL
        left = []
        if out[0]["role"] == "system":
            out[0]["content"] += "\n\n" + text
        else:
            out.insert(0, {"role": "system", "content": text})
    return out, left


def _call(message: Message) -> Message:
    calls = message.pop("tool_calls", None)
    if calls:
        parts = [orjson.dumps(call["function"]).decode() for call in calls]
        text = "\n".join(f"<tool_call>\n{part}\n</tool_call>" for part in parts)
        message["content"] = f"{message['content']}\n{text}" if message.get("content") else text
    return message


def _answers(messages: list[Message]) -> list[Message]:
    """A tool's turns as one user turn each run of them, since many templates want user and assistant by turns."""
    out: list[Message] = []
    inside = False
    for message in messages:
        if message["role"] != "tool":
            out.append(message)
            inside = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if inside:
            out[-1]["content"] += "\n" + text
        else:
            out.append({"role": "user", "content": text})
        inside = True
    return out
