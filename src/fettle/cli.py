"""The command line: one verb a job. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fettle import __version__

app = typer.Typer(
    name="fettle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Adapts pretrained language models: one recipe, one artifact.",
    epilog="Start with [bold]fettle lab demo[/bold], then [bold]fettle check recipes/quickstart.yaml[/bold]. "
    "Every verb has its own --help.",
)  # fmt: skip
lab_app = typer.Typer(no_args_is_help=True, help="The small world on your desk: its data, its base model, its claims.")
app.add_typer(lab_app, name="lab")
peft_app = typer.Typer(no_args_is_help=True, help="The parameter-efficient family.")
app.add_typer(peft_app, name="peft")

RecipePath = Annotated[Path, typer.Argument(help="a recipe in YAML", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, as in optim.lr=1e-4 or edits.0.rank=8", show_default=False)
]
ModelName = Annotated[str, typer.Argument(help="a run or artifact folder, a model folder, a hub id, or fettle/tiny")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a FettleError is its sentence and exit code 1, an interruption is 130."""
    try:
        app(arguments, prog_name="fettle")
    except Exception as error:
        code = _expected(error)
        if code is None:
            raise
        _say(str(error))
        sys.exit(code)


def _expected(error: Exception) -> int | None:
    """The exit code of an error that its sentence explains; None for one that needs a traceback."""
    from fettle.core.errors import FettleError

    if isinstance(error, FettleError):
        return 1
    code = getattr(error, "code", None)  # of fettle.train.Stopped: a signal ended a run, its state is saved
    return code if type(error).__name__ == "Stopped" and isinstance(code, int) else None


def _say(text: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}{text}{plain}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fettle {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command(epilog="[bold]fettle check recipes/quickstart.yaml optim.lr=1e-4 batch.tokens=4096[/bold]")
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    examples: Annotated[
        int, typer.Option("-n", "--examples", help="examples to show, coloured by what is learned")
    ] = 3,
    time: Annotated[bool, typer.Option(help="time three steps to predict how long the run takes")] = True,
) -> None:
    """Show what will train, on which tokens, in how much memory, for how long. Exit code 1 where a run would be refused."""
    from fettle import stages

    reports = stages.check(stages.load_recipe(recipe, overrides or ()), examples, time_steps=time)
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


@app.command(
    epilog="[bold]fettle run recipes/quickstart.yaml output=runs/mine[/bold]; stopped or killed, the same with [bold]--resume[/bold]"
)
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest sound checkpoint")] = False,
) -> None:
    """Run a recipe to its end; leaves an artifact, a report and a picture in its output folder."""
    from fettle import stages

    artifact = stages.run(stages.load_recipe(recipe, overrides or ()), resume=resume)
    print(artifact)


@app.command(
    epilog="[bold]fettle chat runs/quickstart fettle/tiny[/bold] answers side by side; questions may also come through a pipe"
)
def chat(
    models: Annotated[
        list[str], typer.Argument(help="one model, or several to talk to side by side", show_default=False)
    ],
    system: Annotated[str, typer.Option(help="instructions to begin with")] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 256,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
) -> None:
    """Talk to a base, an artifact, or several side by side."""
    from fettle.generate import Sampling
    from fettle.generate.chat import chat as talk
    from fettle.stages import open_model

    forests = [open_model(name)[0] for name in models]
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed)
    talk(forests, models, system=system, sampling=sampling)


@app.command("eval", epilog="[bold]fettle eval runs/quickstart runs/lab/tasks -o runs/quickstart/eval[/bold]")
def evaluate(
    model: ModelName,
    tasks: Annotated[list[str], typer.Argument(help="task files (*.jsonl), texts (*.txt), or folders of them")],
    shots: Annotated[int, typer.Option(help="demonstrations before each question")] = 0,
    seed: Annotated[int, typer.Option(help="seed of demonstrations, limits and intervals")] = 0,
    limit: Annotated[int | None, typer.Option(help="at most this many rows a file")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="folder for results.json and results.png")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="an earlier results.json to compare with")] = None,
) -> None:
    """Score a model; with intervals, and with template, seed and shots on record."""
    from rich.console import Console

    from fettle.evaluate import Results, compare, find
    from fettle.evaluate import evaluate as score
    from fettle.evaluate.results import difference_table
    from fettle.stages import open_model

    found = find(tasks, seed=seed, shots=shots, limit=limit)
    forest, _ = open_model(model)
    results = score(forest, found, output, model={"name": model})
    console = Console()
    console.print(results.table(model))
    if against is not None:
        console.print(difference_table(compare(Results.read(against), results)))


@app.command(epilog="[bold]fettle export runs/quickstart --to peft[/bold]")
def export(
    model: ModelName,
    to: Annotated[str, typer.Option(help="hf (merged folder), peft (adapter), llama (.pth and params.json)")] = "hf",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="folder to write; default: <model>/<format>, or <name>-<format> here for a model that is no folder",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of merged weights: float32, bfloat16, float16; default: the model's")
    ] = None,
) -> None:
    """Write a model for others to load; what was written is read back and its logits compared first."""
    from fettle.export import export as write
    from fettle.stages import open_model

    forest, edits = open_model(model)
    target = output or (Path(model) / to if Path(model).is_dir() else Path(f"{Path(model).name}-{to}"))
    parity = write(forest, edits, target, to, dtype)
    print(
        f"{target}: reads back with {parity.checked_with}, {parity.written_difference:.2g} from what was written at most "
        f"(allowed: {parity.tolerance:.2g}); rounding weights to {parity.dtype} moved logits by {parity.largest_difference:.2g} at most"
    )


@app.command(epilog="[bold]fettle schema > recipe.schema.json[/bold]")
def schema() -> None:
    """Print the JSON Schema of a recipe, for an editor's completion."""
    from fettle import stages

    print(json.dumps(stages.schema(), indent=2))


@peft_app.command("compare", epilog="[bold]fettle peft compare recipes/quickstart.yaml optim.steps=100[/bold]")
def peft_compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: Annotated[
        Path | None, typer.Option(help="a file of arms: what each changes in the recipe; default: every method")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="only this arm; may be given several times")] = None,
    seeds: Annotated[int, typer.Option(help="how many seeds")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the runs and findings")] = Path(
        "runs/compare"
    ),
) -> None:
    """Run a recipe with every method: trained parameters, memory, time a step, quality, latency; a table and a picture."""
    from fettle.stages.compare import compare, pick, read_arms
    from fettle.stages.recipes import recipe_file

    compare(recipe, pick(read_arms(arms or recipe_file("peft.yaml")), only), output, overrides or (), seeds)
    print(output / "findings.png")


@lab_app.command("list")
def lab_list() -> None:
    """The claims that can be reproduced here."""
    from fettle.lab.claims import CLAIMS

    for claim in CLAIMS.values():
        print(f"{claim.name}\n  {claim.says}\n  {claim.paper}")


@lab_app.command("run")
def lab_run(
    claim: Annotated[str, typer.Argument(help="a claim of `fettle lab list`")],
    seeds: Annotated[int, typer.Option(help="how many seeds")] = 3,
    each: Annotated[
        int | None, typer.Option(help="evaluation items a task family; default: as many as the claim needs")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe, as in optim.steps=50")
    ] = None,
) -> None:
    """Reproduce a claim: every arm over the seeds, with intervals and a control. Goes on where it was stopped."""
    from fettle.lab.claims import run_claim

    print(run_claim(claim, seeds, each, overrides or ()))


@lab_app.command("data")
def lab_data(
    output: Annotated[Path, typer.Argument(help="folder to write")] = Path("runs/lab"),
    seed: Annotated[int, typer.Option(help="seed of the world and its texts")] = 0,
    documents: Annotated[int, typer.Option(help="documents of the pre-training corpus")] = 0,
    instructions: Annotated[int, typer.Option(help="rows of instructions")] = 12_000,
) -> None:
    """Write the lab's corpus, instructions and tasks."""
    from fettle.lab import write_lab

    for name, rows in write_lab(output, seed, documents, instructions).items():
        print(f"{output / name}: {rows:,} rows")


@lab_app.command("base")
def lab_base(overrides: Overrides = None) -> None:
    """Pretrain the embedded base model again from nothing, and install it. Goes on where it was stopped."""
    from fettle.lab.base import build_base

    print(build_base(overrides or ()))


@lab_app.command("demo")
def lab_demo(
    data: Annotated[str | None, typer.Argument(help="data=FILE tunes on your own file instead of the lab's")] = None,
    short: Annotated[bool, typer.Option("--short", help="a minute instead of minutes")] = False,
) -> None:
    """Check, tune, compare before and after, merge: everything once, on the embedded base."""
    if data is not None and not data.startswith("data="):
        raise typer.BadParameter(f"'{data}' is not understood; write data=FILE")
    from fettle.lab.demo import demo

    demo(data.removeprefix("data=") if data else None, short=short)


if __name__ == "__main__":
    main()
