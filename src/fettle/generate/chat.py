"""A conversation in the terminal: answers as they come; two models answer side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import zip_longest
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fettle.core import FettleError
from fettle.core.terminal import shown as shown
from fettle.generate.memory import Memory
from fettle.generate.prompts import prompter
from fettle.generate.sample import Sampling, stream

if TYPE_CHECKING:
    from fettle.models.forest import Forest

HELP = "/reset forgets the conversation, /system TEXT sets instructions (and forgets), /quit ends"
ROOM = 16  # tokens that an answer needs at least


@dataclass
class Talk:
    """One model and what was said with it."""

    forest: Forest
    name: str
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    asked: int = 0  # questions of the whole session, so that each is answered by random numbers of its own

    def answer(self, text: str) -> Iterator[str]:
        """Say something; yields the answer piece by piece and remembers it. FettleError where it does not fit."""
        self.messages.append({"role": "user", "content": text})
        said, number = "", self.asked
        self.asked += 1
        try:
            prompt, left_out = self._prompt()
            if left_out:
                yield f"[the {left_out} oldest turns no longer fit and are left out] "
            for piece in stream(self.forest, prompt, self.sampling, self.memory, number=number):
                said += piece
                yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def _prompt(self) -> tuple[list[int], int]:
        """The conversation's tokens, without as many of the oldest exchanges as the context asks for, and how many turns those are."""
        bound = self.forest.context
        start = 1 if self.messages[0]["role"] == "system" else 0
        head, rest, left_out = self.messages[:start], self.messages[start:], 0
        while True:
            prompt = prompter(self.forest.tokenizer).chat([*head, *rest])
            if not bound or len(prompt) + ROOM <= bound:
                return prompt, left_out
            if len(rest) <= 2:
                raise FettleError(
                    f"{self.name}: the message has {len(prompt)} tokens, and the model sees {bound} at most; say less"
                )
            rest, left_out = rest[2:], left_out + 2


def chat(
    models: Sequence[Forest],
    names: Sequence[str] = (),
    *,
    system: str = "",
    sampling: Sampling | None = None,
    source: TextIO | None = None,
    console: Console | None = None,
) -> None:
    """Talk to one model, or to several at once, until /quit or the end of the input.

    `source` is where lines come from: the keyboard, or whatever is piped in. FettleError, at the end, where a message that was
    piped in has no answer.
    """
    require_text(system, "the instructions are")
    console = console or Console(highlight=False)
    names = names or [str(m.spec.path) for m in models]
    talks = [Talk(m, name, sampling or Sampling(max_tokens=512)) for m, name in zip(models, names, strict=True)]
    _restart(talks, system)
    if console.is_terminal:
        console.print(Text(f"{' | '.join(names)}: {HELP}", style="dim"))
    source, unanswered = source or sys.stdin, 0
    for line in _lines(source, console):
        try:
            require_text(line, "the line is")
        except FettleError as error:
            console.print(Text(str(error), style="red"), soft_wrap=True)
            unanswered += 1
            continue
        command, _, rest = line.partition(" ")
        match command:
            case "":
                continue
            case "/quit" | "/exit":
                break
            case "/reset":
                _restart(talks, system)
                console.print(Text("forgotten", style="dim"))
            case "/system":
                system = rest.strip()
                _restart(talks, system)
                console.print(Text(f"instructions: {shown(system) or 'none'}", style="dim"))
            case _ if command.startswith("/"):
                console.print(Text(HELP, style="dim"))
            case _:
                unanswered += not _exchange(talks, line, console)
    if unanswered and not source.isatty():
        raise FettleError(
            f"{unanswered} of the messages {'has' if unanswered == 1 else 'have'} no answer, as said above"
        )


def require_text(text: str, what: str) -> None:
    """FettleError where bytes that are no UTF-8 came with a text."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FettleError(f"{what} no UTF-8 text")


def _restart(talks: Sequence[Talk], system: str) -> None:
    for talk in talks:
        talk.messages = [{"role": "system", "content": system}] if system else []


def _exchange(talks: Sequence[Talk], line: str, console: Console) -> bool:
    """One message and what is said to it; whether there is an answer."""
    try:
        if len(talks) == 1:
            _one(talks[0], line, console)
        elif console.is_terminal:
            _beside(talks, line, console)
        else:
            for talk in talks:
                console.print(Text(f"{talk.name}: ", style="bold"), end="")
                _one(talk, line, console)
    except KeyboardInterrupt:  # stops the answer, not the conversation
        console.print(Text("\n(stopped)", style="dim"))
    except FettleError as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)
        return False
    return True


def _one(talk: Talk, line: str, console: Console) -> None:
    for piece in talk.answer(line):
        console.print(Text(shown(piece)), end="", soft_wrap=True)
        console.file.flush()
    console.print("\n" if console.is_terminal else "")


def _beside(talks: Sequence[Talk], line: str, console: Console) -> None:
    texts = ["" for _ in talks]

    def columns() -> Table:
        table = Table(expand=True, show_edge=False, pad_edge=False)
        for talk in talks:
            table.add_column(Text(talk.name), ratio=1, overflow="fold")
        table.add_row(*(Text(t) for t in texts))
        return table

    with Live(columns(), console=console, refresh_per_second=12, vertical_overflow="visible") as live:
        for pieces in zip_longest(*(talk.answer(line) for talk in talks), fillvalue=""):
            texts = [text + shown(piece) for text, piece in zip(texts, pieces, strict=True)]
            live.update(columns())
    console.print()


def _lines(source: TextIO, console: Console) -> Iterator[str]:
    """Lines as they are typed, or as they come through a pipe; ends with the input."""
    if isinstance(source, TextIOWrapper):
        source.reconfigure(encoding="utf-8", errors="surrogateescape")
    if source is sys.stdin and sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its history and editing)

        while True:
            try:
                yield input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return
    for line in source:
        if not console.is_terminal and line.strip():
            console.print(Text(f"> {shown(line.strip())}"), soft_wrap=True)
        yield line.strip()
