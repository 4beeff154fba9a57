"""What a set of records says: of its labelers, of how far they agree, of the models whose answers they judged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fettle.core.terminal import shown
from fettle.evaluate.interval import Score, ratio_interval
from fettle.feedback.agreement import Alpha, Level
from fettle.feedback.bradley_terry import Ratings, comparisons, rate
from fettle.feedback.elo import Elo, elo
from fettle.feedback.expand import orders
from fettle.feedback.records import Question, Ranking, Record, Verdict
from fettle.feedback.screening import FEW, GATE, Screened, alphas, screen, share

RULE = "violated: "


@dataclass(frozen=True)
class Finding:
    """What labelers said of a model's answers: the share of yes, the mean, or the share of violations."""

    about: str
    source: str
    score: Score


@dataclass(frozen=True)
class Report:
    """Everything that `fettle feedback report` prints."""

    records: int
    skipped: int
    kinds: dict[str, int]
    prompts: int
    labelers: tuple[Screened, ...]
    agreement: tuple[tuple[str, Level, Alpha], ...]
    ratings: Ratings | None
    elo: tuple[Elo, ...]
    findings: tuple[Finding, ...]
    gate: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """As tables."""
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.kinds.items())
        console.print(f"{self.records:,} records ({kinds}) on {self.prompts:,} prompts; {self.skipped:,} skipped")
        console.print(_labelers(self.labelers, self.gate))
        for table in (_agreement(self.agreement), _ratings(self.ratings, self.elo), _findings(self.findings)):
            if table.row_count:
                console.print(table)
        for note in self.notes:
            console.print(Text(shown(note), style="yellow"), soft_wrap=True)


def report(
    records: Sequence[Record], *, trusted: Sequence[str] = (), gold: Sequence[Record] = (), gate: float = GATE, seed: int = 0
) -> Report:  # fmt: skip
    """The report on records; labelers are held against `gold` records, `trusted` labelers, or each other."""
    screened = screen(records, trusted=trusted, gold=gold, gate=gate)
    ranked = [r for r in records if isinstance(r, Ranking) and r.ranks]
    played = comparisons(orders(sorted(ranked, key=lambda r: r.time))) if ranked else []
    ratings = rate(played, seed) if played else None
    notes = list(ratings.notes) if ratings else []
    few = [s.labeler for s in screened if s.agreement is not None and s.compared < FEW]
    if few:
        notes.append(f"Fewer than {FEW} judgements to compare with, so the agreement says little: {', '.join(few)}.")
    if ranked and not played:
        notes.append("The ranked answers do not name their models ('source'), so there is nobody to rate.")
    return Report(
        records=len(records), skipped=sum(r.skipped for r in records), kinds=dict(Counter(r.kind for r in records)),  # type: ignore[attr-defined]
        prompts=len({r.prompt_id for r in records}), labelers=tuple(screened), agreement=tuple(alphas(records)),
        ratings=ratings, elo=tuple(elo(played, seed=seed)) if played else (), findings=tuple(_found(records)), gate=gate, notes=tuple(notes),
    )  # fmt: skip


def _found(records: Sequence[Record]) -> list[Finding]:
    """By question and rule and the answer's model: shares of yes and of violations, means of numbers."""
    said: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    numbers: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for record in records:
        if isinstance(record, Question) and isinstance(record.value, bool):
            said[record.question.ask, record.answer.source].append((record.prompt_id, float(record.value)))
        elif isinstance(record, Question) and isinstance(record.value, int | float):
            numbers[record.question.ask, record.answer.source].append((record.prompt_id, float(record.value)))
        elif isinstance(record, Verdict) and record.verdict in ("violated", "not"):
            said[RULE + record.rule, record.answer.source].append(
                (record.prompt_id, float(record.verdict == "violated"))
            )
    found = [Finding(*key, score) for key, hits in said.items() if (score := share(hits)) is not None]
    for key, values in numbers.items():
        sums: dict[str, list[float]] = defaultdict(list)
        for prompt, value in values:
            sums[prompt].append(value)
        found.append(Finding(*key, ratio_interval([sum(v) for v in sums.values()], [len(v) for v in sums.values()])))
    return sorted(found, key=lambda f: (f.about, f.source))


# Tables.


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    return table


def _labelers(labelers: Sequence[Screened], gate: float) -> Table:
    table = _table(
        "labelers", "labeler", "labels", "skips", "s each", "agrees", "with", "1st wins", "ties", f"{gate:.0%}"
    )
    for s in labelers:
        verdict = Text("-") if s.passes is None else Text("passes", "green") if s.passes else Text("below", "red")
        table.add_row(
            Text(shown(s.labeler)), f"{s.records:,}", f"{s.skipped:,}", "-" if s.seconds is None else f"{s.seconds:.0f}",
            _percent(s.agreement), s.basis or "-", _percent(s.first), "-" if s.ties is None else f"{s.ties:.0%}", verdict,
        )  # fmt: skip
    return table


def _agreement(agreement: Sequence[tuple[str, Level, Alpha]]) -> Table:
    table = _table(
        "agreement beyond chance (Krippendorff)", "asked", "level", "alpha", "95% interval", "units", "values"
    )
    for name, level, a in agreement:
        edges = "n/a" if a.low is None else f"{a.low:.2f} to {a.high:.2f}"
        alpha = "n/a" if a.alpha != a.alpha else f"{a.alpha:.3f}"
        table.add_row(Text(shown(name)), level, alpha, edges, f"{a.units:,}", f"{a.values:,}")
    return table


def _ratings(ratings: Ratings | None, elos: Sequence[Elo]) -> Table:
    several = ratings is not None and len({r.group for r in ratings.rows}) > 1
    heads = ("model", "rating", "95% interval", "games", "points", "Elo", "any order", *["group"] * several)
    table = _table("ratings (Bradley-Terry)", *heads)
    sequential = {e.name: e for e in elos}
    for r in ratings.rows if ratings else ():
        e = sequential[r.name]
        table.add_row(
            Text(shown(r.name)), f"{r.rating:.0f}", "n/a" if r.low is None else f"{r.low:.0f} to {r.high:.0f}", f"{r.games:,}",
            f"{r.points:g}", f"{e.rating:.0f}", f"{e.low:.0f} to {e.high:.0f}", *[str(r.group + 1)] * several,
        )  # fmt: skip
    return table


def _findings(findings: Sequence[Finding]) -> Table:
    table = _table("what labelers said of answers", "asked", "model", "mean", "95% interval", "prompts")
    for f in findings:
        table.add_row(
            Text(shown(f.about)),
            Text(shown(f.source or "-")),
            f"{f.score.mean:.3f}",
            f.score.interval(),
            f"{f.score.n:,}",
        )
    return table


def _percent(score: Score | None) -> str:
    if score is None:
        return "-"
    return (
        f"{score.mean:.0%}"
        if score.low is None
        else f"{score.mean:.0%} ({100 * score.low:.0f}-{100 * (score.high or 0):.0f})"
    )
