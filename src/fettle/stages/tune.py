"""Tune: a model, a list of edits, data and an objective in; an artifact and a report out.

output/artifact/            the result (stages/artifact.py)
output/report.md loss.png   one page to read
output/metrics.jsonl        a row a step
output/checkpoints/         what --resume goes on from
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.files import MANIFEST, read_json, sha256, sweep
from fettle.core.spec import Spec, refuse
from fettle.data import DataSpec, content_hash, prepare
from fettle.data.forms import form_of
from fettle.data.rows import require_sources, shared
from fettle.data.source import Corpus
from fettle.evaluate import EvalSpec, evaluate, require_evaluations, scored
from fettle.models.forest import Forest
from fettle.models.load import identity_of_base
from fettle.models.memory import reset_peak
from fettle.models.spec import ModelSpec
from fettle.models.weight import count_weights
from fettle.objectives import SFT, AnyObjective, Reward
from fettle.quantize.bitdelta import BitDelta
from fettle.quantize.linear import describe
from fettle.stages.artifact import (
    add_edits,
    apply_edits,
    is_artifact,
    open_artifact,
    outline_edits,
    require_model,
    save_artifact,
)
from fettle.stages.check import gate, preflight
from fettle.stages.deltas import bring, tuned_identity
from fettle.stages.edits import AnyEdit
from fettle.stages.heads import HEAD, headed_for, load_for, objective_for, with_head
from fettle.stages.reference import WORDS, Kept, identity_of, refer, reference_identity
from fettle.stages.report import write_report
from fettle.stages.sense import senseless
from fettle.stages.teacher import Said, taught, teacher_identity
from fettle.train import CheckpointSpec, Job, OptimSpec, Spent, Validation, ValidationSpec, fit
from fettle.train.agreement import require_same
from fettle.train.parallel import World

ARTIFACT, CHECKPOINTS, EVALUATION = "artifact", "checkpoints", "evaluation"
OF_A_RUN = ("device", "attention", "gradient_checkpointing")  # what a later stage may say of its model


class BatchSpec(Spec):
    """The fixed shape of a batch."""

    tokens: int = Field(default=2048, ge=8, description="tokens of a batch; also the longest example that fits")
    packing: bool = Field(default=True, description="false: one example a batch, for comparing")


class Recipe(Stage):
    """Tune a model: the flat form of a recipe file, and one item of `stages:`."""

    shared: ClassVar[bool] = True

    kind: Literal["tune"] = "tune"
    model: ModelSpec = Field(default_factory=ModelSpec)
    edits: tuple[AnyEdit, ...] = ()
    data: tuple[DataSpec, ...] = Field(min_length=1)
    objective: AnyObjective = SFT()
    optim: OptimSpec = OptimSpec()
    batch: BatchSpec = BatchSpec()
    validation: ValidationSpec | None = Field(default=None, description="a held-out loss while it trains")
    evaluate: tuple[EvalSpec, ...] = Field(default=(), description="scores after the run")
    checkpoint: CheckpointSpec = CheckpointSpec()
    seed: int = Field(default=0, ge=0)
    not_finite: Literal["stop", "skip"] = "stop"
    cache: Path | None = Field(default=None, description="where tokenized data is kept; default: <output>/cache")

    @model_validator(mode="after")
    def _makes_sense(self) -> Recipe:
        refuse(senseless(self))
        return self

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Train to the end and write the artifact; returns its folder."""
        target, world = self.output / ARTIFACT, World.join(self.optim.accumulate)
        if self._is_done(target, parent, world, resume):
            return target
        reset_peak()
        spent = Spent(self.output if resume else None)
        forest, edits = self.open(parent)
        corpus = self.corpus(forest)
        Console(stderr=True).print(corpus.table())
        steps = self.optim.length(corpus.batches_per_epoch)
        job = replace(self.job(forest, corpus, steps, resume, parent), spent=spent)
        if job.validation is not None:
            Console(stderr=True).print(job.validation.corpus.table("held-out data"))
        report = preflight(self, forest, corpus, job)
        gate(report)
        self.refer(job, self._cache, parent, world)
        last = fit(job)
        facts = self.facts(forest, corpus, steps, last)
        facts |= {"seconds": spent.seconds, "peak_bytes": spent.peak(forest.device)}
        facts |= {"made_of": job.made_of, "notes": report.notes, "predicted_bytes": report.memory.total}
        for edit in edits:
            edit.settle(forest.model)
        facts["quantized"] = describe(forest.model)
        self._leave(target, forest, edits, facts, world)
        return target

    def require_files(self, before: Sequence[Stage] = ()) -> None:
        """FettleError, by its key, where data, other models or what is evaluated on are not there, or held-out rows are trained on."""
        for key, ref in self.other_models():
            words = f"; the words for no other model are {', '.join(WORDS)}" if key == "objective.reference" else ""
            require_model(key, ref, before, words)
        held = self.validation.data if self.validation else ()
        require_sources("data", self.data)
        require_sources("validation.data", held)
        require_evaluations(self.evaluate)
        for i, source in enumerate(held):
            if (same := shared(source, self.data)) is not None:
                raise FettleError(
                    f"validation.data.{i}.path: '{same}' is also trained on, so its loss is not a held-out one; put rows "
                    "aside in a file of their own"
                )

    def other_models(self) -> Iterator[tuple[str, str]]:
        """The keys that name models besides its own without which it cannot be looked at, and what they name."""
        if (reference := getattr(self.objective, "reference", "auto")) not in WORDS:
            yield "objective.reference", reference
        if (teacher := getattr(self.objective, "teacher", None)) is not None and teacher.path is not None:
            yield "objective.teacher.path", teacher.path
        yield from ((f"edits.{i}.tuned", edit.tuned) for i, edit in enumerate(self.edits) if isinstance(edit, BitDelta))

    def _is_done(self, target: Path, parent: Path | None, world: World, resume: bool) -> bool:
        """Whether a resumed run has its artifact, with all that belongs to it. FettleError where the output holds another run."""
        if world.first:
            sweep(self.output)
        if resume and is_artifact(target):
            self._complete(target, parent, world)
            return True
        if not resume and (target.exists() or (self.output / CHECKPOINTS).exists()):
            raise FettleError(f"{self.output}: holds a run already; go on with --resume, or choose another output")
        return False

    def _leave(self, target: Path, forest: Forest, edits: Sequence[Edit], facts: dict[str, Any], world: World) -> None:
        """Write the artifact and the report, evaluate, and add the scores to the report."""
        if world.first:
            save_artifact(target, forest, edits, facts)
            write_report(self.output, facts)
        world.wait()
        found = self._evaluated(forest, world)
        if world.first and found:
            write_report(self.output, facts | found)

    def _complete(self, target: Path, parent: Path | None, world: World) -> None:
        """Write what a run that has its artifact still lacks. FettleError where it was another run."""
        facts = read_json(target / MANIFEST)
        require_same(target, facts["made_of"], self.made_of(parent))
        if not world.first:
            return
        if (results := scored(self.output / EVALUATION, self.evaluate)) is not None:
            found = {"evaluation": results.summary()}
        else:
            forest = open_artifact(target, **self.model.model_dump(include=set(OF_A_RUN)))[0] if self.evaluate else None
            found = self._evaluated(forest, world)
        write_report(self.output, facts | found)

    def _evaluated(self, forest: Forest | None, world: World) -> dict[str, Any]:
        """What the report says of the scores. Every process computes them, so that none waits; the first writes."""
        if forest is None or not self.evaluate:
            return {}
        folder = self.output / EVALUATION if world.first else None
        return {"evaluation": evaluate(forest, self.evaluate, folder, progress=world.first).summary()}

    def open(self, parent: Path | None) -> tuple[Forest, tuple[Edit, ...]]:
        """The model with the parent's edits (frozen) and this recipe's own; and the list of them all."""
        if parent is None:
            forest = load_for(headed_for(self.model, self.objective), self.data)
            edits = with_head(forest, self.edits)
            apply_edits(forest, edits, self.seed)
        else:
            forest, before = open_artifact(parent, **self._of_its_model())
            edits = (*before, *with_head(forest, self.edits))
            add_edits(forest, with_head(forest, self.edits), self.seed, len(before))
        bring(forest, self.edits)
        return forest, edits

    def _of_its_model(self) -> dict[str, Any]:
        """What a later stage says of the model it opens; a reward model's head too."""
        said = headed_for(self.model, self.objective).model_dump(include=set(OF_A_RUN))
        return said | (HEAD if isinstance(self.objective, Reward) else {})

    def preview(self, before: Sequence[Recipe]) -> Forest:
        """The model that `open` will give after the stages `before`; where those have not run, without what they learn."""
        if not before:
            return self.open(None)[0]
        if is_artifact(parent := before[-1].output / ARTIFACT):
            return self.open(parent)[0]
        spec = headed_for(before[0].model, before[0].objective).model_copy(update=self._of_its_model())
        forest = load_for(spec, before[0].data)
        edits = [*with_head(forest, before[0].edits), *(edit for stage in before[1:] for edit in stage.edits)]
        outline_edits(forest, edits)
        forest.model.requires_grad_(False)
        return add_edits(forest, with_head(forest, self.edits), self.seed, len(edits))

    def corpus(self, forest: Forest) -> Corpus:
        """The recipe's data, tokenized for its model."""
        corpus = self._prepared(self.data, forest, self.seed)
        if corpus.template is not None and not forest.tokenizer.chat_template:
            forest.tokenizer.chat_template = (
                corpus.template.text
            )  # the default that was trained on goes with the artifact
        return corpus

    def held_out(self, forest: Forest) -> Validation | None:
        """What the held-out loss is measured on, the same rows whatever the seed; None where there is none."""
        if self.validation is None:
            return None
        corpus = self._prepared(self.validation.data, forest, 0)
        return Validation(corpus, min(self.validation.batches, corpus.batches_per_epoch), self.validation.every)

    def _prepared(self, data: Sequence[DataSpec], forest: Forest, seed: int) -> Corpus:
        return prepare(
            data, forest.tokenizer, self.batch.tokens, seed=seed,
            cache=self._cache, packing=self.batch.packing, form=form_of(forest, self.objective.form), context=forest.context,
        )  # fmt: skip

    @property
    def _cache(self) -> Path:
        return self.cache or self.output / "cache"

    def refer(
        self, job: Job, cache: Path | None = None, parent: Path | None = None, world: World | None = None
    ) -> None:
        """Let the reference that the objective asks for say all that the job's batches need, before its weights move."""
        read = [(job.batches, job.steps * self.optim.accumulate)]
        read += [(job.validation.corpus, job.validation.count)] if job.validation else []
        for corpus, batches in read:
            if isinstance(corpus, Corpus) and isinstance(corpus.beside, Kept | Said):
                identity = identity_of(job.model, parent, self.edits, self.seed)
                corpus.beside.fill(job.model, batches, identity, cache, world)

    def made_of(self, parent: Path | None = None) -> dict[str, Any]:
        """All that decides what training gives: the recipe, what its data hold, the parent's manifest or the base's files."""
        return {
            "recipe": self.model_dump(mode="json", exclude={"output", "evaluate", "validation", "checkpoint", "cache"}),
            "data": [[source.path, content_hash(source)] for source in self.data],
            "parent": identity_of_base(self.model) if parent is None else sha256(parent / MANIFEST),
            **reference_identity(self.objective),
            **teacher_identity(self.objective),
            **tuned_identity(self.edits),
        }

    def job(self, forest: Forest, corpus: Corpus, steps: int, resume: bool = False, parent: Path | None = None) -> Job:
        """What the loop needs."""
        objective = objective_for(forest, self.objective, "objective" in self.model_fields_set)
        validation = self.held_out(forest)
        corpora = [corpus, *([validation.corpus] if validation else [])]
        refer(forest, objective, corpora)
        objective = taught(objective, forest, corpora)
        return Job(
            model=forest, objective=objective, batches=corpus, optim=self.optim, steps=steps, folder=self.output,
            edits=self.edits, seed=self.seed, checkpoints=self.checkpoint, not_finite=self.not_finite, made_of=self.made_of(parent),
            resume=resume, validation=validation,
        )  # fmt: skip

    def facts(self, forest: Forest, corpus: Corpus, steps: int, last: dict[str, float]) -> dict[str, Any]:
        """What the manifest and the report say of the run."""
        import transformers

        import fettle

        weights = list(forest.model.parameters())
        return {
            "recipe": self.model_dump(mode="json"),
            "unit": self.objective.unit,
            "steps": steps,
            "last": last,
            "data": corpus.describe(),
            "parameters": count_weights(forest.model),
            "trained": sum(p.numel() for p in weights if p.requires_grad),
            "quantized": describe(forest.model),
            "versions": {
                "fettle": fettle.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(), "machine": platform.machine(),
            },
        }  # fmt: skip
