"""The named chat templates for tokenizers that bring none, and what is known about a template before it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fettle.core.errors import FettleError
from fettle.models.encdec import JOIN

_TOOLS = """\
{%- if tools %}
    {{- '# Tools\\n\\nYou may call one or more of these functions, given as JSON:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nA call is an object with a name and arguments inside <tool_call></tool_call>.' }}
{%- endif %}"""

_CALLS = """\
{%- if message.tool_calls %}
    {%- for call in message.tool_calls %}
        {%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}
        {{- '<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\\n</tool_call>' }}
    {%- endfor %}
{%- endif %}"""

CHATML = (
    """\
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + ('\\n\\n' if tools else '') }}
    {%- endif %}
    """
    + _TOOLS
    + """
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            """
    + _CALLS
    + """
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

PLAIN = (
    """\
{{- bos_token }}
{%- if tools or messages[0].role == 'system' %}
    {{- '### System:\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + ('\\n\\n' if tools else '') }}
    {%- endif %}
    """
    + _TOOLS
    + """
    {{- '\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### Assistant:\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            """
    + _CALLS
    + """
            {{- eos_token }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '### ' + message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant:\\n' }}
{%- endif %}
"""
)

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Template:
    """A chat template and where it comes from: 'tokenizer', 'chatml', 'plain', or 'join' (encoder-decoders)."""

    name: str
    text: str
    tools_text: str = ""  # another text for conversations with tools, where the tokenizer brings one

    def of(self, tools: bool) -> str:
        """The text for a conversation with or without tools."""
        return self.tools_text if tools and self.tools_text else self.text


def marks(text: str) -> bool:
    """Whether a template says itself, in generation blocks, what the model says."""
    return bool(GENERATION.search(text))


def chat_template(tokenizer: Any) -> Template:
    """The tokenizer's own template; where it has none, 'chatml' if its two tokens are single tokens, else 'plain'.

    'plain' uses headings in words and ends an answer with the end-of-text token, so that no special
    token is asked for that the model does not know.
    """
    own = getattr(tokenizer, "chat_template", None)
    if own == JOIN:
        return Template("join", own)
    if isinstance(own, dict):
        if "default" not in own:
            raise FettleError(
                f"the tokenizer has the chat templates {', '.join(sorted(own))} and none called 'default'; set one as its chat_template"
            )
        return Template("tokenizer", own["default"], own.get("tool_use", ""))
    if own:
        return Template("tokenizer", own)
    known = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    if {"<|im_start|>", "<|im_end|>"} <= known:
        return Template("chatml", CHATML)
    if not tokenizer.eos_token:
        raise FettleError(
            "the tokenizer has no chat template and no end-of-text token, so an answer could never end; set its chat_template or eos_token"
        )
    return Template("plain", PLAIN)
