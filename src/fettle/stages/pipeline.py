"""A recipe file: one stage written flat, or several under `stages:`, each opening the artifact before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field, TypeAdapter

from fettle.core.config import Where, override, read_yaml, validate
from fettle.core.errors import FettleError
from fettle.core.families import Stage
from fettle.core.spec import Spec, one_of
from fettle.stages.tune import OF_A_RUN, Recipe

AnyStage: TypeAlias = one_of(Stage, default="tune")  # type: ignore[valid-type]


class Pipeline(Spec):
    """Several stages in a row."""

    stages: tuple[AnyStage, ...] = Field(min_length=1)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """A recipe file with `key=value` overrides; FettleError lists every mistake with its line.

    Relative paths of data and output are relative to where the command runs, as in a shell.
    """
    data, lines = read_yaml(Path(path))
    if not isinstance(data, dict):
        raise FettleError(f"{path}: expected a mapping of keys at the top, found {type(data).__name__}")
    data = override(data, overrides)
    if "stages" in data:
        pipeline: Pipeline = validate(Pipeline, data, str(path), lines)
        outputs = [stage.output for stage in pipeline.stages]
        if len(set(outputs)) < len(outputs):
            raise FettleError(f"{path}: stages: two of them have the same output; each needs its own")
        _same_model(pipeline, str(path), lines)
        return pipeline
    return Pipeline(stages=(validate(Recipe, data, str(path), lines),))


def _same_model(pipeline: Pipeline, path: str, lines: dict[Where, int]) -> None:
    """FettleError where a later stage names a model of its own, which it would not open."""
    first, *later = (stage.model for stage in pipeline.stages)
    for number, model in enumerate(later, 1):
        for key in sorted(model.model_fields_set - set(OF_A_RUN)):
            if getattr(model, key) != getattr(first, key):
                line = lines.get(("stages", number, "model", key)) or lines.get(("stages", number, "model"))
                raise FettleError(
                    f"{path}{f':{line}' if line else ''}: stages.{number}.model.{key}: a later stage opens the artifact of the "
                    f"stage before it; of its model it can say {', '.join(OF_A_RUN)}"
                )


def run(recipe: Stage | Pipeline, resume: bool = False) -> Path:
    """Run a recipe to its end; returns the folder of the last artifact."""
    stages = recipe.stages if isinstance(recipe, Pipeline) else (recipe,)
    parent: Path | None = None
    for stage in stages:
        parent = stage.run(parent, resume=resume)
    assert parent is not None
    return parent


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for an editor's completion."""
    return TypeAdapter(Recipe | Pipeline).json_schema() | {"title": "fettle recipe"}
