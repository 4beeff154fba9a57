"""`fettle peft`: the parameter-efficient family side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fettle.verbs.arguments import ArmsFile, OnlyArms, Overrides, RecipePath

app = typer.Typer(no_args_is_help=True, help="The parameter-efficient family.")


@app.command("compare", epilog="[bold]fettle peft compare recipes/quickstart.yaml optim.steps=100[/bold]")
def peft_compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: ArmsFile = None,
    only: OnlyArms = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the runs and findings")] = Path(
        "runs/compare"
    ),
) -> None:
    """Run a recipe with every method: trained parameters, memory, time a step, quality, latency; a table and a picture."""
    from fettle.stages.compare import compare, pick, read_arms
    from fettle.stages.recipes import recipe_file

    compare(recipe, pick(read_arms(arms or recipe_file("peft.yaml")), only), output, overrides or (), seeds)
    print(output / "findings.png")
