"""A recipe file: one stage written flat, or several under `stages:`, each opening the artifact before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, PrivateAttr, TypeAdapter

from fettle.core.config import Document, read
from fettle.core.errors import FettleError
from fettle.core.families import Stage
from fettle.core.locks import alone_in
from fettle.core.spec import Spec, one_of
from fettle.stages.quantize import Quantize as Quantize  # a stage is known once it is imported
from fettle.stages.reinforce import Reinforce as Reinforce
from fettle.stages.tune import OF_A_RUN
from fettle.stages.versus import Versus as Versus
from fettle.train.parallel import World

AnyStage: TypeAlias = one_of(Stage, default="tune")  # type: ignore[valid-type]


class Pipeline(Spec):
    """Several stages in a row."""

    stages: tuple[AnyStage, ...] = Field(min_length=1)
    _document: Document | None = PrivateAttr(default=None)  # what it was read from

    def placed(self, number: int, sentences: str) -> str:
        """Sentences about stage `number`, each with the line or override that it is about, where it begins with a key."""
        if self._document is None:
            return sentences
        above = ("stages", number) if "stages" in self._document.data else ()
        return "\n".join(self._document.placed(sentence, above) for sentence in sentences.splitlines())

    def read_from(self, document: Document) -> Pipeline:
        """Itself, which from now on can tell lines."""
        self._document = document
        return self


def load_recipe(path: Path, overrides: Sequence[str] = (), kind: str | None = None) -> Pipeline:
    """A recipe file with `key=value` overrides; FettleError lists every mistake with its line. `kind`: of a flat one that names none.

    Relative paths of data and output are relative to where the command runs, as in a shell.
    """
    document = read(Path(path))
    if kind is not None and not {"kind", "stages"} & document.data.keys():
        document.data["kind"] = kind
    document = document.override(AnyStage | Pipeline, overrides)
    if "stages" not in document.data:
        return Pipeline(stages=(document.validate(AnyStage),)).read_from(document)
    pipeline: Pipeline = document.validate(Pipeline).read_from(document)
    outputs = [stage.output for stage in pipeline.stages]
    if len(set(outputs)) < len(outputs):
        raise FettleError(f"{path}: stages: two of them have the same output; each needs its own")
    _same_model(pipeline, document)
    return pipeline


def _same_model(pipeline: Pipeline, document: Document) -> None:
    """FettleError where a later stage names a model of its own, which it would not open."""
    first, *later = (stage.model for stage in pipeline.stages)
    for number, model in enumerate(later, 1):
        for key in sorted(model.model_fields_set - set(OF_A_RUN)):
            if getattr(model, key) != getattr(first, key):
                place = document.place(("stages", number, "model", key))
                raise FettleError(
                    f"{place}: stages.{number}.model.{key}: a later stage opens the artifact of the "
                    f"stage before it; of its model it can say {', '.join(OF_A_RUN)}"
                )


def run(recipe: Stage | Pipeline, resume: bool = False) -> Path:
    """Run a recipe to its end; returns the folder of the last artifact. FettleError where another process runs it now."""
    pipeline = recipe if isinstance(recipe, Pipeline) else Pipeline(stages=(recipe,))
    parent: Path | None = None
    for number, stage in enumerate(pipeline.stages):
        with _placing(pipeline, number):
            stage.require_files(pipeline.stages[:number])
    for number, stage in enumerate(pipeline.stages):
        with _placing(pipeline, number), alone_in(stage.output) if World.rank_here() == 0 else nullcontext():
            parent = stage.run(parent, resume=resume) if stage.shared else _by_one(stage, parent, resume)
    assert parent is not None
    return parent


def _by_one(stage: Stage, parent: Path | None, resume: bool) -> Path:
    return World.join(None).by_first(lambda: stage.run(parent, resume=resume))


@contextmanager
def _placing(pipeline: Pipeline, number: int) -> Iterator[None]:
    """Within it a FettleError about stage `number` gets the lines of the keys that it is about."""
    try:
        yield
    except FettleError as error:
        error.args = (pipeline.placed(number, str(error)),)
        raise


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's completion."""
    return TypeAdapter(AnyStage | Pipeline).json_schema() | {"title": "fettle recipe"}
