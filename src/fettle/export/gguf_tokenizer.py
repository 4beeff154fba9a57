"""A tokenizer as llama.cpp has it: the tokens, their kinds, the merges, and the name of the rule that cuts a text into words.

llama.cpp has these rules built in and knows them by name. Which one a tokenizer means is found by trial: its own rule is put
beside each of theirs on fixed texts of many kinds, and the first that gives the same tokens everywhere is taken. Where none
does, the nearest one is taken if few texts differ, and what differs is said.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from fettle.core import FettleError
from fettle.data.templates import GENERATION, chat_template
from fettle.generate.prompts import prompter

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
_OWN = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_OWN}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_OWN}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name: patterns one after the other, each cutting what the one before it left (src/llama-vocab.cpp)
RULES: dict[str, tuple[str, ...]] = {
    "qwen2": (rf"{_OWN}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",),
    "llama-bpe": (rf"{_OWN}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-4o": (_O200K,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
WHOLE_WORDS = ("llama-bpe",)  # rules with which a word that is a token is that token, whatever the merges say
TEXTS = (
    "The quick brown fox jumps over the lazy dog.", "Ada's mother isn't here; they're late, we've waited and I'll go. He'd know.",
    "ADA'S MOTHER ISN'T HERE; THEY'RE LATE AND I'M NOT.", "It costs $1,234.56, or 12345678 yen (100%).", "2024-10-31T23:59:59Z",
    "def f(x):\n    return x ** 2  # squares\n\n\nprint(f(3))\n", "a  b   c    d\te\t\tf \n g", "  leading and trailing  ",
    "one\ntwo\r\nthree\n\n\nfour", "<b>bold</b> & [link](https://example.org/a?b=c&d=1#e)", "«Où est-ce?» — demanda l'élève.",
    "Größe, Straße, Äpfel: natürlich!", "Привет, мир! Как дела?", "مرحبا بالعالم، كيف الحال؟", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "你好，世界。今天天气很好！", "日本語の文章です。カタカナも。", "한국어 문장입니다.", "mixed 中文 and English，以及 123 numbers", "🙂🙃👩‍👩‍👧 emoji",
    "x = [1, 2, 3]; y = {'k': \"v\"}; z = a[i++] != b->c;", "snake_case camelCase PascalCase kebab-case", "...!!!???---___===",
    "'quoted' and \"quoted\" and `quoted`", "the 'really' cheap 'Send' button, 'tis 'more 'verbose'", "∑ x² ≤ ∞, ½ + ⅓", "e.g. i.e. etc. Dr. Who", "\n\n\nafter newlines", "user\nassistant\nsystem",
)  # fmt: skip
ALIKE = 0.85  # of these texts, at least, for a rule that is not the tokenizer's own


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer goes into a file."""

    model: str  # llama.cpp's kind of tokenizer
    pre: str  # its rule
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]  # bos, eos, ...: what llama.cpp calls them
    adds_start: bool
    template: str | None
    differs: list[str] = field(default_factory=list)  # texts of TEXTS that llama.cpp cuts into other tokens


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The tokenizer of a model whose embedding has `rows`. FettleError where llama.cpp has none like it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(backend.to_str()) if backend is not None else {}
    kind = (said.get("model") or {}).get("type")
    if kind != "BPE" or said["model"].get("byte_fallback") or "ByteLevel" not in json.dumps(said.get("decoder")):
        what = f"'{kind}'" if kind != "BPE" else "BPE that is not byte-level"
        raise FettleError(f"export: the tokenizer is {what}, and GGUF is written here with byte-level BPE; use --to hf")
    pre, differs = rule(backend)
    added = tokenizer.added_tokens_decoder
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = {i: CONTROL if token.special else USER for i, token in added.items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in said["model"]["merges"]]
    talk = prompter(tokenizer) if _talks(tokenizer) else None
    ids = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id, "eot": talk.end_of_turn if talk else None,
    }  # fmt: skip
    start = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return Vocabulary(
        "gpt2", pre, [names.get(i, f"[PAD{i}]") for i in range(rows)],
        [kinds.get(i, NORMAL if i in names else UNUSED) for i in range(rows)], merges,
        {name: i for name, i in ids.items() if i is not None}, start, plain(talk.encoder.template.text) if talk else None, differs,
    )  # fmt: skip


def _talks(tokenizer: Any) -> bool:
    try:
        return chat_template(tokenizer).name != "join"
    except FettleError:  # a model for plain text
        return False


def plain(template: str) -> str:
    """A chat template without the tags that mark what the model says, which llama.cpp may not know; it renders the same."""
    if not GENERATION.search(template):
        return template
    # A condition that always holds, so that the whitespace control of the tags stays.
    return _tags(_tags(template, "generation", "if true"), "endgeneration", "endif")


def _tags(template: str, old: str, new: str) -> str:
    return re.sub(r"(\{%[-+]?\s*)" + old + r"(\s*[-+]?%\})", rf"\1{new}\2", template)


def rule(backend: Any) -> tuple[str, list[str]]:
    """llama.cpp's rule for a `tokenizers.Tokenizer`, and the texts for which it gives other tokens."""
    wanted = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    found: dict[str, list[str]] = {}
    for name in RULES:
        theirs = with_rule(backend, name)
        ids = [theirs.encode(text, add_special_tokens=False).ids for text in TEXTS]
        found[name] = [text for text, ours, other in zip(TEXTS, wanted, ids, strict=True) if ours != other]
    best = min(found, key=lambda name: len(found[name]))
    if len(found[best]) > (1 - ALIKE) * len(TEXTS):
        raise FettleError(
            f"export: llama.cpp has no rule that cuts texts as this tokenizer does; the nearest, '{best}', gives other tokens for "
            f"{len(found[best])} of {len(TEXTS)} texts, {found[best][0]!r} among them; use --to hf"
        )
    return best, found[best]


def with_rule(backend: Any, name: str) -> Any:
    """A `tokenizers.Tokenizer` that cuts texts by a rule of RULES, and merges as before."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    made = Tokenizer.from_str(backend.to_str())
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in RULES[name]]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.normalizer = None
    made.model.ignore_merges = name in WHOLE_WORDS
    return made
