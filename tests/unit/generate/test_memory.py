"""A conversation that goes on from what was read before says the same, and computes less."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fettle.generate import Sampling, stream
from fettle.generate.chat import Talk
from fettle.generate.memory import Memory
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from unit.generate.test_sample import KINDS, random_forest

SAYS = ("Count the red stones.", "What is the capital?", "你好，世界。")


def widths(forest: Forest) -> list[int]:
    """How many tokens each pass of the model gets, filled as it goes."""
    found: list[int] = []
    forest.model.register_forward_pre_hook(
        lambda _module, _args, given: found.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return found


def answers(talk: Talk, forget: bool) -> Iterator[str]:
    for text in SAYS:
        if forget:
            talk.memory = Memory()
        yield "".join(talk.answer(text))


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_the_same(kind: str, tokenizer) -> None:
    forest = random_forest(kind, tokenizer)
    passes = widths(forest)
    fresh = list(answers(Talk(forest, "m", Sampling(max_tokens=8)), forget=True))
    whole = [n for n in passes if n > 1]
    passes.clear()
    kept = list(answers(Talk(forest, "m", Sampling(max_tokens=8)), forget=False))
    rest = [n for n in passes if n > 1]
    assert kept == fresh
    assert len(rest) == len(whole) == 3 and rest[0] == whole[0]
    if kind != "gemma3_text":  # its window has slid past the point from which it would have to go on
        for turn in (
            1,
            2,
        ):  # all of the last prompt is known, and what of the answer is written in the same tokens again
            assert rest[turn] <= whole[turn] - whole[turn - 1], (rest, whole)


@pytest.fixture
def forest(tiny_llama) -> Forest:
    made = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    made.model.double()
    return made


def test_only_what_is_new_is_computed(forest: Forest, tokenizer) -> None:
    passes = widths(forest)
    memory, sampling = Memory(), Sampling(max_tokens=4)
    first = tokenizer.encode("The baker sells bread.")
    say = "".join(stream(forest, first, sampling, memory))
    assert passes == [len(first), 1, 1, 1] and len(memory.tokens) == len(first) + 3
    longer = [*memory.tokens, *tokenizer.encode(" And cakes?")]
    passes.clear()
    assert "".join(stream(forest, longer, sampling, memory)) == "".join(stream(forest, longer, sampling))
    assert passes[0] == len(longer) - len(first) - 3
    for prompt, new in ((first, 1), ([*first[:3], 7, 8], 2), ([9, *first], len(first) + 1)):
        memory = Memory()
        list(stream(forest, first, sampling, memory))
        passes.clear()
        assert "".join(stream(forest, prompt, sampling, memory)) == "".join(stream(forest, prompt, sampling))
        assert passes[0] == new
    assert say


def test_an_answer_that_is_broken_off_leaves_no_half_of_a_cache(forest: Forest, tokenizer) -> None:
    memory, sampling = Memory(), Sampling(max_tokens=12)
    prompt = tokenizer.encode("The baker sells bread.")
    left = stream(forest, prompt, sampling, memory)
    next(left)
    left.close()  # between two tokens: what was read is known
    assert memory.tokens[: len(prompt)] == prompt and memory.past.get_seq_length() == len(memory.tokens)
    expected = "".join(stream(forest, prompt, sampling))
    assert "".join(stream(forest, prompt, sampling, memory)) == expected

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = forest.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # between two layers: it is not
        list(stream(forest, [*prompt, 5, 6], sampling, memory))
    hook.remove()
    assert memory.past is None and memory.tokens == []
    assert "".join(stream(forest, prompt, sampling, memory)) == expected


def test_when_the_oldest_turns_are_left_out(forest: Forest) -> None:
    said = []
    for forget in (True, False):
        talk = Talk(forest, "m", Sampling(max_tokens=2))
        talk.messages = [{"role": "system", "content": "Be brief."}]
        for i in range(12):
            talk.memory = Memory() if forget else talk.memory
            said.append("".join(talk.answer(f"{i} " + "bread " * 30)))
    assert any("oldest turns" in answer for answer in said) and said[:12] == said[12:]


def test_states_of_a_recurrence_are_not_gone_on_from(tokenizer) -> None:
    class Past:
        layers = (object(),)

    memory = Memory()
    memory.keep(Past(), [1, 2, 3])
    assert memory.take([1, 2, 3, 4]) == (None, 0)
    assert torch.is_grad_enabled()
