"""The public demonstration sets, where they are at hand: ../shared/data, or the folder that FETTLE_TEST_DATA names."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

import pytest

from fettle.core import FettleError
from fettle.data import DataSpec, prepare
from fettle.data.inspect import problems
from unit.data.makers import model_of, tokenizer_of

FOLDER = Path(os.environ.get("FETTLE_TEST_DATA") or Path(__file__).parents[3] / ".." / "shared" / "data")


def real(name: str) -> str:
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in {FOLDER}; set FETTLE_TEST_DATA to the folder that has it")
    return str(FOLDER / name)


SETS = [
    ("alpaca_en_demo.json", "alpaca", 999), ("alpaca_zh_demo.json", "alpaca", 1000), ("identity.json", "alpaca", 91),
    ("glaive_toolcall_en_demo.json", "sharegpt", 300), ("c4_demo.jsonl", "text", 300), ("wiki_demo.txt", "text", 30),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format", "rows"), SETS)
def test_every_row_is_read(name: str, format: str, rows: int) -> None:
    corpus = prepare([DataSpec(path=real(name))], model_of("chatml-marked"), 16384)
    (counts,) = corpus.counts
    assert (counts.read, counts.kept, counts.set_aside, counts.format) == (rows, rows, 0, format)
    assert problems(corpus) == []


def test_alpaca_fills_its_rows() -> None:
    corpus = prepare([DataSpec(path=real("alpaca_en_demo.json"), long="truncate")], model_of("llama3"), 2048)
    assert min(corpus.fill(epoch) for epoch in range(3)) > 0.97
    assert corpus.counts[0].kept == 999


@pytest.mark.parametrize("name", ["qwen2", "default", "llama3"])
def test_function_calls(name: str) -> None:
    tokenizer = deepcopy(tokenizer_of("chatml")) if name == "default" else model_of(name)
    corpus = prepare([DataSpec(path=real("glaive_toolcall_en_demo.json"))], tokenizer, 16384)
    assert corpus.counts[0].kept == 300
    for example in corpus.examples(50):
        text = tokenizer.decode(example.nodes[0].tokens)
        assert text.count("<tool_call>") == text.count("</tool_call>")
    assert any("written as text" in note for note in corpus.notes) == (name == "llama3")


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "kto_en_demo.json"])
def test_preferences_are_not_taken_for_conversations(name: str) -> None:
    with pytest.raises(FettleError, match="human preferences"):
        prepare([DataSpec(path=real(name))], model_of("chatml"), 2048)


def test_instructions_with_some_text() -> None:
    specs = [DataSpec(path=real("alpaca_en_demo.json"), weight=0.9), DataSpec(path=real("wiki_demo.txt"), weight=0.1)]
    corpus = prepare(specs, model_of("chatml"), 2048)
    shares = [c.per_epoch / sum(c.per_epoch for c in corpus.counts) for c in corpus.counts]
    assert shares == pytest.approx([0.9, 0.1], abs=0.001) and corpus.fill(0) > 0.97
