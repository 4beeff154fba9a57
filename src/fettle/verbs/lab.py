"""`fettle lab`: the small world, its base model, its claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.verbs.arguments import Overrides

app = typer.Typer(no_args_is_help=True, help="The small world on your desk: its data, its base model, its claims.")


@app.command("list")
def lab_list() -> None:
    """The claims that can be reproduced here."""
    from fettle.lab.claims import CLAIMS

    for claim in CLAIMS.values():
        print(f"{claim.name}\n  {claim.says}\n  {claim.paper}")


@app.command("run")
def lab_run(
    claim: Annotated[str, typer.Argument(help="a claim of `fettle lab list`")],
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 3,
    each: Annotated[
        int | None, typer.Option(min=1, help="evaluation items a task family; default: as many as the claim needs")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe, as in optim.steps=50")
    ] = None,
) -> None:
    """Reproduce a claim: every arm over the seeds, with intervals and a control. Goes on where it was stopped."""
    from fettle.lab.claims import run_claim

    print(run_claim(claim, seeds, each, overrides or ()))


@app.command("data")
def lab_data(
    output: Annotated[Path, typer.Argument(help="folder to write")] = Path("runs/lab"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the world and its texts")] = 0,
    documents: Annotated[int, typer.Option(min=0, help="documents of the pre-training corpus")] = 0,
    instructions: Annotated[int, typer.Option(min=1, help="rows of instructions")] = 12_000,
) -> None:
    """Write the lab's corpus, instructions and tasks."""
    from fettle.lab import write_lab

    for name, rows in write_lab(output, seed, documents, instructions).items():
        print(f"{output / name}: {rows:,} rows")


@app.command("base")
def lab_base(overrides: Overrides = None) -> None:
    """Pretrain the embedded base model again from nothing, and install it. Goes on where it was stopped."""
    from fettle.lab.base import build_base

    print(build_base(overrides or ()))


@app.command("demo")
def lab_demo(
    data: Annotated[str | None, typer.Argument(help="data=FILE tunes on your own file instead of the lab's")] = None,
    short: Annotated[bool, typer.Option("--short", help="a minute instead of minutes")] = False,
) -> None:
    """Check, tune, compare before and after, merge: everything once, on the embedded base."""
    if data is not None and not data.startswith("data="):
        raise typer.BadParameter(f"'{data}' is not understood; write data=FILE")
    from fettle.lab.demo import demo

    demo(data.removeprefix("data=") if data else None, short=short)
