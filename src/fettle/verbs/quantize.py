"""`fettle quantize`: one recipe, every method side by side, and the bits of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from fettle.verbs.arguments import ArmsFile, OnlyArms, Overrides, RecipePath


class RecipeFirst(typer.core.TyperGroup):
    """A group whose name may be followed by a recipe at once: `fettle quantize recipe.yaml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["run", *args])


app = typer.Typer(
    no_args_is_help=True, cls=RecipeFirst, help="Smaller models: [bold]fettle quantize recipe.yaml[/bold].", rich_markup_mode="rich"
)  # fmt: skip


@app.command("run", epilog="[bold]fettle quantize recipes/quantize.yaml output=runs/small[/bold]")
def quantize_run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on behind the last block that is done")] = False,
) -> None:
    """Quantize a model; leaves an artifact, findings and a report. A recipe needs no `kind: quantize` here."""
    from fettle import stages

    print(stages.run(stages.load_recipe(recipe, overrides or (), kind="quantize"), resume=resume))


@app.command(
    "compare", epilog="[bold]fettle quantize compare recipes/quantize.yaml --only 'rtn 4' --only 'gptq 4'[/bold]"
)
def quantize_compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: ArmsFile = None,
    only: OnlyArms = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds, of calibration text and of training")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the runs and findings")] = Path(
        "runs/quantizers"
    ),
) -> None:
    """Quantize a model with every method: bits, size, quality with intervals, speed, what fell back; a table, two pictures, four verdicts.

    The recipe's `evaluate` needs a text that was not calibrated on: {kind: perplexity, path: held.txt}. Goes on where it was stopped.
    """
    from fettle.stages.compare import pick, read_arms
    from fettle.stages.quantizers import compare_quantizers
    from fettle.stages.recipes import recipe_file

    chosen = pick(read_arms(arms or recipe_file("quantizers.yaml")), only)
    compare_quantizers(recipe, chosen, output, overrides or (), seeds)
    print(output / "findings.json")


@app.command(
    "plan",
    epilog="[bold]fettle quantize plan recipes/quantize.yaml --bits 4 -o mixed.yaml[/bold], then [bold]fettle quantize mixed.yaml[/bold]",
)
def quantize_plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    bits: Annotated[float, typer.Option(help="bits a weight over all layers, scales counted")] = 4.25,
    choices: Annotated[str, typer.Option(help="the bits that a layer may have")] = "2,3,4,5,6,8",
    rows: Annotated[int, typer.Option(min=1, help="rows of the calibration text to measure on")] = 8,
    output: Annotated[Path, typer.Option("-o", "--output", help="the recipe to write")] = Path("mixed.yaml"),
) -> None:
    """Mixed precision: measure how much each layer feels fewer bits, and write a recipe that spends a budget where it matters."""
    from fettle.stages.planned import plan_bits

    words = [word.strip() for word in choices.split(",")]
    if not set(words) <= set("2345678"):
        raise typer.BadParameter(f"--choices: '{choices}' is not understood; give numbers from 2 to 8, as in 2,3,4,8")
    _, chosen = plan_bits(recipe, bits, output, overrides or (), [int(word) for word in words], rows)
    for width in sorted(set(chosen.values())):
        print(f"{width} bits: {sum(b == width for b in chosen.values())} layers")
    print(output)
