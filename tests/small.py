"""Small models of other kinds than the causal one of conftest.py: folders with random weights and tokenizers made here.

The vocabularies are written out rather than trained, since trainers break ties by chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXTS = [
    "the soup was good and warm", "the soup was bad and cold", "a good day in the garden", "a bad night at sea",
    "Ada lives in Paris", "Bo works in Rome today", "count the red stones", "one two three four five",
]  # fmt: skip
WORDS = sorted({word for text in TEXTS for word in text.split()} - {"soup", "garden"})  # two come in pieces
LETTERS = sorted({letter for text in TEXTS for letter in text if letter != " "} | set("abcdefghijklmnopqrstuvwxyz"))


def wordpiece() -> Any:
    """A WordPiece tokenizer dressed as BERT's: [CLS] a [SEP] b [SEP], with token types."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    lower = list(dict.fromkeys(word.lower() for word in [*LETTERS, *WORDS]))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *lower, *(f"##{letter.lower()}" for letter in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level() -> Any:
    """A byte-level tokenizer dressed as RoBERTa's: <s> a </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **names)


def unigram() -> Any:
    """A Unigram tokenizer dressed as T5's: a </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    scores = {
        "<pad>": 0.0,
        "</s>": 0.0,
        "<unk>": 0.0,
        **dict.fromkeys(["▁", *LETTERS], -5.0),
        **{f"▁{w}": -2.0 for w in WORDS},
    }
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "bert": (wordpiece, "AutoModelForMaskedLM", BERT),
    "roberta": (byte_level, "AutoModelForMaskedLM", BERT | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}),
    "t5": (
        unigram, "AutoModelForSeq2SeqLM",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0},
    ),
    "bart": (
        byte_level, "AutoModelForSeq2SeqLM",
        {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 1,
            "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
        },
    ),
}  # fmt: skip


def make(kind: str, folder: Path, auto: str | None = None, **settings: Any) -> Path:
    """A folder with a random model of a kind and its tokenizer; `auto` names another class of transformers' autos."""
    import torch
    import transformers

    tokenizer, usual, config = KINDS[kind]
    words = tokenizer()
    made = transformers.AutoConfig.for_model(kind, vocab_size=len(words), **(config | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, auto or usual).from_config(made).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows(path: Path, values: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
