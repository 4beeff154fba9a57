"""What `fettle check` refuses, and the picture of what is learned."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fettle.core.batch import Example, Node
from fettle.data import DataSpec, Encoder, prepare
from fettle.data.inspect import (
    end_never_learned,
    everything_cut,
    nothing_learned,
    pad_hides_end,
    problems,
    serving_differs,
    show,
    split_markers,
    stretches,
    token_texts,
)
from unit.data.makers import LLAMA3, MODELS, model_of, tokenizer_of

UNENDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus_of(folder: Path, tokenizer, rows: list | None = None, length: int = 256, **keys):
    rows = rows or [{"instruction": "What is the capital?", "output": f"The island has {i}."} for i in range(20)]
    (folder / "a.json").write_text(json.dumps(rows))
    return prepare([DataSpec(path=str(folder / "a.json"), **keys)], tokenizer, length)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", [*MODELS, "chatml by default", "plain by default"])
def test_good_set_ups_have_no_problem(tmp_path: Path, name: str, kind: str) -> None:
    family = {"chatml by default": "chatml", "plain by default": "mistral"}.get(name)
    tokenizer = deepcopy(tokenizer_of(family, kind)) if family else model_of(name, kind)
    assert [
        p for p in problems(corpus_of(tmp_path, tokenizer)) if not (name == "qwen3" and "writes answers" in p)
    ] == []
    assert problems(corpus_of(tmp_path, tokenizer, [{"text": "bread"}] * 3)) == []


def test_an_end_of_turn_outside_the_answer(tmp_path: Path) -> None:
    tokenizer = model_of("chatml")
    tokenizer.chat_template = UNENDED
    corpus = corpus_of(tmp_path, tokenizer)
    (problem,) = end_never_learned(corpus.examples(5), corpus.encoder)
    assert "'<|im_end|>' follows answers but is never learned" in problem and problem in problems(corpus)


def test_no_end_at_all(tmp_path: Path) -> None:
    tokenizer = model_of("chatml")
    tokenizer.chat_template = UNENDED.replace("<|im_end|>", "")
    corpus = corpus_of(tmp_path, tokenizer)
    assert "never learn to stop" in end_never_learned(corpus.examples(5), corpus.encoder)[0]
    bare = deepcopy(tokenizer_of("none"))
    bare.eos_token = None
    corpus = corpus_of(tmp_path, bare, [{"text": "bread"}] * 3)
    assert "never learn to stop" in problems(corpus)[0]


def test_padding_that_hides_the_end(tmp_path: Path) -> None:
    tokenizer = model_of("chatml")
    tokenizer.chat_template = UNENDED
    tokenizer.pad_token = tokenizer.eos_token
    corpus = corpus_of(tmp_path, tokenizer)
    assert "both '<|im_end|>'" in pad_hides_end(corpus.examples(5), tokenizer)[0]
    fine = model_of("chatml")
    fine.pad_token = fine.eos_token  # learned all the same, since nothing is masked by its number
    assert problems(corpus_of(tmp_path, fine)) == []


def test_markers_that_split() -> None:
    tokenizer = deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = LLAMA3
    found = split_markers(Encoder(tokenizer))
    assert [p.split("'")[3] for p in found] == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def test_prompts_that_differ_when_served() -> None:
    tokenizer = deepcopy(
        tokenizer_of("llama3", "gpt2")
    )  # splits two line ends before a word, and not at the end of a text
    tokenizer.chat_template = LLAMA3
    assert "other tokens than it was taught" in serving_differs(Encoder(tokenizer))[0]
    assert serving_differs(Encoder(model_of("llama3"))) == []


def test_everything_cut_and_nothing_learned(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "bread " * 90}] * 4
    corpus = corpus_of(tmp_path, model_of("chatml"), rows, length=64, long="truncate")
    assert "every one of its 4 examples was cut to 64 tokens" in everything_cut(corpus)[0]
    assert not nothing_learned(corpus)
    object.__setattr__(corpus.counts[0], "learned", 0)
    assert "is learned" in nothing_learned(corpus)[0]


def test_stretches() -> None:
    weights = np.array([0, 1, 1, 0, 0, 0.5, 1], dtype=np.float32)
    assert stretches(Node(np.arange(7, dtype=np.int32), weights)) == [(1, 3), (5, 7)]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "trimmed"])
def test_pieces_make_up_the_text(kind: str) -> None:
    tokenizer = model_of("chatml", kind)
    text = "<|im_start|>user\nCount 你好 👩‍🚀  red\n\nstones<|im_end|>"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = token_texts(tokens, tokenizer)
    assert "".join(piece for piece, *_ in found) == tokenizer.decode(tokens)
    assert "\ufffd" not in "".join(piece for piece, *_ in found)
    assert [a for _, a, _ in found] == [0, *(b for *_, b in found[:-1])] and found[-1][2] == len(tokens)


def test_show_colours_what_is_learned(tmp_path: Path) -> None:
    tokenizer = model_of("chatml-marked")
    (example,) = corpus_of(tmp_path, tokenizer, [{"instruction": "Count 你", "output": "Yes 🙂"}]).examples(1)
    text = show(example, tokenizer)
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "Yes 🙂<|im_end|>"
    plain = show(example, tokenizer, coloured=False)
    assert not [s for s in plain.spans if "green" in str(s.style)] and plain.plain.endswith(
        "assistant↵\n⟦Y│es│ │🙂│<|im_end|>⟧↵\n"
    )
    half = Example(
        (
            Node(example.nodes[0].tokens, example.nodes[0].weights * 0.5),
            Node(example.nodes[0].tokens, example.nodes[0].weights, 0),
        ),
        "two",
    )
    shown = show(half, tokenizer)
    marked = show(half, tokenizer, coloured=False).plain
    assert "<|im_end|>⟧(0.5)↵" in marked and marked.endswith("<|im_end|>⟧↵\n")
    assert any("gold" in str(s.style) for s in shown.spans) and "segment 1, after segment 0" in shown.plain
    Console(quiet=True).print(shown)
