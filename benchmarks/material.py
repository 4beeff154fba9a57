"""What both sides of a benchmark are given: one random model, one tokenizer, the conversations of one file.

folder/model/            config, bf16 weights, tokenizer with a chat template that marks what the assistant says
folder/messages.jsonl    a conversation a line, as fettle reads the data file
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


def make(folder: Path, data: str, size: str) -> None:
    """Write the material: a BPE trained on the data, a random Llama in bf16, the conversations."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fettle.lab.tokenizer import save_tokenizer, train_tokenizer

    talks = conversations(data)
    lines = [orjson.dumps(talk, option=orjson.OPT_APPEND_NEWLINE) for talk in talks]
    (folder / "messages.jsonl").write_bytes(b"".join(lines))
    texts = [f"{m['role']}\n{m['content']}\n" for talk in talks for m in talk["messages"]]
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
