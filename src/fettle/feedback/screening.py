"""Which labelers to rely on: their agreement with a trusted labeler, with gold labels, and with each other; their habits.

Everything that a record says is cut into judgements, so that all kinds are compared alike: of every pair of ranked answers which
is better, the value of a question, the verdict on a rule. Two judgements of the same thing agree where they are equal.

InstructGPT (arXiv 2203.02155, section 3.4) found 73% to 77% agreement between its labelers, chosen by agreement with its
researchers; the gate is at 75%.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median

from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.evaluate.interval import SCORES, Score, grouped_interval
from fettle.feedback.agreement import Alpha, Level, krippendorff
from fettle.feedback.expand import RULES
from fettle.feedback.records import VERDICTS, Question, Ranking, Record, Value, Verdict

GATE = 0.75
FEW = 20  # judgements below which an agreement says little
Thing = tuple[str, ...]  # what is judged: the prompt, then what of it
RANKING = "ranking"


@dataclass(frozen=True)
class Screened:
    """A labeler. `basis` is what `agreement` is with: 'gold', 'trusted' or 'others', the first of them that there is."""

    labeler: str
    records: int
    skipped: int
    seconds: float | None  # the median
    basis: str
    agreement: Score | None
    compared: int  # judgements of things that the basis has judged too
    first: Score | None  # how often the answer shown earlier is preferred; a half where place does not matter
    ties: float | None  # share of pairs
    passes: bool | None  # None: nothing to compare with


def judgements(record: Record) -> Iterator[tuple[Thing, Value]]:
    """What a record says, thing by thing; nothing where it was skipped, or is a free text."""
    match record:
        case Ranking() if record.ranks:
            texts = [a.text for a in record.answers]
            for i, j in combinations(range(len(texts)), 2):
                i, j = (i, j) if texts[i] < texts[j] else (j, i)
                way = (record.ranks[i] < record.ranks[j]) - (record.ranks[i] > record.ranks[j])
                yield (record.prompt_id, "pair", texts[i], texts[j]), way
        case Question() if record.value is not None and record.question.type != "text":
            yield (record.prompt_id, *record.subject), record.value
        case Verdict() if record.verdict is not None:
            yield (record.prompt_id, *record.subject), record.verdict


def judged(records: Sequence[Record]) -> dict[str, dict[Thing, Value]]:
    """Each labeler's judgements."""
    found: dict[str, dict[Thing, Value]] = defaultdict(dict)
    for record in records:
        found[record.labeler].update(judgements(record))
    return dict(found)


def share(hits: Sequence[tuple[str, float]]) -> Score | None:
    """The mean of hits (1) and misses (0) with its interval over prompts; (prompt, hit) each. None where there are none."""
    if not hits:
        return None
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, value in hits:
        groups[prompt].append(value)
    return grouped_interval(list(groups.values()), bounds=SCORES)


def agreement(ours: dict[Thing, Value], theirs: Sequence[dict[Thing, Value]]) -> tuple[Score | None, int]:
    """How often judgements are those of others about the same things, and of how many that is."""
    hits = [
        (thing[0], float(value == other[thing])) for other in theirs for thing, value in ours.items() if thing in other
    ]
    return share(hits), len(hits)


def screen(
    records: Sequence[Record], *, trusted: Sequence[str] = (), gold: Sequence[Record] = (), gate: float = GATE
) -> list[Screened]:
    """Every labeler but the trusted ones, held against gold labels, trusted labelers or the others; lowest agreement first."""
    own = judged(records)
    for name in trusted:
        if name not in own:
            raise FettleError(f"feedback: no record is by the trusted labeler '{name}': {nearest(name, own)}")
    right: dict[Thing, Value] = {}
    for record in gold:
        right.update(judgements(record))
    found = []
    names = list(dict.fromkeys(record.labeler for record in records))
    for name in names:
        if name in trusted:
            continue
        others = [own[n] for n in names if n != name and n in own]
        bases = (("gold", [right]), ("trusted", [own[n] for n in trusted]), ("others", others))
        held = [(basis, *agreement(own.get(name, {}), theirs)) for basis, theirs in bases]
        basis, score, compared = next((h for h in held if h[2]), ("", None, 0))
        mine = [r for r in records if r.labeler == name]
        found.append(
            Screened(
                name, len(mine), sum(r.skipped for r in mine), _seconds(mine), basis, score, compared,
                _first(mine), _ties(own.get(name, {})), None if score is None else score.mean >= gate,
            )
        )  # fmt: skip
    return sorted(found, key=lambda s: (s.agreement is None, s.agreement.mean if s.agreement else 0.0, s.labeler))


def _seconds(records: Sequence[Record]) -> float | None:
    times = [r.seconds for r in records if r.seconds is not None and not r.skipped]
    return median(times) if times else None


def _first(records: Sequence[Record]) -> Score | None:
    """Of all pairs that do not tie, how often the answer shown earlier is the better one."""
    hits = []
    for record in records:
        if isinstance(record, Ranking) and record.ranks and record.shown:
            places = [record.ranks[i] for i in record.shown]
            hits += [(record.prompt_id, float(a < b)) for a, b in combinations(places, 2) if a != b]
    return share(hits)


def _ties(own: dict[Thing, Value]) -> float | None:
    ways = [value for thing, value in own.items() if thing[1] == "pair"]
    return ways.count(0) / len(ways) if ways else None


def alphas(records: Sequence[Record]) -> list[tuple[str, Level, Alpha]]:
    """Agreement beyond chance of all labelers, by what was asked: rankings, each question, rules.

    A pair of answers is counted both ways round, since neither comes first by nature.
    """
    units: dict[tuple[str, Level], dict[Thing, list[float | str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for thing, value in judgements(record):
            name, level = _asked(record)
            if isinstance(record, Ranking):
                assert isinstance(value, int)
                units[name, level][thing].append(value)
                units[name, level][(thing[0], "pair", thing[3], thing[2])].append(-value)
            else:
                units[name, level][thing].append(VERDICTS.index(str(value)) if isinstance(record, Verdict) else value)
    found = []
    for (name, level), things in units.items():
        alpha = krippendorff(things.values(), level, clusters=[thing[0] for thing in things])
        if name == RANKING:
            alpha = replace(alpha, units=alpha.units // 2, values=alpha.values // 2)
        if alpha.units:
            found.append((name, level, alpha))
    return found


def _asked(record: Record) -> tuple[str, Level]:
    match record:
        case Ranking():
            return RANKING, "ordinal"
        case Verdict():
            return RULES, "ordinal"
        case Question():
            levels: dict[str, Level] = {"scale": "ordinal", "number": "interval"}
            return record.question.ask, levels.get(record.question.type, "nominal")
    raise TypeError(type(record).__name__)
