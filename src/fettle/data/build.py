"""From a source to encoded examples on disk, once: read, format, render, tokenize, write; bad rows set aside on the way."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fettle.core.errors import FettleError
from fettle.core.files import new_folder, sha256, write_bytes
from fettle.core.locks import locked
from fettle.data import hub
from fettle.data.folders import files, kind_of_file
from fettle.data.formats import Sample, detect, in_turns, to_sample, unused_notes
from fettle.data.forms import LABELLED
from fettle.data.parse import BadRow, strings
from fettle.data.read import Row, head_of, split_of
from fettle.data.render import Job, worker
from fettle.data.rows import rows_of
from fettle.data.spec import DataSpec
from fettle.data.store import ASIDE, Store, Writer, cached, open_store
from fettle.data.template import Encoder

VERSION = 7  # raised whenever the same data would be encoded otherwise
LOOK = 32  # rows that tell a format
CHUNK, CHUNK_CHARACTERS = 1024, 4 << 20
SHOWN = 10  # bad rows named in full
UNFILLED = re.compile(r"\{\{ *\w+ *\}\}")
HOPELESS = 1000  # bad rows without a single good one


def encoded(spec: DataSpec, encoder: Encoder, cache: Path) -> Store:
    """The source's examples, from the cache where they are there. FettleError where it has too many bad rows.

    Of several processes one encodes, and the others wait for it.
    """
    encoder = encoder.learning(spec.learn)
    name = _key(spec, encoder)

    def wait(who: str) -> None:
        Console(stderr=True).print(f"{spec.path}: {who} encodes the same data; waiting for it")

    with locked(cache / f".{name}.lock", wait):
        return cached(cache, name) or _build(spec, encoder, cache / name)


def _key(spec: DataSpec, encoder: Encoder) -> str:
    decides = spec.model_dump(
        include={"path", "format", "template", "chat", "learn", "documents", "limit", "name", "split", "revision"}
    )
    # max_bad decides whether there is a store at all, so it belongs to the key too
    parts = [VERSION, decides, spec.max_bad, _content(spec), encoder.identity()]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()[:32]


def _content(spec: DataSpec) -> Any:
    """What a source holds now: a data set's commit, or its files with their hashes."""
    if spec.is_hub:
        return hub.commit(spec)
    return [(str(file), file.stat().st_size, sha256(file)) for file in files(spec.path)]


def content_hash(spec: DataSpec) -> str:
    """One hash over what a source holds now."""
    return hashlib.sha256(orjson.dumps(_content(spec))).hexdigest()


def _build(spec: DataSpec, encoder: Encoder, folder: Path) -> Store:
    with new_folder(folder) as aside:
        job = _Build(spec, encoder, Writer(aside, len(encoder.tokenizer)))
        try:
            with _progress(spec) as advance:
                job.run(rows_of(spec, advance))
            job.check()
        except FettleError as error:
            raise job.blame(error, folder) from None
        finally:
            job.writer.stop()
        job.writer.close(job.manifest(folder))
    return open_store(folder)


@contextmanager
def _progress(spec: DataSpec) -> Iterator[Any]:
    """A bar over the bytes of the files, on a terminal; gives the function that moves it."""
    total = None if spec.is_hub else sum(file.stat().st_size for file in files(spec.path))
    console = Console(stderr=True)
    columns = (
        TextColumn("reading {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("MB"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(spec.path, total=total and total / 1e6)
        yield lambda size: bar.advance(task, size / 1e6)


class _Build:
    """One source on its way to disk."""

    def __init__(self, spec: DataSpec, encoder: Encoder, writer: Writer) -> None:
        self.spec, self.encoder, self.writer = spec, encoder, writer
        self.format = ""
        self.read = self.kept = self.bad = self.control = self.unfilled = 0
        self.unused: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self.chats = self.tools = False
        self.columns: set[str] = set()
        self.marks = encoder.control_tokens()

    def run(self, rows: Iterator[Row]) -> None:
        """Encode every row."""
        first = list(islice(rows, LOOK))
        self.format = self._format(first)
        for chunk in _chunks(chain(first, rows)):
            self._chunk(chunk)
            if self.bad >= HOPELESS and not self.kept:
                raise FettleError(f"{self.spec.path}: none of the first {self.read} rows can be used")

    def _format(self, first: list[Row]) -> str:
        said = "template" if self.spec.template is not None else self.spec.format
        values = [row.value for row in first if row.value is not None]
        if said == "auto" and not values:
            why = f"; {first[0].where}: {first[0].problem}" if first else "; it holds no rows"
            raise FettleError(f"{self.spec.path}: no row can be read, so its format is not known{why}")
        if self.encoder.form is not None:
            found = self.encoder.form.format(self.spec, values)
        elif said in LABELLED:
            raise FettleError(f"{self.spec.path}: rows of format: {said} are for a model with task: {LABELLED[said]}")
        else:
            found = detect(values, self.spec.path) if said == "auto" else said
        if said != "auto":
            return found
        self.notes.append(f"{self.spec.path}: format {found}, by its columns")
        return found

    def _chunk(self, rows: list[Row]) -> None:
        self.read += len(rows)
        good: list[tuple[Row, Sample]] = []
        for row, sample in zip(rows, self._samples(rows), strict=True):
            if isinstance(sample, str):
                self._set_aside(row, sample)
            else:
                good.append((row, sample))
        for (row, sample), found in zip(good, self.encoder.encode([s for _, s in good]), strict=True):
            if isinstance(found, str):
                self._set_aside(row, found)
            elif not any(example.learned for example in found):
                self._set_aside(row, "nothing in it is learned")
            else:
                self.kept += 1
                said = sample.answers or (sample,)
                self.chats = self.chats or any(one.kind == "chat" for one in said)
                self.tools = self.tools or any(one.tools for one in said)
                self.unused[sample.unused] += 1
                self._look(row)
                self.writer.add(row.where, found)

    def _look(self, row: Row) -> None:
        """Count what is probably not meant, though it can be learned."""
        texts = list(strings(row.value))
        self.control += any(self.marks.search(text) for text in texts) if self.marks else 0
        self.unfilled += any("{{" in text and UNFILLED.search(text) for text in texts)

    def _samples(self, rows: list[Row]) -> list[Sample | str]:
        found: list[Sample | str] = []
        for row in rows:
            if row.value is None or self.format == "template":
                found.append(row.problem or "")
                continue
            try:
                found.append(self._dressed(to_sample(row.value, self.format), default=False))
            except BadRow as problem:
                found.append(str(problem))
        if self.format == "template":
            wanted = [i for i, row in enumerate(rows) if row.value is not None]
            for i, sample in zip(wanted, self._templated([rows[i].value or {} for i in wanted]), strict=True):
                found[i] = sample
        return found

    def _templated(self, values: list[dict[str, Any]]) -> list[Sample | str]:
        """Rows through the recipe's own template."""
        jobs = [Job(self.spec.template or "", value, strict=True) for value in values]
        try:
            renderings = worker(self.encoder.now).render(jobs)
        except FettleError as error:
            raise FettleError(f"{self.spec.path}: {error}") from None
        return [r.error or self._of_text(r.text, v) for r, v in zip(renderings, values, strict=True)]

    def _of_text(self, text: str, value: dict[str, Any]) -> Sample | str:
        parts = [part.strip() for part in text.split("|||")]
        if len(parts) > 2:
            return "the template's text holds '|||' more than once"
        row = {"prompt": parts[0], "completion": parts[1]} if len(parts) == 2 else {"text": parts[0]}
        try:
            sample = to_sample(
                row | ({"weight": value["weight"]} if "weight" in value else {}),
                "completion" if len(parts) == 2 else "text",
            )
            return self._dressed(sample, default=True)
        except BadRow as problem:
            return (
                str(problem)
                .replace("'completion' is", "the part after '|||' is")
                .replace("'text' is", "the template's text is")
            )

    def _dressed(self, sample: Sample, default: bool) -> Sample:
        """A prompt and its completion as a conversation, where the recipe wants that."""
        wanted = default if self.spec.chat is None else self.spec.chat
        labels = self.encoder.form is not None and self.encoder.form.labels
        return in_turns(sample) if wanted and not labels else sample

    def _set_aside(self, row: Row, reason: str) -> None:
        self.bad += 1
        if len(self.reasons) < SHOWN or row.lost:
            self.reasons.append(f"{row.where}: {reason}")
        self.writer.set_aside(row.where, reason, row.raw, row.value)

    def check(self) -> None:
        """FettleError where too many rows are bad or none is left."""
        if not self.read:
            raise FettleError(f"{self.spec.path}: holds no rows")
        if self.bad > self.spec.max_bad * self.read:
            need = -(-self.bad * 1000 // self.read) / 1000
            raise FettleError(
                f"{self.spec.path}: {self.bad} of {self.read} rows cannot be used, more than max_bad: {self.spec.max_bad:g} allows; "
                f"mend them, or say max_bad: {min(need, 1):g}"
            )
        if not self.kept:
            raise FettleError(f"{self.spec.path}: none of its {self.read} rows can be used")

    def blame(self, error: FettleError, folder: Path) -> FettleError:
        """The error with the first bad rows, and the file of them all, which outlives the folder."""
        if not self.bad:
            return error
        self.writer.aside.flush()
        kept = folder.with_name(f"{folder.name}.{ASIDE}")
        write_bytes(kept, (self.writer.folder / ASIDE).read_bytes())
        more = f"\n  ... and {self.bad - len(self.reasons)} more" if self.bad > len(self.reasons) else ""
        return FettleError(
            str(error) + "".join(f"\n  {r}" for r in self.reasons) + more + f"\n  all of them, with reasons: {kept}"
        )

    def manifest(self, folder: Path) -> dict[str, Any]:
        """What is kept beside the arrays."""
        if self.bad:
            self.notes += self.reasons
            self.notes.append(f"{self.spec.path}: {self.bad} of {self.read} rows set aside in {folder / ASIDE}")
        if self.control:
            self.notes.append(
                f"{self.spec.path}: {self.control} rows hold a control token of the tokenizer in their text"
            )
        if self.chats and self.encoder.template.name == "join":
            self.notes.append(
                f"{self.spec.path}: the tokenizer has no chat template, so a source is its turns, one below the other"
            )
        if self.tools and "tools" not in self.encoder.template.of(True):
            self.notes.append(
                f"{self.spec.path}: the chat template knows no functions; they and their calls are written as text"
            )
        self.notes += unused_notes(self.spec.path, self.unused)
        if self.unfilled:
            self.notes.append(
                f"{self.spec.path}: {self.unfilled} rows hold a place to fill in, such as {{{{name}}}}, which would be learned as it is"
            )
        if self.format == "text" and not self.spec.is_hub:
            self.notes += self._documents()
        template = self.encoder.template.name if self.chats else ""
        kind = "text" if self.format == "template" and not self.chats and not self._answers() else self.format
        return {
            "read": self.read,
            "kept": self.kept,
            "bad": self.bad,
            "format": kind,
            "template": template,
            "notes": self.notes,
        }

    def _answers(self) -> bool:
        return "|||" in (self.spec.template or "")

    def _documents(self) -> list[str]:
        names = {
            "line": "one document a line",
            "block": "one document a block between blank lines",
            "file": "the file is one document",
        }
        texts = [file for file in files(self.spec.path) if kind_of_file(file) == "text"]
        return [
            f"{f}: {names[split_of(head_of(f)) if self.spec.documents == 'auto' else self.spec.documents]}"
            for f in texts[:SHOWN]
        ]


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in lists of bounded number and size."""
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += (
            sum(len(text) for text in row.value.values() if isinstance(text, str)) + 64 if row.value else len(row.raw)
        )
        if len(chunk) >= CHUNK or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
