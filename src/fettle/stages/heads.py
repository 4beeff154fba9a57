"""What a recipe leaves unsaid about a model with a task's head: its labels, its objective, and that a new head trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.families import Edit, Objective
from fettle.data.names import label_names
from fettle.data.spec import DataSpec
from fettle.models.forest import Forest
from fettle.models.load import configuration, load
from fettle.models.spec import ModelSpec
from fettle.models.tasks import NEW, head_note, lacks_labels
from fettle.objectives import SFT, Classify, Reward, Tag
from fettle.peft import Full, TaskHead

OBJECTIVES: dict[str, Objective] = {"causal": SFT(), "classify": Classify(), "tag": Tag()}
HEAD: dict[str, Any] = {"task": "classify", "labels": ("reward",)}  # one output: what a reward model has


def load_for(spec: ModelSpec, data: Sequence[DataSpec]) -> Forest:
    """The model of a recipe; the names of its labels are collected from the data where nothing else gives them."""
    if lacks_labels(spec, configuration(spec)):
        names = label_names(data, spec.task, spec.multi)
        Console(stderr=True).print(f"labels, from the data: {', '.join(names)}", markup=False, highlight=False)
        spec = spec.model_copy(update={"labels": names})
    forest = load(spec)
    if note := head_note(forest.model, forest.spec):
        Console(stderr=True).print(note, markup=False, highlight=False)
    return forest


def with_head(forest: Forest, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits, and one more that trains the head where that is new and no other edit does."""
    trained = any(isinstance(e, TaskHead) or isinstance(e, Full) and e.targets is None for e in edits)
    return tuple(edits) if trained or not getattr(forest.model, NEW, ()) else (*edits, TaskHead())


def headed_for(spec: ModelSpec, objective: Any) -> ModelSpec:
    """The spec with the head of one output that a reward model has, where it leaves the task open."""
    if not isinstance(objective, Reward) or spec.task not in ("auto", "classify"):
        return spec
    return spec.model_copy(update=HEAD | ({"labels": spec.labels} if spec.labels else {}))


def objective_for(forest: Forest, given: Any, said: bool) -> Any:
    """The recipe's objective where it was `said`, else the one of the model's task; FettleError where the two do not fit."""
    if not said:
        return OBJECTIVES[forest.task]
    if isinstance(given, Reward):
        outputs = forest.config.num_labels if forest.task == "classify" else 0
        if outputs != 1:
            raise FettleError(
                f"objective: reward needs a head of one output, and the model has {outputs or 'none'}; leave model.task and "
                "model.labels out"
            )
    elif (given.kind in ("classify", "tag") or forest.task != "causal") and given.kind != OBJECTIVES[forest.task].kind:  # type: ignore[attr-defined]
        raise FettleError(
            f"objective: {given.kind} does not fit a model with task: {forest.task}; leave the objective out, or set model.task"
        )
    return given
