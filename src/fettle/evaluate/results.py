"""Results: what was measured, on what, how; as JSON, a table and a picture; and the difference of two."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from fettle.core import FettleError
from fettle.core.files import make_folder, read_json, sha256, write_json
from fettle.data.read import place
from fettle.evaluate.interval import CHANGES, SCORES, Score, mean_interval
from fettle.evaluate.tasks import Evaluation, Item, names_of

RESULTS = "results.json"
PICTURE = "results.png"


@dataclass(frozen=True)
class Row:
    """One question's outcome. `score` is accuracy for choices, and `fair` that of the length-normalised choice."""

    where: str
    family: str
    cluster: str
    metric: str
    score: float
    output: str
    right: str
    reason: str = ""
    prompt_tokens: int = 0
    fair: float | None = None

    @classmethod
    def of(cls, item: Item, score: float, output: str, reason: str, tokens: int, fair: float | None = None) -> Row:
        """The outcome of an item."""
        return cls(
            item.where, item.family, item.cluster, item.metric, score, output, item.solution, reason, tokens, fair
        )


@dataclass(frozen=True)
class Result:
    """One evaluation. `scores` begins with the main one; `families` and `clusters` hold the main score by group."""

    name: str
    kind: str
    sha256: str  # of the file evaluated on
    settings: dict[str, Any]
    scores: dict[str, Score]
    families: dict[str, Score] = field(default_factory=dict)
    clusters: dict[str, Score] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    @classmethod
    def of_rows(
        cls, name: str, sha256: str, settings: dict[str, Any], rows: Sequence[Row], about: dict[str, Any]
    ) -> Result:
        """Scores with intervals: over all rows, by metric, by family, by cluster."""
        seed = int(settings.get("seed", 0))
        scores = {"score": _score([r.score for r in rows], seed)}
        for metric in sorted({r.metric for r in rows}):
            scores["acc" if metric == "choice" else metric] = _score(
                [r.score for r in rows if r.metric == metric], seed
            )
        if fair := [r.fair for r in rows if r.fair is not None]:
            scores["acc_norm"] = _score(fair, seed)
        return cls(
            name, "task", sha256, settings, scores, _grouped(rows, "family", seed), _grouped(rows, "cluster", seed), about, tuple(rows)
        )  # fmt: skip

    @property
    def main(self) -> tuple[str, Score]:
        """The name and value of the main score."""
        return next(iter(self.scores.items()))

    @property
    def said(self) -> str:
        """What a score means nothing without: a perplexity's context and stride, as measured."""
        return ", ".join(f"{key} {self.about[key]}" for key in ("context", "stride") if key in self.about)


def _grouped(rows: Sequence[Row], key: str, seed: int) -> dict[str, Score]:
    names = sorted({getattr(r, key) for r in rows} - {""})
    return {name: _score([r.score for r in rows if getattr(r, key) == name], seed) for name in names}


def _score(values: Sequence[float], seed: int) -> Score:
    return mean_interval(values, seed, bounds=SCORES)


@dataclass(frozen=True)
class Results:
    """Everything that one model was evaluated on."""

    model: dict[str, Any]
    results: tuple[Result, ...]

    def summary(self) -> list[dict[str, Any]]:
        """One plain row an evaluation, for reports and manifests."""
        rows = []
        for result in self.results:
            name, score = result.main
            rows.append({"evaluation": result.name, "metric": name, **asdict(score), "families": len(result.families)})
        return rows

    def write(self, folder: Path) -> None:
        """Leave results.json and results.png in a folder."""
        write_json(make_folder(folder) / RESULTS, asdict(self))
        draw({str(self.model.get("name") or self.model.get("path")): self}, folder / PICTURE)

    @classmethod
    def read(cls, path: Path) -> Results:
        """From a results.json, or the folder it lies in."""
        file = path / RESULTS if path.is_dir() else path
        data = read_json(file)
        try:
            return cls(data["model"], tuple(_result(r) for r in data["results"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise FettleError(f"{file}: not a results file of fettle eval ({error!r})") from None

    def table(self, title: str = "") -> Table:
        """The scores as a table for the terminal."""
        table = Table(title=title or None)
        for head in ("evaluation", "group", "metric", "score", "95% interval", "n"):
            table.add_column(head, justify="right" if head in ("score", "n") else "left")
        for result in self.results:
            for i, (metric, score) in enumerate(result.scores.items()):
                table.add_row(*((result.name, result.said) if not i else ("", "")), metric, *_cells(score))
            for kind, groups in (("cluster", result.clusters), ("family", result.families)):
                for name, score in groups.items():
                    table.add_row("", f"{kind} {name}", "", *_cells(score))
        return table


def _result(data: dict[str, Any]) -> Result:
    groups = {key: {k: Score(**v) for k, v in data[key].items()} for key in ("scores", "families", "clusters")}
    return Result(**{**data, **groups, "rows": tuple(Row(**r) for r in data["rows"])})


def _cells(score: Score) -> tuple[str, str, str]:
    return f"{score.mean:.3f}", score.interval(), str(score.n)


@dataclass(frozen=True)
class Change:
    """The means of a and b over the same rows, and b - a with a paired interval."""

    a: float
    b: float
    change: Score


@dataclass(frozen=True)
class Difference:
    """What changed in one evaluation, in all and by group; `notes` tells which settings differ."""

    name: str
    total: Change
    families: dict[str, Change]
    clusters: dict[str, Change]
    notes: tuple[str, ...]


def compare(a: Results | Path, b: Results | Path, seed: int = 0) -> list[Difference]:
    """How b differs from a on each evaluation that both have, row by row.

    FettleError where they share none, or where a file is not the same one in both.
    """
    a, b = (r if isinstance(r, Results) else Results.read(r) for r in (a, b))
    before, after = ([r for r in results.results if r.rows] for results in (a, b))
    pairs = paired(before, after)
    if not pairs:
        raise FettleError(
            f"nothing to compare: the first has {', '.join(r.name for r in a.results)}, the second {', '.join(r.name for r in b.results)}"
        )
    return [_difference(before[i], after[j], seed) for i, j in pairs]


def paired(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[int, int]]:
    """Places in a and b of what goes together, in the order of a.

    Those of one file with the same settings, then of what is left those of one file, then those of files of one name; where
    there are several, in their order.
    """
    found: dict[int, int] = {}
    for same in (_measure, _file, _file_name):
        taken = set(found.values())
        free: dict[Any, deque[int]] = defaultdict(deque)
        for j, other in enumerate(b):
            if j not in taken:
                free[same(other)].append(j)
        for i, result in enumerate(a):
            if i not in found and (places := free[same(result)]):
                found[i] = places.popleft()
    return sorted(found.items())


def _measure(result: Result) -> Any:
    return result.sha256, orjson.dumps({**result.settings, "path": ""}, option=orjson.OPT_SORT_KEYS)


def _file(result: Result) -> Any:
    return result.sha256


def _file_name(result: Result) -> Any:
    return Path(result.settings.get("path", result.name)).name


def require_shared(a: Results, specs: Sequence[Evaluation]) -> None:
    """FettleError where results have nothing in common with evaluations that are still to be made, or files have changed."""
    names = names_of(specs)
    earlier = [r for r in a.results if r.rows]
    settings = [spec.model_dump(mode="json") for spec in specs]
    later = [Result(n, s["kind"], sha256(Path(s["path"])), s, {}) for n, s in zip(names, settings, strict=True)]
    pairs = paired(earlier, later)
    if not pairs:
        raise FettleError(
            f"nothing to compare: the earlier results have {', '.join(r.name for r in a.results) or 'none'}, asked for are {', '.join(names)}"
        )
    for i, j in pairs:
        _require_same(earlier[i].name, earlier[i].sha256, later[j].sha256)


def _require_same(name: str, a: str, b: str) -> None:
    if a != b:
        raise FettleError(
            f"{name}: the two were run on different files (SHA-256 {a[:12]} and {b[:12]}); evaluate both again"
        )


def _difference(x: Result, y: Result, seed: int) -> Difference:
    _require_same(x.name, x.sha256, y.sha256)
    there = {place(row.where)[1:]: row for row in y.rows}
    both = [(row, there[at]) for row in x.rows if (at := place(row.where)[1:]) in there]
    if not both:
        raise FettleError(f"{x.name}: the two runs took different rows; use the same limit and seed")
    families, clusters = (_changes(both, key, seed) for key in ("family", "cluster"))
    return Difference(x.name, _change(both, seed), families, clusters, _notes(x, y, len(both)))


def _changes(pairs: Sequence[tuple[Row, Row]], key: str, seed: int) -> dict[str, Change]:
    names = sorted({getattr(p, key) for p, _ in pairs} - {""})
    return {name: _change([pair for pair in pairs if getattr(pair[0], key) == name], seed) for name in names}


def _change(pairs: Sequence[tuple[Row, Row]], seed: int) -> Change:
    n = len(pairs)
    before, after = sum(p.score for p, _ in pairs) / n, sum(q.score for _, q in pairs) / n
    return Change(before, after, mean_interval([q.score - p.score for p, q in pairs], seed, bounds=CHANGES))


def _notes(x: Result, y: Result, shared: int) -> tuple[str, ...]:
    notes = (
        [f"{shared} of {len(x.rows)} and {len(y.rows)} rows are in both"]
        if not shared == len(x.rows) == len(y.rows)
        else []
    )
    left, right = ({**r.settings, "template_hash": r.about.get("template_hash")} for r in (x, y))
    differ = sorted(k for k in left.keys() | right.keys() if k != "path" and left.get(k) != right.get(k))
    return (*notes, *(f"{key} differs: {left.get(key)} and {right.get(key)}" for key in differ))


def difference_table(differences: Sequence[Difference], titles: Mapping[str, str] | None = None) -> Table:
    """Differences for the terminal: a total each, then its clusters, or its families where there are no clusters.

    `titles` name evaluations otherwise than by their file.
    """
    table = Table()
    for head in ("evaluation", "before", "after", "change", "95% interval", "n"):
        table.add_column(head, justify="left" if head == "evaluation" else "right")
    for d in differences:
        table.add_row((titles or {}).get(d.name, d.name), *_cells_of(d.total), style="bold")
        for name, change in (d.clusters or d.families).items():
            table.add_row(f"  {name}", *_cells_of(change))
        for note in d.notes:
            table.add_row(f"  ! {note}")
        table.add_section()
    return table


def _cells_of(c: Change) -> tuple[str, ...]:
    return f"{c.a:.3f}", f"{c.b:.3f}", f"{c.change.mean:+.3f}", c.change.interval(form="+.3f"), str(c.change.n)


def draw(models: dict[str, Results], file: Path, titles: Mapping[str, str] | None = None) -> None:
    """Bars with intervals, one colour a model: the picture of before and after. Perplexities have no bars.

    Each evaluation has its total, then its clusters, or its families where it has no clusters.
    """
    from fettle.evaluate.picture import Group, bars

    found: list[tuple[Result, dict[str, dict[str, Score]]]] = []  # of an evaluation by group, '' for the total
    for model, results in models.items():
        tasks = [result for result in results.results if result.kind == "task"]
        places = {j: i for i, j in paired([first for first, _ in found], tasks)}
        for j, result in enumerate(tasks):
            if j not in places:
                found.append((result, {}))
            groups = found[places.get(j, -1)][1]
            for label, score in {"": result.main[1], **(result.clusters or result.families)}.items():
                groups.setdefault(label, {})[model] = score
    if found:
        shown = [
            Group(label or (titles or {}).get(first.name, first.name), scores, total=not label)
            for first, groups in found
            for label, scores in groups.items()
        ]
        bars(shown, list(models), file)
