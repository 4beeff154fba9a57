"""The reference of a stage: what its objective holds the policy to, without a second copy of the base where that can be.

    off       the same weights with what trains switched off; nothing to keep
    cached    log-probabilities of every answer, computed once before the first step: <cache>/reference-<key>.npy, where the key
              is of the data, of the base and its edits, so that a second run finds them
    copy      a second model in memory, asked at every step
    a folder  another model or artifact, cached likewise and let go

Shapes: n examples of a source, MOST answers of an example; NaN where there is none, or none was asked for yet.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from rich.progress import track
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, new_file, sha256
from fettle.data.mix import ROWS
from fettle.data.packing import plan
from fettle.data.ranked import MOST
from fettle.data.source import Corpus
from fettle.models import roles
from fettle.models.forest import Forest
from fettle.models.load import base_hash, folder_of
from fettle.objectives.answers import Answers, answer_logps
from fettle.objectives.kto import KTO, mismatched
from fettle.stages.artifact import find_artifact, open_model
from fettle.train.parallel import World

VERSION = 1  # raised whenever the same model and data would give otherwise
WORDS = ("auto", "off", "cached", "copy")


def mode_of(forest: Forest, objective: Any) -> str | None:
    """How an objective comes by its reference: one of 'off', 'cached', 'copy', or a model's name; None where it has none."""
    wanted: str | None = getattr(objective, "reference", None)
    if wanted is None or wanted not in ("auto", "off"):
        return wanted
    why = roles.obstacle(forest.model)
    if wanted == "off" and why:
        raise FettleError(f"objective.reference: off cannot be had, since {why}; say cached, or copy")
    return "cached" if why else "off"


@contextmanager
def begun(forest: Forest) -> Iterator[Forest]:
    """Within it, and before the first step, the model from before this stage: no gradients, no dropout."""
    if roles.obstacle(forest.model) is None:
        with forest.reference() as before:
            yield before
        return
    with torch.no_grad(), roles.unrounded(forest.model), roles.evaluating(forest.model):
        yield forest


class Copy:
    """A second model in memory."""

    def __init__(self, forest: Forest) -> None:
        self.forest, self.bound = copy.copy(forest), forest.context
        with roles.unrounded(forest.model):
            self.forest.model = copy.deepcopy(forest.model)
        if roles.obstacle(forest.model) is None:
            for module in roles.switches(self.forest.model, roles.trained(self.forest.model)):
                module.enabled = False
        self.forest.model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, units: np.ndarray, batch: Batch) -> dict[str, Tensor]:
        """What a batch brings of the reference."""
        return {"reference": _by_example(self.forest, batch), **_of_mismatched(self.forest, batch, self.bound)}


@dataclass
class Kept:
    """Log-probabilities from before the first step, of a corpus' answers; with KTO of its rows' mismatched answers too."""

    corpus: Corpus
    judged: bool
    other: str | None = None  # a model by its name, where it is not the policy itself
    tables: list[np.ndarray] = field(default_factory=list)  # float32 [n, MOST], one a source
    mismatches: dict[bytes, float] = field(default_factory=dict)  # by the units of a row: the mean

    def __post_init__(self) -> None:
        self.tables = [np.full((len(s.store), MOST), np.nan, np.float32) for s in self.corpus.sources]
        self._bases = np.cumsum([0, *(len(s.units) for s in self.corpus.sources)])

    def __call__(self, units: np.ndarray, batch: Batch) -> dict[str, Tensor]:
        """What a batch brings of the reference."""
        rows = np.stack([table[at] for table, at in map(self._place, units.tolist())])
        found = {"reference": torch.from_numpy(rows)}
        if self.judged:
            found["reference_mismatched"] = torch.tensor(self.mismatches.get(units.tobytes(), np.nan))
        return found

    def _place(self, unit: int) -> tuple[np.ndarray, int]:
        number = int(np.searchsorted(self._bases, unit, side="right")) - 1
        return self.tables[number], int(self.corpus.sources[number].units.example[unit - int(self._bases[number])])

    def fill(
        self, forest: Forest, batches: int, identity: Any, folder: Path | None, world: World | None = None
    ) -> None:
        """Compute what the first `batches` batches need and `folder` does not hold; `identity` is all that decides about the model."""
        world, bound = world or World(), forest.context
        if self.other is not None:
            forest, identity = _opened(self.other, forest)
        files = [self._file(folder, s.store.folder.name, identity) for s in self.corpus.sources]
        for table, file in zip(self.tables, files, strict=True):
            if file is not None and file.is_file():
                table[:] = np.load(file, allow_pickle=False)
        needed, rows = self._needed(batches)
        missing = np.array([u for u in needed if np.isnan(self._row(u)[0])], dtype=np.int64)
        with begun(forest) as before:
            self._compute(before, missing, world)
            if self.judged:
                self._mismatch(before, rows, bound)
        if world.first and len(missing):
            for table, file in zip(self.tables, files, strict=True):
                if file is not None:
                    with new_file(file) as handle:
                        np.save(handle, table)
        world.wait()

    def _file(self, folder: Path | None, store: str, identity: Any) -> Path | None:
        key = hashlib.sha256(orjson.dumps([VERSION, MOST, store, identity])).hexdigest()[:32]
        return None if folder is None else folder / f"reference-{key}.npy"

    def _row(self, unit: int) -> np.ndarray:
        table, at = self._place(unit)
        return table[at]

    def _needed(self, batches: int) -> tuple[list[int], list[np.ndarray]]:
        """The units of the first batches, and the rows they come in."""
        total, needed = int(self._bases[-1]), set[int]()
        rows = []
        for index in range(batches):
            if len(needed) == total and not self.judged:
                break
            rows.append(self.corpus.units(index))
            needed |= set(rows[-1].tolist())
        return sorted(needed), rows

    def _compute(self, forest: Forest, units: np.ndarray, world: World) -> None:
        if not len(units):
            return
        lengths = np.array([len(self.corpus.example(int(u))) for u in units])
        laid = plan(lengths, self.corpus.length, True, 0, ROWS, 0)
        found = torch.zeros(len(units), MOST)
        for i in _shown(range(world.rank, len(laid), world.size), "reference"):
            row = laid.row(i)
            found[torch.from_numpy(row)] = _by_example(forest, self._plain(units[row])).cpu()
        world.sum([found])
        for unit, values in zip(units.tolist(), found.numpy(), strict=True):
            self._row(unit)[:] = values

    def _mismatch(self, forest: Forest, rows: list[np.ndarray], bound: int | None) -> None:
        for units in _shown([r for r in rows if r.tobytes() not in self.mismatches], "mismatched answers"):
            mean = _of_mismatched(forest, self._plain(units), bound).get("reference_mismatched")
            self.mismatches[units.tobytes()] = 0.0 if mean is None else float(mean)

    def _plain(self, units: np.ndarray) -> Batch:
        """The row without what it would bring of the reference."""
        beside, self.corpus.beside = self.corpus.beside, None
        try:
            return self.corpus.laid_out(units)
        finally:
            self.corpus.beside = beside


def refer(forest: Forest, objective: Any, corpora: list[Corpus]) -> None:
    """Let the batches of `corpora` bring what the objective needs of its reference; to be filled before the first step."""
    mode = mode_of(forest, objective)
    if mode is None or mode == "off":
        return
    second = Copy(forest) if mode == "copy" else None
    for corpus in corpora:
        corpus.beside = second or Kept(corpus, isinstance(objective, KTO), mode if mode not in WORDS else None)


def identity_of(forest: Forest, parent: Path | None, edits: Any, seed: int) -> list[Any]:
    """All that decides what the model is before the first step: of the own edits those that are not switched off for it."""
    spec = forest.spec
    base = spec.model_dump(mode="json", include={"path", "revision", "config", "seed", "task", "labels", "experts"})
    hashed = base_hash(folder_of(spec.path, spec.revision)) if spec.config is None else None
    off = [] if roles.obstacle(forest.model) else roles.trained(forest.model)
    rest = [e.model_dump(mode="json") for e in edits if not any(e is o or e == o for o in off)]
    own = [*rest, seed] if rest else []
    return [base, hashed, str(forest.dtype), parent and sha256(parent / MANIFEST), own]


def other_identity(name: str) -> list[Any]:
    """All that decides what another model is."""
    folder = find_artifact(name)
    return ["other", sha256(folder / MANIFEST) if folder is not None else base_hash(folder_of(name, None))]


def reference_identity(objective: Any) -> dict[str, Any]:
    """The same of an objective's reference, where that is another model; FettleError where it is none."""
    name = getattr(objective, "reference", "auto")
    if name in WORDS:
        return {}
    try:
        return {"reference": other_identity(name)}
    except FettleError as error:
        raise FettleError(f"objective.reference: {str(error).removeprefix('model: ')}") from error


def _opened(name: str, policy: Forest) -> tuple[Forest, list[Any]]:
    """Another model as a reference; FettleError where it reads other tokens."""
    forest, _ = open_model(name, **policy.spec.model_dump(include={"device", "dtype"}))
    ours, theirs = (f.tokenizer.get_vocab() for f in (policy, forest))
    if ours != theirs:
        raise FettleError(
            f"objective.reference: '{name}' has another tokenizer ({len(theirs):,} tokens, the policy's has {len(ours):,}), so its "
            "log-probabilities are of other tokens; take a model of the same family"
        )
    return forest, [*other_identity(name), str(forest.dtype)]


def _by_example(forest: Forest, batch: Batch) -> Tensor:
    """[E, MOST]: log-probabilities of the answers of each example, 0 where there is none."""
    answers = Answers.of(batch)
    logps = answer_logps(forest, batch, answers).float().cpu()
    found = torch.zeros(len(answers.weights), MOST)
    found[answers.owner, answers.place] = logps
    return found


def _of_mismatched(forest: Forest, batch: Batch, bound: int | None) -> dict[str, Tensor]:
    """`bound` is the policy's, whose answers are to be the same."""
    other = mismatched(batch, bound)
    if other is None:
        return {}
    return {"reference_mismatched": answer_logps(forest, other, Answers.of(other)).mean().float().cpu()}


def _shown(items: Any, what: str) -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    return track(list(items), description=what, console=console, transient=True, disable=not console.is_terminal)
