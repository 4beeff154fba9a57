"""The conversation: turns, commands, piped input, two models, a full context, hostile output."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.generate import chat as module
from fettle.generate.chat import Talk, chat, shown
from fettle.generate.sample import Sampling
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec


@pytest.fixture
def forest(tiny_llama) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32"))


USUAL = Sampling(max_tokens=6)


def talk(
    forests, text: str | bytes, terminal: bool = False, refused: str = "", sampling: Sampling = USUAL, **more
) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None, highlight=False)
    source = io.StringIO(text) if isinstance(text, str) else io.TextIOWrapper(io.BytesIO(text))
    with pytest.raises(FettleError, match=refused) if refused else nullcontext():
        chat(forests, console=console, source=source, sampling=sampling, **more)
    return out.getvalue()


def test_turns_and_commands(forest: Forest, monkeypatch) -> None:
    asked: list[list[dict[str, str]]] = []

    def scripted(_forest, prompt, _sampling, _memory, number):
        asked.append(prompt)
        yield from ("ans", "wer")

    class Render:
        def chat(self, messages):
            return [dict(m) for m in messages]

    monkeypatch.setattr(module, "stream", scripted)
    monkeypatch.setattr(module, "prompter", lambda _tokenizer: Render())
    out = talk([forest], "one\n\ntwo\n/reset\nthree\n/system Be brief.\nfour\n/what\n/quit\nfive\n", names=["m"])
    roles = [[m["role"] for m in messages] for messages in asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"], ["system", "user"]]
    assert asked[1][1]["content"] == "answer" and asked[3][0]["content"] == "Be brief."
    assert (
        "> one\nanswer\n" in out and "forgotten" in out and "instructions: Be brief." in out and "/reset forgets" in out
    )
    assert "five" not in out


def test_a_real_model_answers(forest: Forest) -> None:
    out = talk([forest], "What is the capital?\n")
    assert out.startswith("> What is the capital?\n") and out.strip() != "> What is the capital?"


def test_every_answer_of_a_session_draws_anew_and_a_session_is_repeated_by_its_seed(forest: Forest) -> None:
    def answers(seed: int) -> list[str]:
        sampling = Sampling(max_tokens=20, temperature=1.0, seed=seed)
        out = talk([forest], "Go on.\n/reset\n" * 3, sampling=sampling)
        return [part.split("\n> ")[0] for part in out.split("> Go on.\n")[1:]]

    first = answers(0)
    assert len(set(first)) == 3 and answers(0) == first and not set(answers(1)) & set(first)


@pytest.mark.parametrize("terminal", [False, True])
def test_two_models(forest: Forest, terminal: bool) -> None:
    out = talk([forest, forest], "Hello\n", terminal, names=["base", "tuned"])
    assert "base" in out and "tuned" in out


def test_the_oldest_turns_go_first(forest: Forest) -> None:
    long = Talk(forest, "m", Sampling(max_tokens=2))
    long.messages = [{"role": "system", "content": "Be brief."}]
    for i in range(12):
        long.messages += [{"role": "user", "content": f"{i} " + "bread " * 30}, {"role": "assistant", "content": "ok"}]
    said = "".join(long.answer("now"))
    assert said.startswith("[the ") and "oldest turns" in said
    prompt, left = long._prompt()
    assert left > 0 and len(prompt) < 512
    assert "Be brief." in forest.tokenizer.decode(prompt)


def test_a_message_over_the_context_is_refused_and_forgotten(forest: Forest) -> None:
    out = talk([forest], "bread " * 600 + "\nHello\n", refused="^1 of the messages has no answer")
    assert "sees 512 at most; say less" in out.replace("\n", " ")
    assert "> Hello" in out


def test_bytes_that_are_no_text_are_refused_and_the_rest_is_answered(forest: Forest) -> None:
    out = talk([forest], "你 ".encode() + b"\xff\nHello\n\xfe\n", refused="^2 of the messages have no answer")
    assert out.count("the line is no UTF-8 text") == 2 and "> 你" in out
    assert len(out.split("> Hello\n")[1].splitlines()[0].strip()) > 0


def test_instructions_that_are_no_text_are_refused(forest: Forest) -> None:
    out = talk([forest], b"/system \xff\nHello\n/quit\n", refused="^1 of the messages has no answer")
    assert "the line is no UTF-8 text" in out and "> Hello" in out
    talk([forest], "Hello\n", system="a\udcff", refused="^the instructions are no UTF-8 text")


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert shown("a\x1b[2Jb\x07\r\u202ec\n\t你　🙂\x9b") == "a[2Jbc\n\t你　🙂"
