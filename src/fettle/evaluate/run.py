"""Run evaluations: prompts rendered as in training, answers generated or scored by likelihood, intervals by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fettle.core import FettleError
from fettle.core.files import sha256
from fettle.evaluate.labels import Labels, Tags, columns_of, labels_of, score_tags, score_texts
from fettle.evaluate.likelihood import Question, from_tokens, likelihoods, question, require_room
from fettle.evaluate.perplexity import Perplexity, perplexity, windows_of
from fettle.evaluate.preference import Preferences, holds_preferences, preferences_of, score_preferences
from fettle.evaluate.results import RESULTS, Result, Results, Row
from fettle.evaluate.tasks import Evaluation, Item, TaskFile, names_of
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

    `model` is what the results say of the model beside its spec (an artifact's name and hash). FettleError, before the model
    computes anything, names what of the files cannot be used.
    """
    if len(specs) > 1 and (wrong := problems(forest, specs)):  # one alone is looked at when it is made
        raise FettleError("\n".join(sentence for _, sentence in wrong))
    about = {
        "path": forest.spec.path,
        "revision": forest.spec.revision,
        "dtype": str(forest.dtype).removeprefix("torch."),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found = []
    with Progress(*columns, transient=True) if progress else nullcontext() as shown:
        for name, spec in zip(names_of(specs), specs, strict=True):
            task = shown.add_task(name, total=None) if shown else None

            def advance(n: int, total: int | None = None, task: Any = task) -> None:
                if shown:
                    shown.update(task, advance=n, total=total)

            found.append(replace(_one(forest, spec, advance), name=name))
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
                settings=spec.model_dump(mode="json"), scores={"perplexity": score}, about=about,
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


def require_evaluations(specs: Sequence[Evaluation]) -> None:
    """FettleError, by its key in a recipe, where a file of `evaluate` is not there."""
    for i, spec in enumerate(specs):
        if not Path(spec.path).exists():
            raise FettleError(f"evaluate.{i}.path: {spec.path}: no such file")


def problems(forest: Forest, specs: Sequence[Evaluation]) -> list[tuple[int, str]]:
    """What keeps evaluations from being made, found without the model's computing: (place in the list, sentence)."""
    found = []
    for i, spec in enumerate(specs):
        try:
            _look(forest, spec)
        except FettleError as error:
            found += [(i, sentence) for sentence in str(error).splitlines()]
    return found


def _look(forest: Forest, spec: Evaluation) -> None:
    match spec:
        case Perplexity():
            windows_of(forest, spec)
        case TaskFile():
            Posed.of(forest, spec)
        case Labels() | Tags():
            labels_of(forest, spec)
        case Preferences():
            preferences_of(forest, spec)


def scored(folder: Path, specs: Sequence[Evaluation]) -> Results | None:
    """The results that a folder holds, where they are of these evaluations: the same settings on the same files."""
    if not (folder / RESULTS).exists():
        return None
    found = Results.read(folder)
    files = [Path(spec.path) for spec in specs]
    wanted = [
        (spec.model_dump(mode="json"), sha256(f) if f.is_file() else "") for spec, f in zip(specs, files, strict=True)
    ]
    return found if [(r.settings, r.sha256) for r in found.results] == wanted else None


@dataclass(frozen=True)
class Posed:
    """The questions of a task file as the model will read them: `prompts` to answer and `choices` to weigh, by their place."""

    items: Sequence[Item]
    render: Prompter
    prompts: dict[int, list[int]]
    choices: dict[int, Question]

    @classmethod
    def of(cls, forest: Forest, spec: TaskFile) -> Posed:
        """FettleError names rows that are malformed, or longer than the model's context."""
        items = spec.examples()
        render = prompter(forest.tokenizer)
        prompts: dict[int, list[int]] = {}
        choices: dict[int, Question] = {}
        for i, (item, shown) in enumerate(zip(items, spec.shown(items), strict=True)):
            text = prompt_text(item, shown, render)
            if item.choices:
                choices[i] = _question(forest, item, text, render)
                continue
            prompts[i] = _encoder(item, render)(text)
            if forest.context and len(prompts[i]) >= forest.context:
                raise FettleError(
                    f"{item.where}: the prompt has {len(prompts[i])} tokens, and the model sees {forest.context} at most; "
                    "shorten the row or lower shots"
                )
        require_room(forest, list(choices.values()))
        return cls(items, render, prompts, choices)


def run_tasks(forest: Forest, spec: TaskFile, advance: Callable[..., None] = lambda *_: None) -> Result:
    """Generate or score every row of a task file."""
    posed = Posed.of(forest, spec)
    advance(0, len(posed.items))
    rows = {**_generated(forest, spec, posed, advance), **_chosen(forest, posed, advance)}
    chats = any(item.messages for item in posed.items)
    about = {
        "template": posed.render.template_name if chats else None,
        "template_hash": posed.render.template_hash if chats else None,
        "unfinished": sum(row.reason in ("length", "context") for row in rows.values()),
    }
    return Result.of_rows(
        name=Path(spec.path).name, sha256=sha256(Path(spec.path)), settings=spec.model_dump(mode="json"),
        rows=[rows[i] for i in range(len(posed.items))], about=about,
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


def _question(forest: Forest, item: Item, text: str, render: Prompter) -> Question:
    encode = _encoder(item, render)
    if not forest.config.is_encoder_decoder:
        return question(encode, text, item.choices, item.where)
    source = encode(text)  # the prompt is read, the choice is written: no token is of both
    return from_tokens([(source, render.encoder.ids(choice)) for choice in item.choices], item.where)


def _generated(forest: Forest, spec: TaskFile, posed: Posed, advance: Callable[..., None]) -> dict[int, Row]:
    sampling = Sampling(max_tokens=spec.max_tokens, temperature=spec.temperature, stop=spec.stop, seed=spec.seed)
    answers = generate(forest, list(posed.prompts.values()), sampling, seeds=list(posed.prompts), progress=advance)
    rows = {}
    for (i, prompt), answer in zip(posed.prompts.items(), answers, strict=True):
        item = posed.items[i]
        rows[i] = Row.of(item, spec.score(item, answer.text), answer.text, answer.reason, len(prompt))
    return rows


def _chosen(forest: Forest, posed: Posed, advance: Callable[..., None]) -> dict[int, Row]:
    rows = {}
    found = likelihoods(forest, list(posed.choices.values()), advance)
    for (i, asked), paths in zip(posed.choices.items(), found, strict=True):
        item, logps = posed.items[i], [logp for logp, _ in paths]
        pick = max(range(len(logps)), key=logps.__getitem__)
        fair = max(range(len(logps)), key=lambda j: logps[j] / len(item.choices[j]))
        score, normalised = float(pick == item.right), float(fair == item.right)
        rows[i] = Row.of(item, score, item.choices[pick], "", len(asked.prompt), normalised)
    return rows


def find(
    paths: Sequence[str], *, seed: int = 0, shots: int = 0, limit: int | None = None, chat: bool = False
) -> list[Evaluation]:
    """What `fettle eval` runs: task files (*.jsonl), labelled texts or words and preferences (*.jsonl, by their columns) and
    texts for perplexity (*.txt), given singly or as folders of them."""
    found: list[Evaluation] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise FettleError(f"{path}: no such task file, text or folder")
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".txt")) if path.is_dir() else [path]
        if not files:
            raise FettleError(f"{path}: no task files (*.jsonl) or texts (*.txt) in this folder")
        for file in files:
            if file.suffix == ".txt":
                found.append(Perplexity(path=str(file), seed=seed))
            elif holds_preferences(file):
                found.append(Preferences(path=str(file), seed=seed, limit=limit, chat=chat))
            elif kind := columns_of(file):
                found.append(kind(path=str(file), seed=seed, limit=limit))
            else:
                found.append(TaskFile(path=str(file), seed=seed, shots=shots, limit=limit))
    return found
