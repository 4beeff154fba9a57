"""The teacher of a stage whose objective is distillation: opened, or asked once and kept on disk.

    left out       the student from before this stage: its edits switched off, no second copy of the base
    a path         another model or artifact with the same vocabulary, in memory beside the student
    cached: true   its top_k logits of every learned token, computed before the first step: <cache>/teacher-<key>/, where the key
                   is of the data, the teacher, top_k and the temperature, so that another run finds them; then it is let go

    ids.npy int32 [M, k]      logits.npy float32 [M, k]      norms.npy float32 [M, 2]: log sum exp(u / t), log p of the rest
    units.npy int64 [U]       offsets.npy int64 [U + 1]: the rows of each unit of the corpus

Shapes: M learned tokens of all units, U units, N learned tokens of a batch, k kept logits.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, new_folder, verify, write_json
from fettle.data.mix import ROWS
from fettle.data.packing import plan
from fettle.data.source import Corpus
from fettle.models.forest import Forest
from fettle.objectives.distill import GIVEN, Distill, Live, Says
from fettle.stages.artifact import open_model
from fettle.stages.reference import begun, other_identity
from fettle.train.parallel import World

VERSION = 1  # raised whenever the same model and data would give otherwise
FILES = {"ids": np.int32, "logits": np.float32, "norms": np.float32}


def taught(objective: Any, forest: Forest, corpora: Sequence[Corpus]) -> Any:
    """The objective with its teacher at hand; where that is to be cached, `corpora` bring what it says once `Said.fill` was called.

    FettleError where the teacher has another vocabulary, or where the student's edits cannot be switched off.
    """
    if not isinstance(objective, Distill):
        return objective
    if objective.teacher.cached:
        for corpus in corpora:
            corpus.beside = Said(corpus, objective)
        return objective
    if objective.teacher.path is None:
        return objective.taught_by(objective.teacher_in(forest))
    return objective.taught_by(Live(objective.temperature, objective.top_k, opened(objective, forest)))


def teacher_identity(objective: Any) -> dict[str, Any]:
    """What decides what another model teaches; nothing where the student is its own teacher."""
    if not isinstance(objective, Distill) or objective.teacher.path is None:
        return {}
    return {"teacher": other_identity(objective.teacher.path)}


def opened(objective: Distill, student: Forest) -> Forest:
    """Another model as the teacher, frozen. FettleError where it reads other tokens."""
    name = objective.teacher.path
    assert name is not None
    forest, _ = open_model(name, device=student.spec.device, dtype=objective.teacher.dtype)
    ours, theirs = (f.tokenizer.get_vocab() for f in (student, forest))
    if ours != theirs:
        raise FettleError(
            f"objective.teacher: '{name}' has another tokenizer ({len(theirs):,} tokens, the student's has {len(ours):,}), so it "
            "speaks of other tokens; take a teacher of the same family"
        )
    forest.model.requires_grad_(False).eval()
    return forest


class Said:
    """What a teacher says of every learned token of a corpus; until it was asked, the same of all tokens."""

    def __init__(self, corpus: Corpus, objective: Distill) -> None:
        assert objective.top_k is not None
        self.corpus, self.objective = corpus, objective
        vocabulary = len(corpus.tokenizer)
        self.width = min(objective.top_k, vocabulary - 1)
        self.blank = float(np.log(vocabulary)), float(np.log(1 - self.width / vocabulary))
        self.tables: dict[str, np.ndarray] | None = None
        self.offsets = np.zeros(1, np.int64)
        self.rows: dict[int, int] = {}  # the place of a unit among those that were asked about

    def __call__(self, units: np.ndarray, batch: Batch) -> dict[str, Tensor]:
        """What a batch brings of it: rows in the order of its learned tokens."""
        if self.tables is None:
            return self._nothing_yet(int((batch.targets != IGNORE).sum()))
        at = [self.rows[int(unit)] for unit in units]
        index = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in at])
        return {key: torch.from_numpy(self.tables[name][index]) for name, key in GIVEN.items()}

    def _nothing_yet(self, count: int) -> dict[str, Tensor]:
        ids = torch.arange(self.width, dtype=torch.int32).repeat(count, 1)
        norms = torch.tensor(self.blank).repeat(count, 1)
        return {GIVEN["ids"]: ids, GIVEN["logits"]: torch.zeros(count, self.width), GIVEN["norms"]: norms}

    def fill(
        self, student: Forest, batches: int, identity: Any, cache: Path | None, world: World | None = None
    ) -> None:
        """Ask the teacher about what the first `batches` batches hold, or find what it said in `cache`; None keeps nothing on disk.

        `identity` is all that decides what the student is before this stage, for where it is its own teacher.
        """
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="fettle-teacher-") as aside:
                self.fill(student, batches, identity, Path(aside), world)
                self.tables = {name: np.array(table) for name, table in (self.tables or {}).items()}
            return
        world, path, units = world or World(), self.objective.teacher.path, self._needed(batches)
        stores = [[s.store.folder.name, s.spec.long] for s in self.corpus.sources]
        of = identity if path is None else [*other_identity(path), self.objective.teacher.dtype]
        shared = int(student.config.get_text_config().vocab_size)
        key = [VERSION, stores, self.corpus.length, of, shared, self.width, self.objective.temperature, units.tolist()]
        folder = cache / f"teacher-{hashlib.sha256(orjson.dumps(key, default=str)).hexdigest()[:32]}"
        if world.first and not (folder / MANIFEST).is_file():
            if path is None:
                with begun(student) as before:
                    self._ask(student, before, units, folder)
            else:
                self._ask(student, opened(self.objective, student), units, folder)
        world.wait()
        verify(folder)
        self.tables = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FILES}
        self.offsets = np.load(folder / "offsets.npy")
        self.rows = {int(unit): i for i, unit in enumerate(units)}

    def _needed(self, batches: int) -> np.ndarray:
        """The units of the first batches, sorted."""
        found: set[int] = set()
        total = sum(len(s.units) for s in self.corpus.sources)
        for index in range(batches):
            found |= set(self.corpus.units(index).tolist())
            if len(found) == total:
                break
        return np.array(sorted(found), np.int64)

    @torch.no_grad()
    def _ask(self, student: Forest, teacher: Forest, units: np.ndarray, folder: Path) -> None:
        """Write the folder, a batch at a time."""
        examples = [self.corpus.example(int(u)) for u in units]
        counts = [sum(int((node.weights > 0).sum()) for node in e.nodes) for e in examples]
        first = [
            int(e.nodes[0].weights[0] > 0 and e.nodes[0].marks is None) for e in examples
        ]  # which nothing predicts
        offsets = np.concatenate([[0], np.cumsum(np.array(counts) - np.array(first))])
        laid = plan(np.array([len(e) for e in examples]), self.corpus.length, True, 0, ROWS, 0)
        source = Live(self.objective.temperature, self.width, teacher)
        with new_folder(folder) as aside:
            shapes = {"ids": self.width, "logits": self.width, "norms": 2}
            tables = {
                name: open_memmap(aside / f"{name}.npy", "w+", dtype, (int(offsets[-1]), shapes[name]))
                for name, dtype in FILES.items()
            }
            for i in _shown(range(len(laid))):
                row = laid.row(i)
                places = [slice(offsets[j], offsets[j + 1]) for j in row]
                self._write(student, source, self._plain(units[row]), places, tables)
            for table in tables.values():
                table.flush()
            np.save(aside / "units.npy", units)
            np.save(aside / "offsets.npy", offsets)
            write_json(aside / MANIFEST, {"kind": "teacher", "objective": self.objective.model_dump(mode="json")})

    def _write(
        self, student: Forest, source: Live, batch: Batch, places: list[slice], tables: Mapping[str, np.ndarray]
    ) -> None:
        learned = torch.nonzero(batch.targets != IGNORE).squeeze(-1)
        if len(learned) != sum(at.stop - at.start for at in places):
            raise FettleError("objective.teacher: cached: the learned tokens of a batch are not those of its examples")
        for name, rows in _in_pieces(source.targets(student, batch, learned), len(learned)).items():
            done = 0
            for at in places:
                size = at.stop - at.start
                tables[name][at] = rows[done : done + size]
                done += size

    def _plain(self, units: np.ndarray) -> Batch:
        """The batch without what it would bring of the teacher."""
        beside, self.corpus.beside = self.corpus.beside, None
        try:
            return self.corpus.laid_out(units)
        finally:
            self.corpus.beside = beside


def _in_pieces(says: Says, count: int, step: int = 256) -> dict[str, np.ndarray]:
    """All rows that a teacher has to say, as they are kept."""
    found: dict[str, list[Tensor]] = {name: [] for name in FILES}
    for start in range(0, count, step):
        target = says(slice(start, min(start + step, count)))
        assert target.ids is not None and target.rest is not None
        found["ids"].append(target.ids.int())
        found["logits"].append(target.logits.float())
        found["norms"].append(torch.stack([target.norm, target.rest], 1).float())
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items() if parts}


def _shown(items: Sequence[int]) -> Iterator[int]:
    console = Console(stderr=True)
    return iter(
        track(list(items), description="teacher", console=console, transient=True, disable=not console.is_terminal)
    )
