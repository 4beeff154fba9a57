"""Streams: never half a character, never a part of a stop text, and in sum what decoding at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.generate import Sampling, generate, stream
from fettle.generate.text import BROKEN, TextOut, cut_at
from fettle.models.load import load
from fettle.models.spec import ModelSpec

TEXT = "Yes, 你好世界 🙂 é — the baker's bread."


def test_whole_characters_only(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert any(BROKEN in tokenizer.decode(ids[:n]) for n in range(len(ids)))  # characters do split into tokens here
    out = TextOut(tokenizer)
    pieces = [out.push(token) for token in ids]
    assert not any(BROKEN in piece for piece in pieces)
    assert "".join(pieces) + out.finish() == TEXT


def test_unfinished_character_shows_at_the_end(tokenizer) -> None:
    ids = tokenizer.encode("a🙂")[:-1]
    out = TextOut(tokenizer)
    assert "".join(out.push(t) for t in ids) == "a"
    assert out.finish() == BROKEN


@given(st.text(alphabet="ab🙂", max_size=12), st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=3), max_size=2))
def test_stop_texts_never_show(text: str, stop: list[str]) -> None:
    class Letters:  # one token a byte
        def decode(self, tokens, skip_special_tokens=True):
            return bytes(tokens).decode(errors="replace")

    out = TextOut(Letters(), stop)
    shown = ""
    for byte in text.encode():
        shown += out.push(byte)
        assert cut_at(text, stop).startswith(shown)
    assert shown + out.finish() == cut_at(text, stop)
    assert out.stopped == any(s in text for s in stop)


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_stream_is_generate(tiny_llama, stop) -> None:
    forest = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    prompt = forest.tokenizer.encode("What is the capital?")
    for seed in range(3):
        sampling = Sampling(max_tokens=40, temperature=1.0, seed=seed, stop=stop)
        assert "".join(stream(forest, prompt, sampling)) == generate(forest, [prompt], sampling)[0].text
