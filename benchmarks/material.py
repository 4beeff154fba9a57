"""What both sides of a benchmark are given: one random model, one tokenizer, the conversations or preferences of one file.

folder/model/            config, bf16 weights, tokenizer with a chat template that marks what the assistant says
folder/messages.jsonl    a conversation a line, as fettle reads the data file
folder/pairs.jsonl       or {"prompt": [turns], "chosen": [turn], "rejected": [turn]} a line
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

VOCABULARY = 16_000  # of the BPE; the data may give fewer, the model keeps the rows
# Llama shapes. The small one trains on two cores; the other is Llama 3.2 1B's, for a GPU.
SIZES: dict[str, dict[str, int]] = {
    "test": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
             "intermediate_size": 128, "vocab_size": VOCABULARY},
    "40m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
            "intermediate_size": 1536, "vocab_size": VOCABULARY},
    "100m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
             "intermediate_size": 2048, "vocab_size": VOCABULARY},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128_256},
}  # fmt: skip


def conversations(data: str) -> list[dict[str, Any]]:
    """The conversations of a data file as {"messages": [...]}, in its order; what fettle would set aside is left out."""
    from fettle.data.formats import detect, to_sample
    from fettle.data.parse import BadRow
    from fettle.data.read import read

    values = [row.value for row in read(data) if row.value is not None]
    kind = detect(values[:32], data)
    found = []
    for value in values:
        try:
            sample = to_sample(value, kind)
        except BadRow:
            continue
        if sample.kind == "chat":
            found.append({"messages": list(sample.messages)})
    if not found:
        raise SystemExit(f"{data}: holds no conversations (its format is {kind}); give instruction data")
    return found


def preferences(data: str) -> list[dict[str, Any]]:
    """The pairs of a data file as {"prompt": [turns], "chosen": [turn], "rejected": [turn]}; what fettle sets aside is left out."""
    from fettle.data.formats import to_sample
    from fettle.data.parse import BadRow
    from fettle.data.read import read

    found = []
    for row in read(data):
        try:
            better, worse = to_sample(row.value or {}, "preference").answers
        except BadRow:
            continue
        turns = len(better.messages) - 1
        ends = {"chosen": list(better.messages[turns:]), "rejected": list(worse.messages[turns:])}
        found.append({"prompt": list(better.messages[:turns]), **ends})
    if not found:
        raise SystemExit(f"{data}: holds no pairs; give preference data")
    return found


def make(folder: Path, data: str, size: str) -> None:
    """Write the material of instruction tuning."""
    talks = conversations(data)
    _write(folder / "messages.jsonl", talks)
    model_for([m for talk in talks for m in talk["messages"]], folder, size)


def make_pairs(folder: Path, data: str, size: str) -> None:
    """Write the material of preference tuning."""
    pairs = preferences(data)
    _write(folder / "pairs.jsonl", pairs)
    model_for([m for pair in pairs for turns in pair.values() for m in turns], folder, size)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def model_for(messages: list[dict[str, Any]], folder: Path, size: str) -> None:
    """A BPE trained on the messages, and a random Llama in bf16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fettle.lab.tokenizer import save_tokenizer, train_tokenizer

    texts = [f"{m['role']}\n{m['content']}\n" for m in messages]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
