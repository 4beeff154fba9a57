"""What people said of answers: records of three kinds, one JSON object a line.

    {"kind": "ranking",  ..., "answers": [{"text": "..."}, {"text": "..."}], "ranks": [2, 1]}           1 is the best, equals tie
    {"kind": "question", ..., "answer": {"text": "..."}, "question": {"ask": "Is it helpful?"}, "value": true}
    {"kind": "rule",     ..., "answer": {"text": "..."}, "rule": "No insults.", "verdict": "violated"}   or "not", or "unsure"

Each begins with `prompt_id`, `prompt` (a text) or `messages` (a conversation up to the answer), `labeler` and `time`. A record
that a labeler passed over says `"skipped": true` in place of its ranks, value or verdict.

Rankings of K answers as in InstructGPT (arXiv 2203.02155), rules as in Sparrow (arXiv 2209.14375).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import AwareDatetime, Field, ValidationError, model_validator

from fettle.core.config import validate
from fettle.core.errors import FettleError
from fettle.core.spec import Spec, concrete, nearest
from fettle.data.read import read

SHOWN = 10  # malformed rows named in one error
VERDICTS = ("not", "unsure", "violated")  # of a rule, from good to bad
Value = bool | int | float | str
Conversation = Sequence[dict[str, Any]]  # messages, {"role": ..., "content": ...}


class Message(Spec):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Answer(Spec):
    """What was said, and by whom: `source` is the model's name, for ratings."""

    text: str
    source: str = ""

    @model_validator(mode="after")
    def _says_something(self) -> Answer:
        if not self.text.strip():
            raise ValueError("the text is empty")
        return self


class Prompted(Spec):
    """What is answered: a `prompt`, or the `messages` of a conversation up to the answer."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None

    @model_validator(mode="after")
    def _asked(self) -> Prompted:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected one of 'prompt' and 'messages'")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("'prompt' is empty")
        if self.messages is not None and (not self.messages or self.messages[-1].role == "assistant"):
            raise ValueError("'messages' must end with what is to be answered, not with an answer")
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """The prompt under its own key, as rows of preference data have it."""
        if self.messages is None:
            return {"prompt": self.prompt}
        return {"messages": [message.model_dump() for message in self.messages]}

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The prompt as messages."""
        return self.asked.get("messages") or [{"role": "user", "content": self.prompt}]

    @property
    def digest(self) -> str:
        """What the prompt is called where it has no id: 16 hex digits of its SHA-256."""
        return hashlib.sha256(orjson.dumps(self.conversation, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


class Ask(Spec):
    """A question with a typed answer: yes or no, one of `options`, a scale from `low` to `high`, a number, or a text."""

    ask: str = Field(min_length=1)
    type: Literal["yes_no", "choice", "scale", "number", "text"] = "yes_no"
    options: tuple[str, ...] = ()
    low: int = 1
    high: int = 7

    @model_validator(mode="after")
    def _possible(self) -> Ask:
        if (self.type == "choice") != bool(self.options) or len(set(self.options)) < len(self.options):
            raise ValueError("'options' are two different texts or more, and belong to type: choice")
        if self.type == "choice" and len(self.options) < 2:
            raise ValueError(f"type: choice has {len(self.options)} option, which leaves no choice")
        if self.low >= self.high:
            raise ValueError(f"a scale from {self.low} to {self.high} has no two values")
        return self

    def problem(self, value: Value) -> str | None:
        """Why `value` is no answer to this question; None where it is one."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        match self.type:
            case "yes_no" if not isinstance(value, bool):
                return f"expected true or false, found {value!r}"
            case "choice" if value not in self.options or not isinstance(value, str):
                return f"'{value}' is none of the options: {nearest(str(value), self.options)}"
            case "scale" if not number or not isinstance(value, int) or not self.low <= value <= self.high:
                return f"expected a whole number from {self.low} to {self.high}, found {value!r}"
            case "number" if not number or not math.isfinite(value):  # type: ignore[arg-type]
                return f"expected a finite number, found {value!r}"
            case "text" if not isinstance(value, str) or not value.strip():
                return f"expected a text, found {value!r}"
        return None


class Record(Prompted):
    """One label. `seconds` is how long the labeler took."""

    prompt_id: str = Field(min_length=1)
    labeler: str = Field(min_length=1)
    time: AwareDatetime
    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    skipped: bool = False

    @property
    def subject(self) -> tuple[str, ...]:
        """What of the prompt was labelled: no labeler labels one thing twice."""
        raise NotImplementedError(f"{type(self).__name__}.subject")

    def to_line(self) -> bytes:
        """As a line of a file."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return orjson.dumps({"kind": self.kind, **fields}, option=orjson.OPT_APPEND_NEWLINE)  # type: ignore[attr-defined]


class Ranking(Record):
    """An order of K answers: `ranks[i]` is the place of answer i, from 1, the same for answers that tie.

    `shown` lists the answers in the order in which the labeler saw them.
    """

    kind: Literal["ranking"] = "ranking"
    answers: tuple[Answer, ...] = Field(min_length=2)
    ranks: tuple[int, ...] = ()
    shown: tuple[int, ...] = ()

    @property
    def subject(self) -> tuple[str, ...]:
        """The answers, whatever their order."""
        return ("ranking", *sorted(a.text for a in self.answers))

    @model_validator(mode="after")
    def _ranked(self) -> Ranking:
        many = len(self.answers)
        if (twins := twice([a.text for a in self.answers])) is not None:
            raise ValueError(f"answers {twins[0] + 1} and {twins[1] + 1} are the same text")
        if self.skipped == bool(self.ranks):
            raise ValueError("expected 'ranks', or skipped: true without them")
        if not self.skipped and (len(self.ranks) != many or min(self.ranks) != 1 or max(self.ranks) > many):
            raise ValueError(f"'ranks' are {many} places from 1 to {many}, one an answer; found {list(self.ranks)}")
        if self.shown and sorted(self.shown) != list(range(many)):
            raise ValueError(f"'shown' must list the answers 0 to {many - 1} once each, found {list(self.shown)}")
        return self


class Question(Record):
    """The answer to a question about an answer."""

    kind: Literal["question"] = "question"
    answer: Answer
    question: Ask
    value: Value | None = None

    @property
    def subject(self) -> tuple[str, ...]:
        """The answer and the question."""
        return ("question", self.answer.text, self.question.ask)

    @model_validator(mode="after")
    def _answered(self) -> Question:
        if self.skipped == (self.value is not None):
            raise ValueError("expected a 'value', or skipped: true without one")
        if self.value is not None and (problem := self.question.problem(self.value)):
            raise ValueError(f"'value': {problem}")
        return self


class Verdict(Record):
    """Whether an answer violates a rule."""

    kind: Literal["rule"] = "rule"
    answer: Answer
    rule: str = Field(min_length=1)
    verdict: Literal["violated", "not", "unsure"] | None = None

    @property
    def subject(self) -> tuple[str, ...]:
        """The answer and the rule."""
        return ("rule", self.answer.text, self.rule)

    @model_validator(mode="after")
    def _judged(self) -> Verdict:
        if self.skipped == (self.verdict is not None):
            raise ValueError("expected a 'verdict', or skipped: true without one")
        return self


KINDS = concrete(Record)


def twice(texts: Sequence[str]) -> tuple[int, int] | None:
    """The places of two texts that are the same."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        if first.setdefault(text, i) != i:
            return first[text], i
    return None


def to_record(row: dict[str, Any], where: str) -> Record:
    """A row as a record; FettleError says everything that is wrong with it."""
    kind = row.get("kind")
    if kind not in KINDS:
        what = f"unknown kind '{kind}'" if kind else "the key 'kind' is missing"
        raise FettleError(f"{where}: {what}: {nearest(str(kind or ''), KINDS)}")
    return parsed(KINDS[kind], row, where)  # type: ignore[return-value]


def parsed(kind: type[Spec], row: dict[str, Any], where: str) -> Spec:
    """A row as a `kind`, strictly; FettleError with a sentence for each problem."""
    try:
        return kind.model_validate_json(orjson.dumps(row), strict=True)
    except (ValidationError, orjson.JSONEncodeError):
        return validate(kind, row, where)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used, and why: 'file:line: ...'."""

    where: str
    said: str


def scan(paths: Iterable[str]) -> Iterator[tuple[str, Record] | Problem]:
    """Every row of files or folders: (where, record), or its problem."""
    labelled: dict[tuple[str, str, tuple[str, ...]], str] = {}
    asked: dict[str, tuple[str, str]] = {}
    for path in paths:
        for row in read(path):
            if row.value is None:
                yield Problem(row.where, f"{row.where}: {row.problem}")
                continue
            try:
                record = to_record(row.value, row.where)
            except FettleError as error:
                yield Problem(row.where, str(error))
                continue
            key = (record.labeler, record.prompt_id, record.subject)
            digest, first = asked.setdefault(record.prompt_id, (record.digest, row.where))
            if digest != record.digest:
                said = f"prompt_id '{record.prompt_id}' stands for another prompt in {first}"
            elif (before := labelled.setdefault(key, row.where)) != row.where:
                said = f"'{record.labeler}' has labelled the same in {before}; keep one of the two"
            else:
                yield row.where, record
                continue
            yield Problem(row.where, f"{row.where}: {said}")


def read_records(paths: Iterable[str], without: Sequence[str] = ()) -> list[Record]:
    """The records of files or folders, in order, but for labelers that are left out.

    FettleError names the rows that cannot be used, by line.
    """
    paths = list(paths)
    found: list[Record] = []
    problems: list[str] = []
    for row in scan(paths):
        if isinstance(row, Problem):
            problems.append(row.said)
        else:
            found.append(row[1])
    raise_problems(problems, paths)
    labelers = {record.labeler for record in found}
    if unknown := next((name for name in without if name not in labelers), None):
        raise FettleError(f"{', '.join(paths)}: no record is by the labeler '{unknown}': {nearest(unknown, labelers)}")
    kept = [record for record in found if record.labeler not in without]
    if not kept:
        raise FettleError(
            f"{', '.join(paths)}: no records{' are left' if found else '; fettle label FILE writes them'}"
        )
    return kept


def raise_problems(problems: Sequence[str], paths: Sequence[str]) -> None:
    """FettleError that names the first malformed rows and counts the rest; nothing where there are none."""
    if not problems:
        return
    more = len(problems) - SHOWN
    rest = [f"{', '.join(paths)}: and {more} rows more that cannot be used"] if more > 0 else []
    raise FettleError("\n".join([*problems[:SHOWN], *rest]))
