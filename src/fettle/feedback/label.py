"""`fettle label`: answers side by side in the terminal, a key a judgement, every label on disk before the next question.

Whoever labels sees neither whose answers they are nor the same order as another labeler, and may stop at any moment: the next call
goes on with what has no label yet.
"""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fettle.core.errors import FettleError
from fettle.core.terminal import shown
from fettle.feedback.answering import BACK, ENTER, Placing, choices, typed
from fettle.feedback.items import Item, Task, read_items, tasks
from fettle.feedback.keys import keyboard
from fettle.feedback.ledger import Ledger
from fettle.feedback.records import Ask, Value

NARROWEST = 36  # columns that an answer needs to be read beside another
Command = Literal["skip", "undo", "quit"]
COMMANDS: dict[str, Command] = {"s": "skip", "u": "undo", "q": "quit"}


@dataclass(frozen=True)
class Given:
    """What a labeler gave: ranks in the order of the item's answers, a value, or a command."""

    ranks: tuple[int, ...] = ()
    value: Value | None = None
    command: Command | None = None


def user_name() -> str:
    """The name of whoever runs this; FettleError where the system has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        raise FettleError("the system has no name for whoever labels; say it with --labeler NAME") from None


def default_output(path: str, labeler: str) -> Path:
    """Beside the items: items.ada.jsonl. FettleError where the labeler's name makes no file's name."""
    if not re.fullmatch(r"[\w.@-]+", labeler):
        raise FettleError(f"labeler '{labeler}': a name has letters, digits and . _ - @ only")
    file = Path(path)
    return file.with_name(f"{file.name.split('.')[0]}.{labeler}.jsonl")


def label(
    path: str, labeler: str, output: Path | None = None, *, seed: int = 0, console: Console | None = None,
    keys: Iterator[str] | None = None,
) -> Path:  # fmt: skip
    """Ask a labeler everything of the items in `path` that has no label yet; returns the file of the labels.

    `seed` decides in which order answers are shown. `keys` stand in for the keyboard.
    """
    console = console or Console(highlight=False)
    output = output or default_output(path, labeler)
    items = read_items(path)
    with Ledger(output, labeler) as ledger:
        ledger.check(items)
        session = Session(items, ledger, console, seed)
        if ledger.repaired:
            session.say = "The last line of the labels was not whole and is removed."
        if keys is not None:
            session.run(keys)
        else:
            with keyboard() as pressed:
                session.run(pressed)
        session.end()
    return output


class Session:
    """One sitting of a labeler."""

    def __init__(self, items: Sequence[Item], ledger: Ledger, console: Console, seed: int) -> None:
        self.ledger, self.console = ledger, console
        self.tasks = tasks(items, ledger.labeler, seed)
        self.items, self.begun = len(items), len(ledger.own)
        self.numbers = {item.prompt_id: i for i, item in enumerate(items, 1)}
        self.done = {(record.prompt_id, record.subject) for record in ledger.own}
        self.say = ""  # a line for the next screen

    def run(self, keys: Iterator[str]) -> None:
        """Ask until all is labelled, the labeler quits, or the keys end."""
        while (task := self._next()) is not None:
            began = time.monotonic()
            given = self._ask(task, keys)
            if given is None or given.command == "quit":
                return
            if given.command == "undo":
                self._undo()
                continue
            seconds = time.monotonic() - began
            record = task.record(
                self.ledger.labeler, datetime.now(UTC), seconds, ranks=given.ranks, value=given.value
            )  # fmt: skip
            self.ledger.append(record)
            self.done.add((record.prompt_id, record.subject))
            self.say = "Skipped." if record.skipped else "Saved."

    def end(self) -> None:
        """Say what there is now and what to do with it."""
        own = self.ledger.own
        left = len([task for task in self.tasks if (task.item.prompt_id, task.subject) not in self.done])
        rest = f"{left:,} to go, with the same command" if left else "nothing is left to label"
        text = f"{len(own):,} labels in {self.ledger.path}, {len(own) - self.begun:,} of them new; {rest}."
        self.console.print(Text(f"\n{text}\nfettle feedback report {self.ledger.path}"), soft_wrap=True)

    def _next(self) -> Task | None:
        return next((task for task in self.tasks if (task.item.prompt_id, task.subject) not in self.done), None)

    def _undo(self) -> None:
        record = self.ledger.undo()
        if record is None:
            self.say = "There is nothing to take back."
            return
        self.done.discard((record.prompt_id, record.subject))
        known = record.prompt_id in self.numbers
        self.say = "Taken back." if known else "Taken back: a label of a prompt that is not among these items."

    def _ask(self, task: Task, keys: Iterator[str]) -> Given | None:
        """The labeler's answer to a task; None where the keys end."""
        single = choices(task)
        if isinstance(task.about, Ask) and single is None:
            return self._type(task, task.about, keys)
        placing = Placing(len(task.shown))
        self._draw(task, placing)
        for key in keys:
            if key in COMMANDS:
                return Given(command=COMMANDS[key])
            if single is not None:
                if key in single:
                    return Given(value=single[key][0])
            elif (after := placing.press(key)) is not None:
                placing = after
                if placing.ranks is not None:
                    place = dict(zip(task.shown, placing.ranks, strict=True))
                    return Given(ranks=tuple(place[i] for i in range(len(task.shown))))
                self._draw(task, placing)
                continue
            if key.isprintable() and self.console.is_terminal:
                self.say = f"'{key}' means nothing here."
                self._draw(task, placing)
        return None

    def _type(self, task: Task, ask: Ask, keys: Iterator[str]) -> Given | None:
        """As `_ask`, by a line that ends with Enter."""
        line = ""
        self._draw(task)
        for key in keys:
            if key in ENTER:
                if line.strip() in (commands := {f"/{name}": name for name in COMMANDS.values()}):
                    return Given(command=commands[line.strip()])
                value, problem = typed(ask, line)
                if value is not None:
                    return Given(value=value)
                line, self.say = "", f"{problem[0].upper()}{problem[1:]}."
                self._draw(task)
                continue
            line = line[:-1] if key in BACK else line + shown(key)
            self._echo(line)
        return None

    def _echo(self, line: str) -> None:
        """What is typed, as far as it fits into a line."""
        if not self.console.is_terminal:
            return
        self.console.file.write(f"\r\x1b[K> {line[-(self.console.width - 4) :]}")
        self.console.file.flush()

    def _draw(self, task: Task, placing: Placing | None = None) -> None:
        """The whole screen of a task."""
        if self.console.is_terminal:
            self.console.clear()
        number = self.numbers[task.item.prompt_id]
        head = f"{self.ledger.labeler}: item {number:,} of {self.items:,}, {len(self.done & self._all()):,} of {len(self.tasks):,} labels"
        self.console.print(Rule(Text(head), align="left", style="dim"))
        self.console.print(screen(task, self.console.width))
        if self.say:
            self.console.print(Text(shown(self.say), style="yellow"))
            self.say = ""
        self.console.print(help_of(task, placing))

    def _all(self) -> set[tuple[str, tuple[str, ...]]]:
        return {(task.item.prompt_id, task.subject) for task in self.tasks}


def screen(task: Task, width: int) -> RenderableType:
    """The prompt, and below it the answers that the task is about."""
    parts: list[RenderableType] = [
        Text.assemble((f"{message['role']}  ", "bold cyan"), shown(str(message["content"])))
        for message in task.item.conversation
    ]
    if task.about is None:
        panels = [_panel(task.item.answers[i].text, str(n)) for n, i in enumerate(task.shown, 1)]
    else:
        panels = [_panel(task.item.answers[task.at].text, "answer")]
    across = max(1, min(len(panels), width // NARROWEST))
    grid = Table.grid(expand=True)
    for _ in range(across):
        grid.add_column(ratio=1)
    for start in range(0, len(panels), across):
        grid.add_row(*panels[start : start + across])
    return Group(*parts, Text(), grid, _asked(task))


def _asked(task: Task) -> Text:
    match task.about:
        case None if len(task.shown) == 2:
            return Text("Which answer is better?", style="bold")
        case None:
            return Text("Rank the answers, the best first.", style="bold")
        case Ask():
            return Text(shown(task.about.ask), style="bold")
        case str():
            return Text.assemble(("Is this rule violated?  ", "dim"), (shown(task.about), "bold"))


def _panel(text: str, title: str) -> Panel:
    return Panel(Text(shown(text)), title=Text(title, style="bold"), title_align="left")


def help_of(task: Task, placing: Placing | None = None) -> Text:
    """What the keys do."""
    found = choices(task)
    rest = "s skip  u undo  q quit"
    if task.about is None:
        many = len(task.shown)
        keys = (
            "1 or 2 the better one  t tie" if many == 2 else f"1-{many} next best  = ties with the last  t the rest tie"
        )
        so_far = f"{placing}" if placing is not None and placing.groups else ""
        return Text.assemble((f"{keys}  {rest}", "dim"), (f"\n{so_far}" if so_far else "", "bold"))
    if found is None:
        assert isinstance(task.about, Ask)
        what = {
            "scale": f"a whole number from {task.about.low} to {task.about.high}",
            "number": "a number",
            "choice": "one of ",
        }
        said = what.get(task.about.type, "an answer") + ", ".join(task.about.options)
        return Text(f"type {said}, then Enter  /skip  /undo  /quit", style="dim")
    if all(not name for _, name in found.values()):
        first, *_, last = found
        return Text(f"{first} (lowest) to {last} (highest)  {rest}", style="dim")
    return Text("  ".join(f"{key} {shown(name)}" for key, (_, name) in found.items()) + f"  {rest}", style="dim")
