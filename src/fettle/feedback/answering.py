"""From keys to an answer: an order of answers, a choice among a few, or a line that is typed. Nothing here knows of a terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fettle.feedback.items import Task
from fettle.feedback.records import Ask, Value

BACK, ENTER = ("\x7f", "\b"), ("\n", "\r")


@dataclass(frozen=True)
class Placing:
    """An order on its way: groups of answers that tie, the best first, by their number on the screen from 0.

    A digit places an answer behind those before; `=` ties the next one with the last; `t` ties all that are left. An answer
    that is left alone goes to the end.
    """

    count: int
    groups: tuple[tuple[int, ...], ...] = ()
    joins: bool = False

    @property
    def left(self) -> list[int]:
        """The answers that have no place yet."""
        placed = {i for group in self.groups for i in group}
        return [i for i in range(self.count) if i not in placed]

    def press(self, key: str) -> Placing | None:
        """The order after a key; None where the key means nothing here."""
        if key in BACK:
            return replace(self, groups=self.groups if self.joins else self.groups[:-1], joins=False)
        if key == "t" or key == "=" and not self.groups:
            return replace(self, groups=(*self.groups, tuple(self.left)), joins=False)
        if key == "=":
            return replace(self, joins=True)
        if not (key.isascii() and key.isdigit()) or int(key) - 1 not in self.left:
            return None
        chosen = int(key) - 1
        groups = (
            (*self.groups[:-1], (*self.groups[-1], chosen)) if self.joins else (*self.groups, (chosen,))
        )  # fmt: skip
        placed = Placing(self.count, groups)
        return replace(placed, groups=(*groups, tuple(placed.left))) if len(placed.left) == 1 else placed

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The place of each answer, from 1; None while one has none."""
        if self.left:
            return None
        place = {i: number for number, group in enumerate(self.groups, 1) for i in group}
        return tuple(place[i] for i in range(self.count))

    def __str__(self) -> str:
        said = " > ".join(" = ".join(str(i + 1) for i in group) for group in self.groups)
        return said + (" = " if self.joins else " > " if said and self.left else "")


def choices(task: Task) -> dict[str, tuple[Value, str]] | None:
    """What single keys mean for a question or a rule: key -> (value, how it is shown). None where a line is typed."""
    match task.about:
        case str():
            return {"v": ("violated", "violated"), "n": ("not", "not violated"), "?": ("unsure", "unsure")}
        case Ask(type="yes_no"):
            return {"y": (True, "yes"), "n": (False, "no")}
        case Ask(type="choice", options=options) if len(options) <= 9:
            return {str(i): (option, option) for i, option in enumerate(options, 1)}
        case Ask(type="scale", low=low, high=high) if low >= 0 and high <= 9:
            return {str(i): (i, "") for i in range(low, high + 1)}
    return None


def typed(ask: Ask, line: str) -> tuple[Value | None, str]:
    """The value that a typed line gives, or None and why it gives none."""
    value: Value = line.strip()
    if ask.type in ("scale", "number"):
        try:
            value = int(line) if ask.type == "scale" else float(line)
        except ValueError:
            return None, f"expected a number, found '{line.strip()}'"
    problem = ask.problem(value)
    return (None, problem) if problem else (value, "")
