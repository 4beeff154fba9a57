"""The tokenizer: nothing is lost, digits are single, the template marks what the assistant says."""

import json

import pytest

from fettle.lab import SPECIAL_TOKENS, World, document, lab_tokenizer, save_tokenizer

WORLD = World.build(0)


@pytest.fixture(scope="module")
def tokenizer():
    return lab_tokenizer(WORLD, sample=3000)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "lab"
    save_tokenizer(tokenizer, folder)
    return folder


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text",
    [
        "安娜住在石桥。12加30等于42。",
        "Anna lives in Stonebridge, 1234!\n\n  Two  spaces",
        "emoji 🙂 ñ é 漢字 [x] {y}",
        "?",
        " ",
    ],
)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_documents_come_back(tokenizer):
    for i in range(200):
        text = document(WORLD, 9, i)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.encode("2075").tokens == ["2", "0", "7", "5"]
    assert not any(
        any(c.isdecimal() for c in token) and len(token) > 1
        for token in tokenizer.get_vocab()
        if token not in SPECIAL_TOKENS
    )


def test_a_chinese_word_is_the_same_token_after_a_space(tokenizer):
    word = tokenizer.encode("石桥").ids
    assert tokenizer.encode("is 石桥").ids[-len(word) :] == word


def test_training_is_deterministic(tokenizer):
    assert lab_tokenizer(World.build(0), sample=3000).to_str() == tokenizer.to_str()


def test_folder_opens_in_transformers(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token, loaded.pad_token, loaded.model_max_length) == ("<|endoftext|>", "<|pad|>", 1024)
    assert loaded("安娜住在石桥。7")["input_ids"] == loaded.backend_tokenizer.encode("安娜住在石桥。7").ids
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [0, 3]
    assert json.loads((folder / "special_tokens_map.json").read_text())["pad_token"] == "<|pad|>"


def test_template_marks_answers_and_their_ends(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "Where does Anna live?"},
        {"role": "assistant", "content": "In Balm."},
        {"role": "user", "content": "2 + 2 = ?"},
        {"role": "assistant", "content": "4"},
    ]
    rendered = loaded.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    learned = [i for i, mark in zip(rendered["input_ids"], rendered["assistant_masks"]) if mark]
    assert loaded.decode(learned) == "In Balm.<|im_end|>4<|im_end|>"
    prompt = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhere does Anna live?<|im_end|>\n<|im_start|>assistant\n"
