"""Rendering and masks: the text of transformers, and what is learned of it, by the rendered text alone."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import FettleError
from fettle.data import BadRow, Encoder, Sample, chat_template, encode, to_sample
from fettle.data.template import Encoded
from unit.data.makers import CHATML, MODELS, QWEN2, WORDS_ONLY, model_of, tokenizer_of

TALK = [
    {"role": "user", "content": "What is the capital of the island? 👩‍🚀"},
    {"role": "assistant", "content": "  你好，世界。\n\n Yes 🙂 "},
    {"role": "user", "content": "user\nassistant\n"},
    {"role": "assistant", "content": "What is the capital of the island?"},
]
SYSTEM = {"role": "system", "content": "You are kind."}


def sample_of(talk, **more) -> Sample:
    return Sample(messages=tuple(talk), weights=tuple(float(m["role"] == "assistant") for m in talk), **more)


def learned(tokenizer, example) -> list[str]:
    """The text of each learned stretch."""
    return [tokenizer.decode(example.tokens[a:b], skip_special_tokens=False) for a, b, _ in example.spans]


def talks(name: str):
    yield TALK
    if name not in ("gemma",):
        yield [SYSTEM, *TALK]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_apply_chat_template(name: str, kind: str) -> None:
    tokenizer = model_of(name, kind)
    for talk in talks(name):
        encoder = Encoder(tokenizer)
        for prompt in (False, True):
            theirs = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert encoder.render(talk, prompt=prompt) == theirs
            assert encoder.ids(theirs) == tokenizer.apply_chat_template(talk, add_generation_prompt=prompt)["input_ids"]
        (found,) = encoder.encode([sample_of(talk)])
        assert not isinstance(found, str)
        assert found[-1].tokens.tolist() == tokenizer.apply_chat_template(talk)["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "qwen3"])
def test_every_answer_and_its_end_are_learned(name: str, kind: str) -> None:
    tokenizer = model_of(name, kind)
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}.get(name, "<|im_end|>")
    for talk in talks(name):
        (example,) = encode(sample_of(talk), tokenizer)
        assert len(example.spans) == 2
        for (start, stop, weight), message in zip(
            example.spans, [m for m in talk if m["role"] == "assistant"], strict=True
        ):
            assert weight == 1
            assert example.tokens[stop - 1] == tokenizer.convert_tokens_to_ids(end)
            assert tokenizer.decode(example.tokens[start : stop - 1]).strip() == message["content"].strip()
        assert encoder_prompt_is_prefix(tokenizer, talk, example)


def encoder_prompt_is_prefix(tokenizer, talk, example) -> bool:
    """What stands before the last answer is the prompt that generation would use."""
    encoder = Encoder(tokenizer)
    prompt = encoder.ids(encoder.render(talk[:-1]))
    return example.tokens[: example.spans[-1][0]].tolist() == prompt


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_mask_is_that_of_transformers(kind: str) -> None:
    tokenizer = model_of("chatml-marked", kind)
    for talk in (TALK, [SYSTEM, *TALK]):
        theirs = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        (example,) = encode(sample_of(talk), tokenizer)
        assert example.tokens.tolist() == theirs["input_ids"]
        assert (example.node.weights > 0).astype(int).tolist() == theirs["assistant_masks"]


def test_marked_and_prefix_masks_agree() -> None:
    marked = encode(sample_of([SYSTEM, *TALK]), model_of("chatml-marked"))
    plain = encode(sample_of([SYSTEM, *TALK]), model_of("chatml"))
    assert marked[0].tokens.tolist() == plain[0].tokens.tolist() and marked[0].spans == plain[0].spans


TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), min_size=1, max_size=30)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.sampled_from(["bytes", "pieces"]))
def test_masks_of_any_text(pairs: list[tuple[str, str]], kind: str) -> None:
    talk = [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    marked, plain = model_of("chatml-marked", kind), model_of("chatml", kind)
    theirs = marked.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    for tokenizer in (marked, plain):
        (example,) = encode(sample_of(talk), tokenizer)
        assert example.tokens.tolist() == theirs["input_ids"]
        assert (example.node.weights > 0).astype(int).tolist() == theirs["assistant_masks"]


@given(st.lists(st.sampled_from([" ", "\n", "a", "你", "🙂", "Yes", "  "]), min_size=1, max_size=8).map("".join))
def test_offsets_without_leading_space_give_the_same_mask(answer: str) -> None:
    talk = [{"role": "user", "content": " a "}, {"role": "assistant", "content": answer}]
    (whole,) = encode(sample_of(talk), model_of("chatml", "bytes"))
    (trimmed,) = encode(sample_of(talk), model_of("chatml", "trimmed"))
    assert whole.tokens.tolist() == trimmed.tokens.tolist() and whole.spans == trimmed.spans


def test_rewritten_history_gives_an_example_a_turn() -> None:
    tokenizer = model_of("qwen3")
    talk = [dict(m) for m in TALK]
    talk[1]["reasoning_content"] = "Hm."
    first, second = encode(sample_of(talk), tokenizer)
    assert learned(tokenizer, first) == ["<think>\nHm.\n</think>\n\n" + TALK[1]["content"] + "<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\n\n</think>\n\n" + TALK[3]["content"] + "<|im_end|>"]
    assert "Hm." not in tokenizer.decode(second.tokens)  # the history as the model will see it
    assert (first.name, second.name) == ("#1", "#2")


def test_a_prompt_that_no_answer_follows_is_refused() -> None:
    tokenizer = model_of("chatml")
    tokenizer.chat_template = CHATML.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    )
    with pytest.raises(FettleError, match="generation"):
        encode(sample_of(TALK), tokenizer)


def test_reasoning_is_not_dropped_without_a_word() -> None:
    talk = [TALK[0], {**TALK[1], "reasoning_content": "Hm."}]
    with pytest.raises(FettleError, match="reasoning"):
        encode(sample_of(talk), model_of("llama3"))


def test_a_refused_conversation_says_why() -> None:
    (found,) = Encoder(model_of("gemma")).encode([sample_of([SYSTEM, *TALK])])
    assert found == "the template refuses it: System role not supported"


def test_end_of_turn_in_words_is_learned_with_its_space() -> None:
    tokenizer = deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = WORDS_ONLY
    (example,) = encode(sample_of(TALK[2:]), tokenizer)
    assert learned(tokenizer, example) == [" What is the capital of the island?\n\n"]


@pytest.mark.parametrize("name", ["chatml", "chatml-marked"])
def test_learn_last_and_all(name: str) -> None:
    tokenizer = model_of(name)
    (last,) = encode(sample_of(TALK), tokenizer, learn="last")
    (both,) = encode(sample_of(TALK), tokenizer)
    (everything,) = encode(sample_of(TALK), tokenizer, learn="all")
    assert last.spans == both.spans[1:]
    weights = everything.node.weights
    assert weights[0] == 0 and np.all(weights[1:] == 1)


@pytest.mark.parametrize("name", ["chatml", "chatml-marked"])
def test_weights(name: str) -> None:
    tokenizer = model_of(name)
    turns = [dict(m) for m in TALK]
    turns[1]["weight"] = 0
    (example,) = encode(to_sample({"messages": turns, "weight": 0.5}, "messages"), tokenizer)
    assert [w for *_, w in example.spans] == [0.5] and learned(tokenizer, example)[0].startswith("What is the")
    (text,) = encode(to_sample({"text": "bread", "weight": 0}, "text"), tokenizer)
    assert text.spans == () and text.learned == 0
    assert Encoded(text.tokens, ((1, 3, 0.0), (3, 4, 0.5))).learned == 1
    turns[3]["weight"] = 0
    with pytest.raises(BadRow, match="weight 0"):
        to_sample({"messages": turns}, "messages")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_and_completion(kind: str) -> None:
    tokenizer = tokenizer_of("mistral", kind)
    head = [tokenizer.bos_token_id] if kind == "pieces" else []
    body = tokenizer("Yes, no; 你好", add_special_tokens=False)["input_ids"]
    (text,) = encode(Sample(text="Yes, no; 你好"), tokenizer)
    assert text.tokens.tolist() == [*head, *body, tokenizer.eos_token_id]
    assert text.node.weights.tolist() == [0.0] + [1.0] * (len(text.tokens) - 1)
    (pair,) = encode(Sample(prompt="Yes, no; ", completion="你好"), tokenizer)
    assert pair.tokens.tolist() == text.tokens.tolist()
    assert learned(tokenizer, pair)[0].strip().endswith("你好</s>")
    start = pair.spans[0][0]
    assert tokenizer.decode(pair.tokens[len(head) : start]).startswith("Yes, no")


def test_a_template_that_is_no_template_names_its_model() -> None:
    broken = deepcopy(model_of("chatml"))
    broken.chat_template = "{% for message in messages %}{{ message['role'] "
    broken.name_or_path = "some/model"
    for ask in (
        lambda: Encoder(broken).render([{"role": "user", "content": "a"}]),
        lambda: encode(sample_of(TALK), broken),
    ):
        with pytest.raises(FettleError, match=r"^some/model: the chat template is not valid Jinja: line 1"):
            ask()


def test_named_defaults() -> None:
    assert chat_template(tokenizer_of("chatml")).name == "chatml"
    assert chat_template(tokenizer_of("mistral")).name == "plain"
    assert chat_template(model_of("gemma")).name == "tokenizer"
    bare = deepcopy(tokenizer_of("none"))
    bare.eos_token = None
    with pytest.raises(FettleError, match="eos_token"):
        chat_template(bare)


@pytest.mark.parametrize("family", ["chatml", "mistral", "none"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_defaults_learn_answers_and_their_end(family: str, kind: str) -> None:
    tokenizer = deepcopy(tokenizer_of(family, kind))
    for talk in (TALK, [SYSTEM, *TALK]):
        (example,) = encode(sample_of(talk), tokenizer)
        ends = {int(example.tokens[stop - 1]) for _, stop, _ in example.spans}
        assert len(example.spans) == 2 and ends == {tokenizer.eos_token_id}
        assert [t[: -len(tokenizer.eos_token)].strip() for t in learned(tokenizer, example)] == [
            m["content"].strip() for m in TALK[1::2]
        ]
        encoder = Encoder(tokenizer)
        assert encoder.render(talk, prompt=False).startswith(encoder.render(talk[:-1]))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Öl"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALLING = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize("name", ["qwen2", "chatml", "chatml-marked", "gemma", "default"])
def test_tools_are_never_dropped(name: str) -> None:
    tokenizer = deepcopy(tokenizer_of("chatml")) if name == "default" else model_of(name)
    found = Encoder(tokenizer).encode([sample_of(CALLING, tools=(TOOL,))])[0]
    if name == "gemma":  # has no place for functions: the system turn is refused
        assert found == "the template refuses it: System role not supported"
        return
    assert not isinstance(found, str)
    (example,) = found
    text = tokenizer.decode(example.tokens)
    assert '"description": "d"' in text or '"description":"d"' in text
    first, second = learned(tokenizer, example)
    assert '"weather"' in first and "Öl" in first and first.endswith("<|im_end|>") and second == "No.<|im_end|>"
    assert "sun" in text and "sun" not in first + second


def test_qwen_tools_are_those_of_transformers() -> None:
    tokenizer = model_of("qwen2")
    assert tokenizer.chat_template == QWEN2
    for talk in (CALLING, [SYSTEM, *CALLING]):
        (example,) = encode(sample_of(talk, tools=(TOOL,)), tokenizer)
        assert example.tokens.tolist() == tokenizer.apply_chat_template(talk, tools=[TOOL])["input_ids"]


def test_padding_and_truncation_of_the_tokenizer_do_not_apply() -> None:
    tokenizer = model_of("chatml")
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    (example,) = encode(sample_of(TALK), tokenizer)
    assert example.tokens.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
