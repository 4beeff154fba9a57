"""Task files: JSONL, one question a row.

    {"messages": [...], "answer": "Paris", "metric": "exact"}            an answer is generated and scored
    {"prompt": "2 + 2 =", "answer": ["4", "four"], "metric": "contains"}
    {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}  the likelier choice is the model's answer

`metric` is exact, contains, regex, number or rouge; `family` and `cluster` group the scores; `id` and `meta` are kept out of the way.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from pydantic import Field

from fettle.core import FettleError
from fettle.core.families import Task
from fettle.core.spec import nearest
from fettle.data.read import place
from fettle.evaluate.metrics import METRICS, best, last_number

KEYS = {"messages", "prompt", "answer", "choices", "metric", "family", "cluster", "id", "meta"}
T = TypeVar("T")
SHOWN = 10  # malformed rows named in one error


@dataclass(frozen=True)
class Item:
    """One question. Either `messages` or `prompt`; either `answers` or `choices` with the index of the `right` one."""

    where: str  # file:line
    messages: tuple[dict[str, Any], ...]
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    right: int = -1
    metric: str = "exact"
    family: str = ""
    cluster: str = ""

    @property
    def question(self) -> str:
        """What is asked, as text: the last message, or the prompt."""
        return str(self.messages[-1]["content"]) if self.messages else self.prompt

    @property
    def solution(self) -> str:
        """The right answer as text, as a demonstration shows it."""
        return self.choices[self.right] if self.choices else self.answers[0]


class Evaluation(Task):
    """Something that `evaluate:` lists."""

    path: str
    limit: int | None = Field(None, ge=1, description="take this many rows, drawn by the seed")
    seed: int = Field(
        0, ge=0, description="picks demonstrations, the rows of a limit, sampling, and the intervals' resamples"
    )


def names_of(specs: Sequence[Evaluation]) -> list[str]:
    """What to call each of several evaluations: as much of the end of its path as no other path ends in, and where several
    are of one path, the settings in which these differ."""
    paths = [Path(os.path.abspath(spec.path)) for spec in specs]
    settings = [spec.model_dump(exclude={"path"}) for spec in specs]
    ends = Counter(end for path in set(paths) for end in _ends(path))
    alike = defaultdict(list)
    for path, own in zip(paths, settings, strict=True):
        alike[path].append(own)
    shortest = {path: str(Path(*next(end for end in _ends(path) if ends[end] == 1))) for path in alike}
    differing = {path: _differing(group) for path, group in alike.items()}
    return [
        ", ".join([shortest[path], *(f"{key} {value}" for key, value in own.items() if key in differing[path])])
        for path, own in zip(paths, settings, strict=True)
    ]


def _ends(path: Path) -> list[tuple[str, ...]]:
    """The ends of a path, the shortest first."""
    return [path.parts[-n:] for n in range(1, len(path.parts) + 1)]


def _differing(settings: Sequence[dict[str, Any]]) -> set[str]:
    """The keys whose values are not the same in all settings that have them."""
    first: dict[str, Any] = {}
    return {key for own in settings for key, value in own.items() if first.setdefault(key, value) != value}


class TaskFile(Evaluation):
    """Questions from a JSONL file."""

    kind: Literal["task"] = "task"
    shots: int = Field(0, ge=0, description="solved examples shown before each question")
    demonstrations: str | None = Field(
        None, description="task file of the shown examples; other rows of the same family if left out"
    )
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    stop: tuple[str, ...] = Field((), description="texts that end an answer")

    def examples(self) -> list[Item]:
        """The questions, in the order of the file. FettleError names every malformed row."""
        return sampled(read_tasks(Path(self.path)), self.limit, self.seed)

    def score(self, example: Item, completion: str) -> float:
        """The score of an answer, in [0, 1]."""
        return best(example.metric, completion, example.answers)

    def shown(self, items: Sequence[Item]) -> list[list[Item]]:
        """For each question the examples shown before it: drawn by (seed, line) from its family, never itself."""
        if not self.shots:
            return [[] for _ in items]
        pool = read_tasks(Path(self.demonstrations)) if self.demonstrations else read_tasks(Path(self.path))
        return [self._draw(item, pool) for item in items]

    def _draw(self, item: Item, pool: Sequence[Item]) -> list[Item]:
        asked = (item.messages, item.prompt)
        kin = [p for p in pool if p.family == item.family and bool(p.messages) == bool(item.messages)]
        kin = [
            p for p in kin if (p.messages, p.prompt) != asked and p.metric != "regex"
        ]  # a pattern is no answer to show
        if len(kin) < self.shots:
            raise FettleError(
                f"{item.where}: shots is {self.shots} but the family '{item.family}' has {len(kin)} other rows to show; lower shots"
            )
        rng = np.random.default_rng([self.seed, place(item.where)[1]])
        return [kin[i] for i in rng.choice(len(kin), self.shots, replace=False)]


def sampled(items: list[T], limit: int | None, seed: int) -> list[T]:
    """`limit` of the items, drawn by the seed, in their order."""
    if limit is None or limit >= len(items):
        return items
    return [items[i] for i in sorted(np.random.default_rng(seed).choice(len(items), limit, replace=False))]


def read_tasks(path: Path) -> list[Item]:
    """Every row of a task file; FettleError names those that are malformed, by line."""
    items, problems = [], []
    for line, text in _lines(path):
        try:
            items.append(to_item(orjson.loads(text), f"{path}:{line}"))
        except orjson.JSONDecodeError as error:
            problems.append(f"{path}:{line}: not valid JSON ({error})")
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    raise_problems(path, problems, "malformed rows more")
    if not items:
        raise FettleError(f"{path}: no rows; a task file has one JSON object a line")
    return items


def raise_problems(path: Path | str, problems: Sequence[str], rest: str) -> None:
    """FettleError with the first problems of a file's rows and how many more there are, `rest` calling them; nothing without any."""
    more = [f"{path}: and {len(problems) - SHOWN} {rest}"] if len(problems) > SHOWN else []
    if problems:
        raise FettleError("\n".join([*problems[:SHOWN], *more]))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as handle:
            for line, text in enumerate(handle, 1):
                if text := text.removeprefix(b"\xef\xbb\xbf").strip():
                    yield line, text
    except FileNotFoundError:
        raise FettleError(f"{path}: no such task file") from None
    except OSError as error:
        raise FettleError(f"{path}: cannot be read ({error.strerror})") from None


def to_item(row: Any, where: str) -> Item:
    """A row as an Item; ValueError tells what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    for key in row:
        if key not in KEYS:
            raise ValueError(f"unknown key '{key}': {nearest(key, KEYS)}")
    if ("messages" in row) == ("prompt" in row):
        raise ValueError("expected one of 'messages' and 'prompt'")
    messages = _messages(row["messages"]) if "messages" in row else ()
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str) or not messages and not prompt:
        raise ValueError("'prompt' is not a text, or is empty")
    for key in ("metric", "family", "cluster"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"'{key}' is not a text")
    family, cluster = row.get("family", ""), row.get("cluster", "")
    if "choices" in row:
        choices, right = _choices(row)
        return Item(where, messages, prompt, (), choices, right, "choice", family, cluster)
    answers, metric = _answers(row)
    return Item(where, messages, prompt, answers, metric=metric, family=family, cluster=cluster)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("'messages' is not a list of messages, or is empty")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{i}] has no text 'content'")
        if message.get("role") not in (roles := ("system", "user", "assistant", "tool")):
            raise ValueError(
                f"messages[{i}] has role '{message.get('role')}': {nearest(str(message.get('role')), roles)}"
            )
    if value[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's; put it into 'answer'")
    return tuple(value)


def _choices(row: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, right = row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("'choices' is not a list of two texts or more")
    if len(set(choices)) < len(choices):
        raise ValueError("two of the choices are the same")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise ValueError(f"'answer' is {right!r}; expected the index of a choice, 0 to {len(choices) - 1}")
    if row.get("metric", "choice") != "choice":
        raise ValueError("'metric' belongs to generated answers; a row with choices is scored by likelihood")
    return tuple(choices), right


def _answers(row: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    answer, metric = row.get("answer"), row.get("metric", "exact")
    answers: list[Any] = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("'answer' is not a text or a list of texts, or is empty")
    if metric not in METRICS:
        raise ValueError(f"unknown metric '{metric}': {nearest(str(metric), METRICS)}")
    for pattern in answers if metric == "regex" else ():
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"the pattern '{pattern}' is not a regular expression ({error})") from None
    if metric == "number" and any(last_number(a) is None for a in answers):
        raise ValueError("metric 'number' needs an answer with a number in it")
    return tuple(answers), metric
