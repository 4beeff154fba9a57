"""Quantize: a model, a list of quantizing edits and a text to calibrate them on in; an artifact and a report out.

output/artifact/             the result (stages/artifact.py)
output/findings.json         what it was made of, the row of the table, every layer
output/report.md             one page to read
output/evaluation-before/    scores of the model as it was, output/evaluation/ of the quantized one
output/calibration/          what is done already, for --resume; gone when all is
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from rich.console import Console

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.files import MANIFEST, read_json, sha256, sweep, write_json
from fettle.core.spec import Spec, refuse
from fettle.data import DataSpec, content_hash, prepare
from fettle.data.forms import form_of
from fettle.data.rows import require_sources
from fettle.evaluate import EvalSpec, evaluate, require_evaluations, scored
from fettle.evaluate import problems as evaluation_problems
from fettle.models.blockwise import Blockwise
from fettle.models.forest import Forest
from fettle.models.load import identity_of_base
from fettle.models.memory import MemoryPlan, available, measure_peak, reset_peak, resident, weight_bytes
from fettle.models.spec import ModelSpec
from fettle.models.weight import count_weights
from fettle.quantize.calibrate import Calibration
from fettle.stages.artifact import TENSORS, drawing, is_artifact, open_artifact, outline_edits, save_artifact
from fettle.stages.check import Report
from fettle.stages.edits import AnyEdit, naming
from fettle.stages.findings import FINDINGS, findings, write_findings
from fettle.stages.heads import load_for
from fettle.train.agreement import require_same

ARTIFACT, KEPT, BEFORE, AFTER = "artifact", "calibration", "evaluation-before", "evaluation"
OF_A_RUN = ("device", "attention", "gradient_checkpointing")  # what a later stage may say of its model
LEAST_TOKENS = 256  # of all calibration text; fewer say next to nothing of what a layer is given


class CalibrationSpec(Spec):
    """The text that a method looks at."""

    data: tuple[DataSpec, ...] = Field(min_length=1)
    samples: int = Field(default=128, ge=1, description="rows of text")
    length: int = Field(default=512, ge=8, description="tokens of a row; also the longest example that fits")
    seed: int = Field(default=0, ge=0, description="which rows")
    disk: bool = Field(default=False, description="keep the activations of the block at work in files, not in memory")


class Quantize(Stage):
    """Quantize a model: the flat form of a recipe file with `kind: quantize`, and one item of `stages:`."""

    objective: ClassVar[None] = None
    data: ClassVar[tuple[DataSpec, ...]] = ()

    kind: Literal["quantize"] = "quantize"
    model: ModelSpec = Field(default_factory=ModelSpec)
    edits: tuple[AnyEdit, ...] = Field(min_length=1, description="what rescales and quantizes, in order")
    calibration: CalibrationSpec | None = Field(default=None, description="text; without it, methods that need none")
    evaluate: tuple[EvalSpec, ...] = Field(default=(), description="scores before and after")
    seed: int = Field(default=0, ge=0)
    cache: Path | None = Field(default=None, description="where tokenized data is kept; default: <output>/cache")

    @model_validator(mode="after")
    def _makes_sense(self) -> Quantize:
        refuse(self._senseless())
        return self

    def _senseless(self) -> Any:
        for i, edit in enumerate(self.edits):
            if edit.role not in ("quantizes", "rescales"):
                yield ("edits", i), f"{edit.kind} does not quantize; put it into a stage of kind: tune after this one"
            elif edit.calibrated and self.calibration is None:
                yield ("edits", i), f"{edit.kind} looks at text; add calibration: {{data: [{{path: ...}}]}}"
        if self.edits and all(edit.role == "rescales" for edit in self.edits):
            yield ("edits",), f"nothing is quantized after {self.edits[-1].kind}; add an edit such as {{kind: rtn}}"
        for i, edit in enumerate(self.edits):
            scaled = next((e.kind for e in self.edits[:i] if e.role == "rescales"), None)
            if scaled is not None and getattr(edit, "loftq", None) is not None:
                yield (
                    ("edits", i, "loftq"),
                    f"a later stage would find its update again from weights that {scaled} has not scaled; leave one of the two out",
                )
            if edit.role == "rescales" and any(e.role == "quantizes" for e in self.edits[:i]):
                yield ("edits", i), f"{edit.kind} scales weights that are packed by then; put it before the quantizer"

    def require_files(self, before: Sequence[Stage] = ()) -> None:
        """FettleError, by its key, where the text of the calibration or what is evaluated on is not there."""
        require_sources("calibration.data", self.calibration.data if self.calibration else ())
        require_evaluations(self.evaluate)

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Quantize and write the artifact; returns its folder."""
        target, kept, made = self.output / ARTIFACT, self.output / KEPT, self.made_of(parent)
        sweep(self.output)
        if resume and is_artifact(target):
            require_same(target, read_json(target / MANIFEST)["made_of"], made)
            if not (self.output / FINDINGS).exists() or not self._is_scored():
                scores = self._scored(self.open(parent)[0], BEFORE) if self.evaluate else []
                forest, _ = open_artifact(target, **self.model.model_dump(include=set(OF_A_RUN)))
                self._reported(target, forest, evaluation_before=scores)
            return target
        self._begin(target, kept, made, resume)
        forest, before = self.open(parent)
        batches = self.batches(forest)
        scored = self._scored(forest, BEFORE)
        write_json(kept / MANIFEST, made)
        began = time.time()
        reset_peak()
        try:
            calibrations = [self._edit(forest, i, edit, batches) for i, edit in enumerate(self.edits)]
        except FettleError:
            if not any(kept.rglob("*.safetensors")):  # nothing is done that another run could go on behind
                shutil.rmtree(kept)
            raise
        forest.model.requires_grad_(False)
        facts = findings(forest, self.edits, [c for c in calibrations if c is not None]) | {
            "recipe": self.model_dump(mode="json"), "made_of": made, "seconds": time.time() - began, "peak_bytes": measure_peak(forest.device),
            "parameters": count_weights(forest.model), "trained": 0, "evaluation_before": scored,
        }  # fmt: skip
        save_artifact(target, forest, (*before, *self.edits), facts)
        self._reported(target, forest)
        shutil.rmtree(kept, ignore_errors=True)
        return target

    def _begin(self, target: Path, kept: Path, made: dict[str, Any], resume: bool) -> None:
        """FettleError where the output holds another run."""
        if not resume and (target.exists() or kept.exists()):
            raise FettleError(f"{self.output}: holds a run already; go on with --resume, or choose another output")
        if resume and (kept / MANIFEST).exists():
            require_same(kept, read_json(kept / MANIFEST), made)
            return
        for name in (BEFORE, AFTER):  # scores that another run left, which was refused after them
            shutil.rmtree(self.output / name, ignore_errors=True)

    def _edit(self, forest: Forest, place: int, edit: Edit, batches: Sequence[Batch]) -> Calibration | None:
        """Apply one edit, with text where there is some."""
        with naming(place, edit), drawing(forest, self.seed, place):
            if not batches:
                edit.apply(forest.model)
                return None
            disk = self.calibration is not None and self.calibration.disk
            kept = self.output / KEPT
            states = kept / "states" if disk else None
            calibration = Calibration(forest, batches, states=states, kept=kept, place=place)
            edit.calibrate(forest.model, calibration)
            return calibration

    def _scored(self, forest: Forest, name: str) -> list[dict[str, Any]]:
        """Scores of a model as it is, read again where a run that goes on has them."""
        if not self.evaluate:
            return []
        found = scored(self.output / name, self.evaluate) or evaluate(forest, self.evaluate, self.output / name)
        return found.summary()

    def _is_scored(self) -> bool:
        names = (BEFORE, AFTER) if self.evaluate else ()
        return all(scored(self.output / name, self.evaluate) is not None for name in names)

    def _reported(self, target: Path, forest: Forest, **changed: Any) -> None:
        facts = read_json(target / MANIFEST) | changed
        size = (target / TENSORS).stat().st_size
        write_findings(self.output, facts | {"evaluation": self._scored(forest, AFTER), "file_bytes": size})

    def open(self, parent: Path | None) -> tuple[Forest, tuple[Edit, ...]]:
        """The model to quantize, frozen, and the edits it has."""
        before: tuple[Edit, ...] = ()
        if parent is None:
            forest = load_for(self.model, ())
        else:
            forest, before = open_artifact(parent, **self.model.model_dump(include=set(OF_A_RUN)))
        forest.model.requires_grad_(False)
        return forest, before

    def batches(self, forest: Forest) -> list[Batch]:
        """The rows of the calibration text; none where the recipe has none. FettleError where it is too short."""
        if self.calibration is None:
            return []
        wanted = self.calibration
        corpus = prepare(
            wanted.data, forest.tokenizer, wanted.length, seed=wanted.seed, cache=self.cache or self.output / "cache", form=form_of(forest),
            context=forest.context,
        )  # fmt: skip
        there = corpus.batches_per_epoch
        if there < wanted.samples:
            raise FettleError(
                f"calibration: the text is too short: its data fill {there} rows of {wanted.length} tokens, and {wanted.samples} are "
                f"asked for; give more text, or set calibration.samples to {there} or calibration.length lower"
            )
        found = [corpus.batch(i) for i in range(wanted.samples)]
        if (tokens := sum(batch.useful for batch in found)) < LEAST_TOKENS:
            raise FettleError(
                f"calibration: the text is too short: {tokens} tokens in all, and under {LEAST_TOKENS} say next to nothing of what "
                "layers are given; give more text, raise calibration.samples, or take an edit that needs none (rtn, hqq, nf4)"
            )
        return found

    def made_of(self, parent: Path | None = None) -> dict[str, Any]:
        """All that decides what comes out: the recipe, what its data hold, the parent's manifest or the base's files."""
        sources = self.calibration.data if self.calibration else ()
        return {
            "recipe": self.model_dump(mode="json", exclude={"output", "evaluate", "cache"}),
            "data": [[source.path, content_hash(source)] for source in sources],
            "parent": identity_of_base(self.model) if parent is None else sha256(parent / MANIFEST),
        }

    def preview(self, before: Sequence[Any]) -> Forest:
        """The model that this stage opens, as far as the stages `before` have run."""
        if before and is_artifact(parent := before[-1].output / ARTIFACT):
            return self.open(parent)[0]
        forest = load_for(before[0].model if before else self.model, before[0].data if before else ())
        return outline_edits(forest, [edit for stage in before for edit in stage.edits])

    def look(self, before: Sequence[Any], examples: int, console: Console, time_steps: bool = True) -> Report:
        """What `fettle check` says of it."""
        forest = self.preview(before)
        forest.model.requires_grad_(False)
        batches = self.batches(forest)
        states = 0
        if batches and not forest.config.is_encoder_decoder:
            with torch.no_grad():
                states = Blockwise(forest, batches).bytes()
        held = weight_bytes(forest.model)
        on_host = resident() if forest.device.type == "cpu" else 0
        plan = MemoryPlan(held, 0, 0, states, 0, runtime=max(0, on_host - held))
        return Report(
            name=str(self.output), parameters=count_weights(forest.model), trained=0, steps=0, memory=plan,
            room=available(forest.device) + on_host,
            problems=[f"evaluate.{i}: {what}" for i, what in evaluation_problems(forest, self.evaluate)],
        )  # fmt: skip
