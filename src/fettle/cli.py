"""The command line: one verb a job. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fettle import __version__
from fettle.verbs import feedback, lab, peft, quantize
from fettle.verbs.arguments import ModelName, Overrides, RecipePath
from fettle.verbs.feedback import LABEL, label

app = typer.Typer(
    name="fettle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Adapts pretrained language models: one recipe, one artifact.",
    epilog="Start with [bold]fettle lab demo[/bold], then [bold]fettle check recipes/quickstart.yaml[/bold]. "
    "Every verb has its own --help.",
)  # fmt: skip
app.add_typer(lab.app, name="lab")
app.add_typer(peft.app, name="peft")
app.add_typer(quantize.app, name="quantize")
app.add_typer(feedback.app, name="feedback")


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
        int, typer.Option("-n", "--examples", min=0, help="examples to show, coloured by what is learned")
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
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
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
    shots: Annotated[int, typer.Option(min=0, help="demonstrations before each question")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="seed of demonstrations, limits and intervals")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="at most this many rows a file")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="preferences: prompts that are texts go through the chat template")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="folder for results.json and results.png")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="an earlier results.json to compare with")] = None,
) -> None:
    """Score a model; with intervals, and with template, seed and shots on record."""
    from rich.console import Console

    from fettle.core.files import make_folder
    from fettle.evaluate import Results, compare, find
    from fettle.evaluate import evaluate as score
    from fettle.evaluate.results import difference_table, require_shared
    from fettle.stages import open_model

    found = find(tasks, seed=seed, shots=shots, limit=limit, chat=chat)
    earlier = Results.read(against) if against is not None else None
    if earlier is not None:
        require_shared(earlier, found)
    if output is not None:
        make_folder(output)
    forest, _ = open_model(model)
    results = score(forest, found, output, model={"name": model})
    console = Console()
    console.print(results.table(model))
    if earlier is not None:
        console.print(difference_table(compare(earlier, results)))


@app.command(
    epilog="[bold]fettle export runs/quickstart --to peft[/bold]; [bold]fettle export fettle/tiny --to gguf --type Q8_0[/bold]"
)
def export(
    model: ModelName,
    to: Annotated[
        str,
        typer.Option(
            help="hf (merged folder), peft (adapter), llama (.pth and params.json), gguf (llama.cpp), bitsandbytes; of a quantized "
            "model compressed-tensors, gptq, gptq-v2, awq"
        ),
    ] = "hf",
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
    type: Annotated[
        str | None,
        typer.Option(
            help="gguf: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1; bitsandbytes: nf4, int8; default: packed layers as they are"
        ),
    ] = None,
) -> None:
    """Write a model for others to load; what was written is read back and its logits compared first."""
    from fettle.export import export as write
    from fettle.stages import open_model

    forest, edits = open_model(model)
    target = output or (Path(model) / to if Path(model).is_dir() else Path(f"{Path(model).name}-{to}"))
    parity = write(forest, edits, target, to, dtype, type)
    print(
        f"{target}: reads back with {parity.checked_with}, {parity.written_difference:.2g} from what was written at most "
        f"(allowed: {parity.tolerance:.2g}); rounding to {parity.dtype} moved logits by {parity.largest_difference:.2g} at most"
    )


@app.command(
    epilog="[bold]fettle sample fettle/tiny -o runs/own.jsonl --rows 2000[/bold]; stopped, the same command goes on"
)
def sample(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="file of JSON lines to write")],
    rows: Annotated[int, typer.Option(help="how many texts")] = 1000,
    length: Annotated[int, typer.Option(help="most tokens of a text")] = 256,
    temperature: Annotated[
        float, typer.Option(help="of the tokens after the first few, which are the likeliest")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of start tokens and sampling")] = 0,
) -> None:
    """Let a model write texts of its own, to adapt it where there is no data (LLM-QAT)."""
    from rich.console import Console
    from rich.progress import Progress

    from fettle.core.config import validate
    from fettle.generate.own import OwnText, write_own
    from fettle.stages import open_model

    said = {"rows": rows, "length": length, "temperature": temperature, "seed": seed}
    spec = validate(OwnText, said, "fettle sample")
    forest, _ = open_model(model)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("texts", total=rows)
        write_own(forest, output, spec, model, lambda count: bar.advance(task, count))
    print(output)


@app.command(epilog="[bold]fettle delta runs/mine -o runs/mine-delta --data runs/lab/instructions.jsonl[/bold]")
def delta(
    tuned: Annotated[str, typer.Argument(help="the fine-tune: a run or artifact folder, a model folder or a hub id")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder that receives the artifact")],
    base: Annotated[str | None, typer.Option(help="its base; default: the one that an artifact names")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="texts to distil the scales on; may be given several times")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps of distilling")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="seed of distilling")] = 0,
) -> None:
    """Hold a fine-tune as its base and one bit a weight (BitDelta); with data, its scales are trained towards its logits."""
    from fettle.stages.tenants import make_delta

    print(make_delta(tuned, output, base, data or (), steps, seed))


app.command("label", epilog=LABEL)(label)


@app.command(epilog="[bold]fettle schema > recipe.schema.json[/bold]")
def schema() -> None:
    """Print the JSON Schema of a recipe, for an editor's completion."""
    from fettle import stages

    print(json.dumps(stages.schema(), indent=2))


if __name__ == "__main__":
    main()
