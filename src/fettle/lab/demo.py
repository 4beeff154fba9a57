"""The demo: check, tune, score before and after, read answers side by side, merge; all on the embedded base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fettle.core.files import write_json
from fettle.core.locks import alone_in
from fettle.evaluate import Results, TaskFile, compare, evaluate
from fettle.evaluate.results import difference_table, draw
from fettle.export import export
from fettle.generate import Sampling, generate, prompter
from fettle.lab.write import write_lab
from fettle.models.forest import Forest
from fettle.stages import check, load_recipe, open_model, run
from fettle.stages.recipes import recipe_file

TITLES = {"trained.jsonl": "trained clusters", "heldout.jsonl": "held-out clusters"}
EACH = 20  # items a family in the evaluations that are written; the demo scores some of them


def demo(data: str | None = None, short: bool = False, console: Console | None = None) -> Path:
    """Run the demo in ./runs/demo, which is its own and made anew; returns the artifact.

    `data` replaces the lab's instructions by a file of yours. FettleError, before anything is removed, where it is not there.
    """
    console = console or Console()
    lab, output = Path("runs/lab"), Path("runs/demo")
    changes = ["evaluate=[]", f"output={output}", *(["optim.steps=30"] if short else [])]
    recipe = load_recipe(
        recipe_file("quickstart.yaml"),
        [*changes, *([f"data=[{{path: {json.dumps(data, ensure_ascii=False)}}}]"] if data else [])],
    )
    if data:
        recipe.stages[0].require_files()
    with alone_in(output):  # refused where another demo tunes; `run` holds the folder again
        shutil.rmtree(output, ignore_errors=True)
    console.rule("the lab: a small world, its instructions and its tasks")
    written = write_lab(lab, documents=0, instructions=12_000, each=EACH)
    console.print("  ".join(f"{name}: {rows:,} rows" for name, rows in written.items()))
    console.rule(f"fettle check recipes/quickstart.yaml output={output}")
    check(recipe, examples=1 if short else 2, console=console)
    console.rule(f"fettle run recipes/quickstart.yaml output={output}")
    artifact = run(recipe)
    console.print(f"report: {output / 'report.md'}   picture: {output / 'loss.png'}")
    base, _ = open_model(str(recipe.stages[0].model.path))
    tuned, edits = open_model(str(artifact))
    console.rule("before and after")
    before_and_after(base, tuned, lab / "tasks", output, 3 if short else 8, console)
    answers({"base": base, "tuned": tuned}, lab / "tasks", console)
    console.rule(f"fettle export {output} --to hf -o {output / 'merged'}")
    parity = export(tuned, edits, output / "merged", "hf")
    console.print(
        f"{output / 'merged'}: reads back with {parity.checked_with}, logits {parity.written_difference:.2g} from what was written "
        f"at most (allowed: {parity.tolerance:.2g}); rounding to {parity.dtype} moved them by {parity.largest_difference:.2g} at most"
    )
    next_steps(output, console)
    return artifact


def before_and_after(base: Forest, tuned: Forest, tasks: Path, output: Path, each: int, console: Console) -> None:
    """Score both models on trained and on held-out families; print and draw the differences by cluster.

    The scores of every family are in evaluation/*/results.json, their differences in evaluation/differences.json.
    """
    found: dict[str, Results] = {}
    for name, model in (("before", base), ("after", tuned)):
        specs = [
            TaskFile(path=str(tasks / f"{part}.jsonl"), max_tokens=32, limit=each * _families(tasks / f"{part}.jsonl"))
            for part in ("trained", "heldout")
        ]
        found[name] = evaluate(model, specs, output / "evaluation" / name, model={"name": name})
    differences = compare(found["before"], found["after"])
    write_json(output / "evaluation" / "differences.json", {"differences": [asdict(d) for d in differences]})
    console.print(difference_table(differences, TITLES))
    draw(found, output / "before-after.png", TITLES)
    console.print(f"picture: {output / 'before-after.png'}")
    console.print(f"every family: {output / 'evaluation'}")


def answers(models: dict[str, Forest], tasks: Path, console: Console) -> None:
    """Three questions, and what each model says."""
    from fettle.evaluate.tasks import read_tasks

    items = read_tasks(tasks / "trained.jsonl")
    table = Table(show_lines=True)
    for head in ("question", "right", *models):
        table.add_column(head, overflow="fold")
    for item in (items[0], items[len(items) // 2], items[-1]):
        said = [_answer(model, item.messages) for model in models.values()]
        table.add_row(item.messages[-1]["content"], item.solution, *said)
    console.print(table)


def next_steps(output: Path, console: Console) -> None:
    """What to type next."""
    console.rule("next")
    for command, what in (
        (f"fettle chat {output} fettle/tiny", "talk to both, side by side"),
        (f"fettle eval {output} runs/lab/tasks", "every score, by family, with intervals"),
        ("fettle run recipes/quickstart.yaml optim.lr=1e-3", "another learning rate"),
        (f"fettle export {output} --to peft", "an adapter that peft and vLLM load"),
        ("fettle lab list", "the claims you can reproduce here"),
    ):
        console.print(f"  {command}\n      [dim]{what}[/dim]", highlight=False, soft_wrap=True)


def _answer(model: Forest, messages: Sequence[dict[str, str]]) -> str:
    render = prompter(model.tokenizer)
    prompt = render.encoder.ids(render.chat_text(list(messages)))
    return generate(model, [prompt], Sampling(max_tokens=40))[0].text


def _families(file: Path) -> int:
    return len(
        {line.split('"family": "')[1].split('"')[0] for line in file.read_text().splitlines() if '"family": "' in line}
    )
