"""Records to preference data: pairs, rankings and labels of single answers, grouped by prompt.

What people said of single answers is a ranking too: of two answers to one prompt by one labeler, the one with the better value
(yes before no, the higher number, fewer rules violated) is preferred. So all kinds of records take one way to pairs. Two answers
are compared by the rules that this labeler judged of both: what was skipped, or never reached, says nothing of an answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import orjson

from fettle.core.errors import FettleError
from fettle.core.files import write_bytes
from fettle.core.spec import nearest
from fettle.feedback.records import Answer, Question, Ranking, Record, Verdict

RULES = "rules"
COST = {"not": 0.0, "unsure": 0.5, "violated": 1.0}


@dataclass(frozen=True)
class Order:
    """Answers to one prompt as one labeler places them: `places[i]` is that of answer i, lower is better, equals tie."""

    record: Record  # one of those it comes from: the prompt, the labeler, the time
    answers: tuple[Answer, ...]
    places: tuple[float, ...]

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        """All (i, j) with i before j in the row."""
        return ((i, j) for i in range(len(self.places)) for j in range(i + 1, len(self.places)))


@dataclass(frozen=True)
class Pair:
    """Of two answers to a prompt, the better one, and how many labelers said so and how many the opposite."""

    prompt_id: str
    asked: dict[str, Any]
    chosen: str
    rejected: str
    votes: tuple[int, int]
    labelers: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """As a row of preference data."""
        said = {"votes": list(self.votes), "labelers": list(self.labelers)}
        return {"prompt_id": self.prompt_id, **self.asked, "chosen": self.chosen, "rejected": self.rejected, **said}


def orders(records: Sequence[Record], by: str = "ranking") -> list[Order]:
    """The orders that records say, of each prompt together: `by` their rankings, their 'rules', or a question's text."""
    if by == "ranking":
        found = [Order(r, r.answers, tuple(map(float, r.ranks))) for r in records if isinstance(r, Ranking) and r.ranks]
    else:
        found = _of_values(records, by)
    if not found:
        kinds = {"ranking"} if any(isinstance(r, Ranking) for r in records) else set()
        kinds |= {RULES} if any(isinstance(r, Verdict) for r in records) else set()
        kinds |= {r.question.ask for r in records if isinstance(r, Question)}
        raise FettleError(f"feedback: no record compares answers by '{by}'; {nearest(by, kinds - {by})}")
    first = {record.prompt_id: i for i, record in reversed(list(enumerate(records)))}
    return sorted(found, key=lambda order: first[order.record.prompt_id])


def _of_values(records: Sequence[Record], by: str) -> list[Order]:
    """By labeler and prompt: one order of all answers with the same rules judged, and one of any two with others in common."""
    groups: dict[tuple[str, str], dict[str, _Judged]] = defaultdict(dict)
    for record in records:
        if (cost := _cost(record, by)) is not None:
            assert isinstance(record, Question | Verdict)
            about = record.rule if isinstance(record, Verdict) else by
            group = groups[record.labeler, record.prompt_id]
            group.setdefault(record.answer.text, _Judged(record, {})).costs[about] = cost
    found = []
    for group in groups.values():
        alike: dict[frozenset[str], list[_Judged]] = defaultdict(list)
        for judged in group.values():
            alike[frozenset(judged.costs)].append(judged)
        found += [_order(some, rules) for rules, some in alike.items() if len(some) > 1]
        for (one, some), (other, others) in combinations(alike.items(), 2):
            found += [_order(two, one & other) for two in product(some, others) if one & other]
    return found


@dataclass(frozen=True)
class _Judged:
    """What a labeler said of an answer: a cost for each rule, or for the question."""

    record: Question | Verdict
    costs: dict[str, float]


def _order(some: Sequence[_Judged], rules: frozenset[str]) -> Order:
    """Answers by what they cost under rules that all of them were judged by."""
    answers = tuple(judged.record.answer for judged in some)
    return Order(some[0].record, answers, tuple(sum(judged.costs[rule] for rule in rules) for judged in some))


def _cost(record: Record, by: str) -> float | None:
    """What a record of a single answer says of it, less is better; None where it is about something else, or says nothing."""
    if isinstance(record, Verdict) and by == RULES and record.verdict is not None:
        return COST[record.verdict]
    if isinstance(record, Question) and record.question.ask == by and isinstance(record.value, bool | int | float):
        return -float(record.value)
    return None


def pairs(records: Sequence[Record], by: str = "ranking", *, majority: bool = False) -> list[Pair]:
    """Every pair of answers of which one is better, those of a prompt together; ties give none.

    Each labeler's pairs stand by themselves, or with `majority` what more than half of those say who compared the two, once.
    """
    votes: dict[tuple[str, str, str], list[Order]] = defaultdict(list)
    voters: Counter[tuple[str, frozenset[str]]] = Counter()
    for order in orders(records, by):
        prompt, texts = order.record.prompt_id, [answer.text for answer in order.answers]
        for i, j in order.pairs:
            voters[prompt, frozenset((texts[i], texts[j]))] += 1
            if order.places[i] != order.places[j]:
                better, worse = (i, j) if order.places[i] < order.places[j] else (j, i)
                votes[prompt, texts[better], texts[worse]].append(order)
    found: list[Pair] = []
    for (prompt, chosen, rejected), said in votes.items():
        opposed = len(votes.get((prompt, rejected, chosen), ()))
        names = [order.record.labeler for order in said]
        groups = [names] if majority else [[name] for name in names]
        if majority and 2 * len(said) <= voters[prompt, frozenset((chosen, rejected))]:
            continue
        found += [
            Pair(prompt, said[0].record.asked, chosen, rejected, (len(said), opposed), tuple(group))
            for group in groups
        ]  # fmt: skip
    return found


def rankings(records: Sequence[Record], by: str = "ranking") -> list[dict[str, Any]]:
    """Every order as a row of K answers with their ranks, for objectives that take all pairs of a prompt at a time.

    An order in which all tie prefers nothing and gives no row.
    """
    rows = []
    for order in orders(records, by):
        places = sorted(set(order.places))
        if len(places) > 1:
            ranks = [places.index(place) + 1 for place in order.places]
            answers = [answer.text for answer in order.answers]
            said = {"answers": answers, "ranks": ranks, "labelers": [order.record.labeler]}
            rows.append({"prompt_id": order.record.prompt_id, **order.record.asked, **said})
    return rows


def labels(records: Sequence[Record], by: str) -> list[dict[str, Any]]:
    """Single answers that are desired or not: by a yes-or-no question, or by the 'rules' (desired: none is violated).

    An answer that violates no rule gives a row where the labeler said "not" of every rule that the prompt's records name: one
    that was skipped or never reached, or of which the labeler is unsure, may be violated.
    """
    rules: dict[str, set[str]] = defaultdict(set)
    judged: dict[tuple[str, str, str], list[Question | Verdict]] = defaultdict(list)
    for record in records:
        if isinstance(record, Verdict):
            rules[record.prompt_id].add(record.rule)
        if _cost(record, by) is not None:
            assert isinstance(record, Question | Verdict)
            if isinstance(record, Question) and record.question.type != "yes_no":
                raise FettleError(
                    f"feedback: '{by}' is no question of yes or no, so it does not say which answers are desired"
                )
            judged[record.labeler, record.prompt_id, record.answer.text].append(record)
    if not judged:
        asked = {r.question.ask for r in records if isinstance(r, Question) and r.question.type == "yes_no"}
        asked |= {RULES} if any(isinstance(r, Verdict) for r in records) else set()
        raise FettleError(f"feedback: no record judges a single answer by '{by}'; {nearest(by, asked - {by})}")
    rows = []
    for (labeler, prompt, text), said in judged.items():
        desired = _desired(said, rules[prompt])
        if desired is None:
            continue
        given = {"completion": text, "label": desired, "labelers": [labeler]}
        rows.append({"prompt_id": prompt, **said[0].asked, **given})
    return rows


def _desired(said: Sequence[Question | Verdict], rules: set[str]) -> bool | None:
    """Whether an answer is desired by what a labeler said of it; None where that leaves it open."""
    verdicts = {record.rule: record.verdict for record in said if isinstance(record, Verdict)}
    if not verdicts:
        return bool(said[0].value)  # type: ignore[union-attr]
    if "violated" in verdicts.values():
        return False
    return True if rules == {rule for rule, verdict in verdicts.items() if verdict == "not"} else None


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all; returns their number."""
    if path.suffix != ".jsonl":
        raise FettleError(f"{path}: rows go to a file that ends in .jsonl")
    write_bytes(path, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return len(rows)
