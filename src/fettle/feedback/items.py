"""What a labeler is asked: a file of items, and the questions that each of them comes to.

    {"prompt": "...", "answers": ["...", {"text": "...", "source": "model-b"}]}                      a ranking
    {"messages": [...], "answers": ["..."], "questions": ["Is it helpful?"], "rules": ["No insults."]}

Questions and rules are asked of every answer, then the answers are ranked where there are two or more. `id` names the prompt;
where it is left out, the prompt's digest does.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import Field, model_validator

from fettle.core.errors import FettleError
from fettle.data.read import read
from fettle.feedback.records import (
    Answer,
    Ask,
    Prompted,
    Question,
    Ranking,
    Record,
    Value,
    Verdict,
    parsed,
    raise_problems,
    twice,
)

MOST = 9  # answers that can be ranked with a digit each


class Item(Prompted):
    """A row of the file that is to be labelled."""

    id: str = ""
    answers: tuple[Answer, ...] = Field(min_length=1)
    questions: tuple[Ask, ...] = ()
    rules: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _to_label(self) -> Item:
        if (twins := twice([a.text for a in self.answers])) is not None:
            raise ValueError(f"answers {twins[0] + 1} and {twins[1] + 1} are the same text; leave one out")
        if len(self.answers) > MOST:
            raise ValueError(f"{len(self.answers)} answers; at most {MOST} can be ranked at a time")
        if len(self.answers) == 1 and not self.questions and not self.rules:
            raise ValueError("one answer cannot be ranked; give two or more, or 'questions' or 'rules' to ask of it")
        for key, texts in (("questions", [q.ask for q in self.questions]), ("rules", list(self.rules))):
            if (twins := twice(texts)) is not None:
                raise ValueError(f"'{key}' {twins[0] + 1} and {twins[1] + 1} are the same")
            if not all(text.strip() for text in texts):
                raise ValueError(f"'{key}' holds an empty text")
        return self

    @property
    def prompt_id(self) -> str:
        """The item's id, or the prompt's digest."""
        return self.id or self.digest


def read_items(path: str) -> list[Item]:
    """The items of a file, in order; FettleError names every row that cannot be used, by line."""
    items: list[Item] = []
    problems: list[str] = []
    ids: dict[str, str] = {}
    for row in read(path):
        if row.value is None:
            problems.append(f"{row.where}: {row.problem}")
            continue
        try:
            item = parsed(Item, _opened(row.value), row.where)
        except FettleError as error:
            problems.append(str(error))
            continue
        assert isinstance(item, Item)
        if (before := ids.setdefault(item.prompt_id, row.where)) != row.where:
            what = f"the id '{item.id}'" if item.id else "the prompt"
            problems.append(f"{row.where}: {what} stands in {before} already; give each item an id of its own")
        items.append(item)
    raise_problems(problems, [path])
    if not items:
        raise FettleError(f"{path}: no items; each row has a 'prompt' (or 'messages') and 'answers'")
    return items


def _opened(row: dict[str, Any]) -> dict[str, Any]:
    """The row with answers and questions that are plain texts as the objects they stand for."""
    opened = dict(row)
    for key, plain in (("answers", "text"), ("questions", "ask")):
        if isinstance(row.get(key), list):
            opened[key] = [{plain: one} if isinstance(one, str) else one for one in row[key]]
    return opened


@dataclass(frozen=True)
class Task:
    """One thing to ask: how answer `at` fares with `about` (a question or a rule), or the order of all answers."""

    item: Item
    at: int = -1
    about: Ask | str | None = None
    shown: tuple[int, ...] = ()  # a ranking's answers in the order in which they are shown

    @property
    def subject(self) -> tuple[str, ...]:
        """As `Record.subject` of the record that answers it."""
        match self.about:
            case None:
                return ("ranking", *sorted(a.text for a in self.item.answers))
            case Ask():
                return ("question", self.item.answers[self.at].text, self.about.ask)
            case str():
                return ("rule", self.item.answers[self.at].text, self.about)

    def record(
        self, labeler: str, time: datetime, seconds: float, *, ranks: Sequence[int] = (), value: Value | None = None
    ) -> Record:
        """The labeler's answer as a record: `ranks` in the order of the item's answers, or a value or verdict; neither skips."""
        item = self.item
        given: dict[str, Any] = {
            "prompt": item.prompt, "messages": item.messages, "prompt_id": item.prompt_id, "labeler": labeler,
            "time": time, "seconds": round(seconds, 1), "skipped": not ranks and value is None,
        }  # fmt: skip
        match self.about:
            case None:
                return Ranking(**given, answers=item.answers, ranks=tuple(ranks), shown=self.shown)
            case Ask():
                return Question(**given, answer=item.answers[self.at], question=self.about, value=value)
            case str():
                return Verdict(**given, answer=item.answers[self.at], rule=self.about, verdict=value)


def tasks(items: Sequence[Item], labeler: str, seed: int = 0) -> list[Task]:
    """Everything that a labeler is asked, in order. The order of an item's answers is the labeler's own."""
    found = []
    for item in items:
        shown = order(len(item.answers), seed, labeler, item.prompt_id)
        about: list[Ask | str] = [*item.questions, *item.rules]
        found += [Task(item, at, each) for at in shown for each in about]
        found += [Task(item, shown=shown)] if len(item.answers) > 1 else []
    return found


def order(count: int, seed: int, labeler: str, prompt_id: str) -> tuple[int, ...]:
    """A permutation of 0 to `count` - 1 that depends on (seed, labeler, prompt) alone, so that neither place nor order tells."""
    key = hashlib.sha256("\0".join((str(seed), labeler, prompt_id)).encode()).digest()
    places = list(range(count))
    random.Random(key).shuffle(places)
    return tuple(places)
