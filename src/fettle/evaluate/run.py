"""Run evaluations: prompts rendered as in training, answers generated or scored by likelihood, intervals by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fettle.core import FettleError
from fettle.core.files import sha256
from fettle.evaluate.labels import Labels, Tags, columns_of, score_tags, score_texts
from fettle.evaluate.likelihood import Question, from_tokens, likelihoods, question
from fettle.evaluate.perplexity import Perplexity, perplexity
from fettle.evaluate.preference import Preferences, holds_preferences, score_preferences
from fettle.evaluate.results import Result, Results, Row
from fettle.evaluate.tasks import Evaluation, Item, TaskFile
from fettle.generate.prompts import Prompter, prompter
from fettle.generate.sample import Sampling, generate

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def evaluate(
    forest: Forest,
    specs: Sequence[Evaluation],
    folder: Path | None = None,
    *,
    model: dict[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Run every evaluation; where `folder` is given, leave results.json and results.png in it.

    `model` is what the results say of the model beside its spec (an artifact's name and hash).
    """
    about = {
        "path": forest.spec.path,
        "revision": forest.spec.revision,
        "dtype": str(forest.model.dtype).removeprefix("torch."),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = []
    with Progress(*columns, transient=True) if progress else nullcontext() as shown:
        for spec in specs:
            task = shown.add_task(Path(spec.path).name, total=None) if shown else None

            def advance(n: int, total: int | None = None, task: Any = task) -> None:
                if shown:
                    shown.update(task, advance=n, total=total)

            found.append(_one(forest, spec, advance))
    results = Results({**about, **(model or {})}, tuple(found))
    if folder is not None:
        results.write(folder)
    return results


def _one(forest: Forest, spec: Evaluation, advance: Callable[..., None]) -> Result:
    match spec:
        case Perplexity():
            score, about = perplexity(forest, spec, advance)
            return Result(
                name=Path(spec.path).name, kind=spec.kind, sha256=sha256(Path(spec.path)),
                settings=spec.model_dump(mode="json") | {k: about[k] for k in ("context", "stride")}, scores={"perplexity": score}, about=about,
            )  # fmt: skip
        case TaskFile():
            return run_tasks(forest, spec, advance)
        case Labels():
            return score_texts(forest, spec, advance)
        case Tags():
            return score_tags(forest, spec, advance)
        case Preferences():
            return score_preferences(forest, spec, advance)
    raise FettleError(f"{spec.path}: no way to run an evaluation of kind {type(spec).__name__}")


def run_tasks(forest: Forest, spec: TaskFile, advance: Callable[..., None] = lambda *_: None) -> Result:
    """Generate or score every row of a task file."""
    items = spec.examples()
    advance(0, len(items))
    shown = spec.shown(items)
    render = prompter(forest.tokenizer)
    rows = dict(_generated(forest, spec, items, shown, render, advance))
    rows |= dict(_chosen(forest, items, shown, render, advance))
    chats = any(item.messages for item in items)
    about = {
        "template": render.template_name if chats else None,
        "template_hash": render.template_hash if chats else None,
        "unfinished": sum(row.reason in ("length", "context") for row in rows.values()),
    }
    return Result.of_rows(
        name=Path(spec.path).name, sha256=sha256(Path(spec.path)), settings=spec.model_dump(mode="json"),
        rows=[rows[i] for i in range(len(items))], about=about,
    )  # fmt: skip


def prompt_text(item: Item, shown: Sequence[Item], render: Prompter) -> str:
    """What the model reads before it answers: the shown examples as earlier turns, or as solved prompts above."""
    if not item.messages:
        return "".join(f"{s.prompt}{_joined(s)}\n\n" for s in shown) + item.prompt
    start = 1 if item.messages[0]["role"] == "system" else 0
    turns = [
        t for s in shown for t in (*s.messages, {"role": "assistant", "content": s.solution}) if t["role"] != "system"
    ]
    return render.chat_text([*item.messages[:start], *turns, *item.messages[start:]])


def _joined(item: Item) -> str:
    """The solution as it follows the prompt: after a space where neither brings one."""
    bare = item.choices or item.prompt[-1:].isspace() or item.solution[:1].isspace()
    return item.solution if bare else f" {item.solution}"


def _encoder(item: Item, render: Prompter) -> Callable[[str], list[int]]:
    return render.encoder.ids if item.messages else render.plain


def _generated(
    forest: Forest, spec: TaskFile, items: Sequence[Item], shown: Sequence[Sequence[Item]], render: Prompter, advance: Callable[..., None]
) -> list[tuple[int, Row]]:  # fmt: skip
    index = [i for i, item in enumerate(items) if not item.choices]
    prompts = [_encoder(items[i], render)(prompt_text(items[i], shown[i], render)) for i in index]
    bound = forest.context
    for i, prompt in zip(index, prompts, strict=True):
        if bound and len(prompt) >= bound:
            raise FettleError(
                f"{items[i].where}: the prompt has {len(prompt)} tokens, and the model sees {bound} at most; shorten the row or lower shots"
            )
    sampling = Sampling(max_tokens=spec.max_tokens, temperature=spec.temperature, stop=spec.stop, seed=spec.seed)
    answers = generate(forest, prompts, sampling, seeds=index, progress=advance)
    return [
        (i, Row.of(items[i], spec.score(items[i], answer.text), answer.text, answer.reason, len(prompt)))
        for i, prompt, answer in zip(index, prompts, answers, strict=True)
    ]


def _chosen(
    forest: Forest,
    items: Sequence[Item],
    shown: Sequence[Sequence[Item]],
    render: Prompter,
    advance: Callable[..., None],
) -> list[tuple[int, Row]]:
    index = [i for i, item in enumerate(items) if item.choices]
    asked: list[Question] = []
    for i in index:
        text = prompt_text(items[i], shown[i], render)
        encode = _encoder(items[i], render)
        if forest.config.is_encoder_decoder:  # the prompt is read, the choice is written: no token is of both
            source = encode(text)
            pairs = [(source, render.encoder.ids(choice)) for choice in items[i].choices]
            asked.append(from_tokens(pairs, items[i].where))
        else:
            asked.append(question(encode, text, items[i].choices, items[i].where))
    rows = []
    for i, q, found in zip(index, asked, likelihoods(forest, asked, advance), strict=True):
        item, logps = items[i], [logp for logp, _ in found]
        pick = max(range(len(logps)), key=logps.__getitem__)
        fair = max(range(len(logps)), key=lambda j: logps[j] / len(item.choices[j]))
        row = Row.of(item, float(pick == item.right), item.choices[pick], "", len(q.prompt), float(fair == item.right))
        rows.append((i, row))
    return rows


def find(paths: Sequence[str], *, seed: int = 0, shots: int = 0, limit: int | None = None) -> list[Evaluation]:
    """What `fettle eval` runs: task files (*.jsonl), labelled texts or words and preferences (*.jsonl, by their columns) and
    texts for perplexity (*.txt), given singly or as folders of them."""
    found: list[Evaluation] = []
    for name in paths:
        path = Path(name)
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".txt")) if path.is_dir() else [path]
        if not files:
            raise FettleError(f"{path}: no task files (*.jsonl) or texts (*.txt) in this folder")
        for file in files:
            if file.suffix == ".txt":
                found.append(Perplexity(path=str(file), seed=seed))
            elif holds_preferences(file):
                found.append(Preferences(path=str(file), seed=seed, limit=limit))
            elif kind := columns_of(file):
                found.append(kind(path=str(file), seed=seed, limit=limit))
            else:
                found.append(TaskFile(path=str(file), seed=seed, shots=shots, limit=limit))
    return found
