"""The tokenizer of the lab: a byte-level BPE of 4,096 tokens trained on the corpus, with a ChatML template.

Special tokens: ``<|endoftext|>`` ends (and begins) a document, ``<|pad|>`` pads, ``<|im_start|>`` and ``<|im_end|>`` frame a turn.
Every digit is a token of its own. The folder that `save_tokenizer` writes opens with `transformers.AutoTokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from fettle.core.files import write_bytes, write_json

from .corpus import documents
from .world import World

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, PAD, TURN_START, TURN_END)  # ids 0, 1, 2, 3
MAX_LENGTH = 1024

# Runs of Han, words with the space before them, single digits, runs of punctuation, space: the pattern of Llama 3, but a
# digit at a time, and a Chinese word is the same token with and without a space before it.
PATTERN = r"'s|\p{Han}+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> Tokenizer:
    """Train the BPE on these texts; `vocabulary` counts the special tokens and the 256 bytes too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def lab_tokenizer(world: World, seed: int = 0, sample: int = 20_000, vocabulary: int = 4096) -> Tokenizer:
    """The tokenizer trained on the first `sample` documents of the corpus of `seed`.

    The names of the roles are added, because a chat template writes them in every turn and the corpus does not.
    """
    return train_tokenizer(
        chain(islice(documents(world, seed), sample), ["user assistant system", "\nuser\nassistant\nsystem"] * sample),
        vocabulary,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write what `transformers.AutoTokenizer` and `generate` read.

    That is tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and generation_config.json.
    """
    folder = Path(folder)
    names = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": ids[END], "eos_token_id": [ids[END], ids[TURN_END]], "pad_token_id": ids[PAD]}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_bytes(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": [TURN_START, TURN_END]})
    write_json(folder / "generation_config.json", generation)
