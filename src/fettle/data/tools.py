"""Functions and their calls as text, for a chat template that does not know them and would drop them without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

Message = dict[str, Any]
HEAD = "# Tools\n\nYou may call one or more of these functions, given as JSON:\n<tools>\n"
TAIL = "\n</tools>\n\nA call is an object with a name and arguments inside <tool_call></tool_call>."


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
