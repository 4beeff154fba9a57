"""`fettle label` and `fettle feedback`. What is heavy is imported by the verb that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="What people said of answers: reports, and data to learn from.")
LABEL = '[bold]fettle label items.jsonl --labeler ada[/bold]; a row is {"prompt": ..., "answers": [..., ...]}, see docs/feedback.md'

Records = Annotated[list[str], typer.Argument(help="files of labels (*.jsonl), or folders of them", show_default=False)]
By = Annotated[str, typer.Option(help="what compares answers: ranking, rules, or the text of a question")]
Without = Annotated[list[str] | None, typer.Option(help="leave out a labeler; may be given several times")]
Rows = Annotated[Path, typer.Option("-o", "--output", help="the file to write (*.jsonl)", show_default=False)]


def label(
    items: Annotated[str, typer.Argument(help="a file of items: prompts with answers to judge", show_default=False)],
    labeler: Annotated[str | None, typer.Option(help="who labels; default: the user's name")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="file of the labels; default: ITEMS.LABELER.jsonl beside the items"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the order in which answers are shown")] = 0,
) -> None:
    """Judge answers side by side, a key a judgement. Stop at any moment: every label is kept, and the next call goes on."""
    from fettle.feedback.label import label as ask
    from fettle.feedback.label import user_name

    ask(items, labeler or user_name(), output, seed=seed)


@app.command("report", epilog="[bold]fettle feedback report labels/ --trusted ada[/bold]")
def report(
    files: Records,
    trusted: Annotated[list[str] | None, typer.Option(help="a labeler whom the others are held against")] = None,
    gold: Annotated[list[str] | None, typer.Option(help="a file of labels that are right")] = None,
    gate: Annotated[float, typer.Option(min=0, max=1, help="agreement that a labeler should reach")] = 0.75,
    seed: Annotated[int, typer.Option(min=0, help="seed of the intervals")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file for the same as JSON")] = None,
) -> None:
    """Who labelled, how far they agree, whom to rely on, and which model's answers are preferred."""
    from rich.console import Console

    from fettle.core.files import write_json
    from fettle.feedback.records import read_records
    from fettle.feedback.report import report

    found = report(
        read_records(files), trusted=trusted or (), gold=read_records(gold) if gold else (), gate=gate, seed=seed
    )
    if output is not None:
        write_json(output, found.to_json())
    found.print(Console())


@app.command("pairs", epilog="[bold]fettle feedback pairs labels/ -o pairs.jsonl[/bold], then objective: {kind: dpo}")
def pairs(
    files: Records,
    output: Rows,
    by: By = "ranking",
    majority: Annotated[
        bool, typer.Option("--majority", help="one pair as most labelers have it, in place of each labeler's")
    ] = False,
    without: Without = None,
) -> None:
    """Write every pair of answers of which one is better, those of a prompt together."""
    from fettle.feedback.expand import pairs, write_rows
    from fettle.feedback.records import read_records

    found = pairs(read_records(files, without or ()), by, majority=majority)
    print(f"{output}: {write_rows(output, [pair.row() for pair in found]):,} pairs")


@app.command(
    "rankings", epilog="[bold]fettle feedback rankings labels/ -o rankings.jsonl[/bold], then objective: {kind: reward}"
)
def rankings(files: Records, output: Rows, by: By = "ranking", without: Without = None) -> None:
    """Write every labeler's order of a prompt's answers as one row."""
    from fettle.feedback.expand import rankings, write_rows
    from fettle.feedback.records import read_records

    print(f"{output}: {write_rows(output, rankings(read_records(files, without or ()), by)):,} rankings")


@app.command(
    "labels", epilog="[bold]fettle feedback labels labels/ --by rules -o kto.jsonl[/bold], then objective: {kind: kto}"
)
def labels(
    files: Records,
    output: Rows,
    by: Annotated[
        str, typer.Option(help="what judges an answer: rules, or the text of a yes-or-no question")
    ] = "rules",
    without: Without = None,
) -> None:
    """Write single answers that are desired or not."""
    from fettle.feedback.expand import labels, write_rows
    from fettle.feedback.records import read_records

    print(f"{output}: {write_rows(output, labels(read_records(files, without or ()), by)):,} answers")
