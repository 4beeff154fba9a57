"""Tune: a model, a list of edits, data and an objective in; an artifact and a report out.

output/artifact/            the result (stages/artifact.py)
output/report.md loss.png   one page to read
output/metrics.jsonl        a row a step
output/checkpoints/         what --resume goes on from
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.spec import Spec
from fettle.data import DataSpec, prepare
from fettle.data.source import Corpus
from fettle.evaluate import EvalSpec, evaluate
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.memory import measure_peak, reset_peak
from fettle.models.spec import ModelSpec
from fettle.objectives import SFT, AnyObjective
from fettle.peft import AnyEdit
from fettle.stages.artifact import add_edit, apply_edits, is_artifact, open_artifact, save_artifact
from fettle.stages.check import gate, preflight
from fettle.stages.report import write_report
from fettle.train import CheckpointSpec, Job, OptimSpec, fit

ARTIFACT = "artifact"


class BatchSpec(Spec):
    """The fixed shape of a batch."""

    tokens: int = Field(default=2048, ge=8, description="tokens of a batch; also the longest example that fits")
    packing: bool = Field(default=True, description="false: one example a batch, for comparing")


class Recipe(Stage):
    """Tune a model: the flat form of a recipe file, and one item of `stages:`."""

    kind: Literal["tune"] = "tune"
    model: ModelSpec = Field(default_factory=ModelSpec)
    edits: tuple[AnyEdit, ...] = ()
    data: tuple[DataSpec, ...] = Field(min_length=1)
    objective: AnyObjective = SFT()
    optim: OptimSpec = OptimSpec()
    batch: BatchSpec = BatchSpec()
    evaluate: tuple[EvalSpec, ...] = ()
    checkpoint: CheckpointSpec = CheckpointSpec()
    seed: int = Field(default=0, ge=0)
    not_finite: Literal["stop", "skip"] = "stop"
    cache: Path | None = Field(default=None, description="where tokenized data is kept; default: <output>/cache")

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Train to the end and write the artifact; returns its folder."""
        target = self.output / ARTIFACT
        if target.exists() and resume and is_artifact(target):
            return target
        if (self.output / "checkpoints").exists() and not resume:
            raise FettleError(f"{self.output}: holds a run already; go on with --resume, or choose another output")
        began = time.time()
        reset_peak()
        forest, edits = self.open(parent)
        corpus = self.corpus(forest)
        Console(stderr=True).print(corpus.table())
        steps = self.optim.length(corpus.batches_per_epoch)
        job = self.job(forest, corpus, steps, resume)
        gate(preflight(str(self.output), forest, self.edits, corpus, job))
        last = fit(job)
        facts = self.facts(forest, corpus, steps, last) | {"seconds": time.time() - began, "peak_bytes": measure_peak()}
        save_artifact(target, forest, edits, facts)
        if self.evaluate:
            facts["evaluation"] = evaluate(forest, self.evaluate, self.output / "evaluation").summary()
        write_report(self.output, facts)
        return target

    def open(self, parent: Path | None) -> tuple[Forest, tuple[Edit, ...]]:
        """The model with the parent's edits (frozen) and this recipe's own; and the list of them all."""
        if parent is None:
            return apply_edits(load(self.model), self.edits, self.seed), self.edits
        forest, before = open_artifact(
            parent, **self.model.model_dump(include={"device", "attention", "gradient_checkpointing"})
        )
        for place, edit in enumerate(self.edits, len(before)):
            add_edit(forest, edit, self.seed, place)
        return forest, (*before, *self.edits)

    def corpus(self, forest: Forest) -> Corpus:
        """The recipe's data, tokenized for its model."""
        corpus = prepare(
            self.data, forest.tokenizer, self.batch.tokens, seed=self.seed,
            cache=self.cache or self.output / "cache", packing=self.batch.packing,
        )  # fmt: skip
        if corpus.template is not None and not forest.tokenizer.chat_template:
            forest.tokenizer.chat_template = (
                corpus.template.text
            )  # the default that was trained on goes with the artifact
        return corpus

    def job(self, forest: Forest, corpus: Corpus, steps: int, resume: bool = False) -> Job:
        """What the loop needs."""
        decides = self.model_dump(mode="json", exclude={"output", "evaluate", "checkpoint", "cache"})
        return Job(
            model=forest, objective=self.objective, batches=corpus, optim=self.optim, steps=steps, folder=self.output,
            seed=self.seed, checkpoints=self.checkpoint, not_finite=self.not_finite, recipe=decides, resume=resume,
        )  # fmt: skip

    def facts(self, forest: Forest, corpus: Corpus, steps: int, last: dict[str, float]) -> dict[str, Any]:
        """What the manifest and the report say of the run."""
        import transformers

        import fettle

        weights = list(forest.model.parameters())
        return {
            "recipe": self.model_dump(mode="json"),
            "steps": steps,
            "last": last,
            "data": corpus.describe(),
            "parameters": sum(p.numel() for p in weights),
            "trained": sum(p.numel() for p in weights if p.requires_grad),
            "versions": {
                "fettle": fettle.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(), "machine": platform.machine(),
            },
        }  # fmt: skip
