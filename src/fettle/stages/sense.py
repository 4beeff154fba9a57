"""Recipes that make no sense: edits that undo, repeat or exclude one another, and what trains nothing.

`senseless` says what the recipe alone shows, before anything is loaded; `senseless_on` what only the model shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch import nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import Where
from fettle.models.weight import innermost
from fettle.peft import AdaLoRA, Full, LoRA

if TYPE_CHECKING:
    from fettle.stages.tune import Recipe

WRAPPERS = (AdaLoRA, LoRA)  # train a change of the linear layers that their targets name
STILL = ("freezes", "quantizes", "simulates", "rescales")  # roles that train nothing
Problems = Iterator[tuple[Where, str]]


def senseless(recipe: Recipe) -> Problems:
    """(place in the recipe, what is wrong and what to do)."""
    edits, task = recipe.edits, recipe.model.task
    for i, edit in enumerate(edits):
        if edit.calibrated:
            what = "looks at text; put it into a stage of kind: quantize before this one, with calibration"
            yield ("edits", i), f"{_kind(edit)} {what}"
    if task in ("auto", "causal") and all(e.role in STILL for e in edits):
        what = f"nothing trains after {_listed(edits)}" if edits else "nothing trains"
        yield ("edits",), f"{what}; add an edit that trains, as in edits: [{{kind: lora}}]"
        return
    for (i, first), (j, second) in combinations(enumerate(edits), 2):
        frozen = any(e.role == "freezes" for e in edits[i:])  # then only the model tells what still trains
        if wrong := _pair(first, f"edits.{i} ({_kind(first)})", second, frozen):
            yield ("edits", j), wrong
    for i, edit in enumerate(edits):
        if edit.role == "freezes" and all(e.role in STILL for e in edits[:i]):
            yield ("edits", i), "freeze stops nothing here, where nothing trains yet; put it after the edit that trains"
    if recipe.optim.steps is not None:
        yield from too_short(edits, recipe.optim.steps)
    if recipe.kind == "tune" and recipe.objective.form == "rollouts":
        yield (
            ("objective",),
            f"{recipe.objective.kind} learns from the model's own answers; say kind: reinforce, with a reward and rollouts",
        )
    wanted, said = recipe.objective.kind, "objective" in recipe.model_fields_set
    if said and wanted in ("classify", "tag") and task not in ("auto", wanted):
        yield (
            ("objective",),
            f"{wanted} does not fit a model with task: {task}; leave the objective out, or set model.task",
        )


def senseless_on(model: nn.Module, edits: Sequence[Edit]) -> Problems:
    """The same of `edits` that a model has."""
    if not any(p.requires_grad for p in model.parameters()):
        yield ("edits",), f"nothing trains after {_listed(edits)}; add an edit such as {{kind: lora}}"
    for i, edit in enumerate(edits):
        if edit.role != "updates":
            continue
        both = [name for name, m in model.named_modules() if getattr(m, "edit", None) is edit and _weight_trains(m)]
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            yield (
                ("edits", i),
                f"{_kind(edit)} updates {both[0]}{more}, whose own weights another edit trains; keep one of the two there",
            )


def too_short(edits: Sequence[Edit], steps: int) -> Problems:
    """Edits with a schedule that a run of `steps` leaves no room."""
    for i, edit in enumerate(edits):
        if isinstance(edit, AdaLoRA):
            try:
                edit.ends(steps)
            except FettleError as error:
                yield ("edits", i), f"{error}; give optim.steps more, or make one of the two shorter"


def _pair(first: Edit, name: str, second: Edit, frozen: bool) -> str | None:
    """What is wrong with `second` after `first`, which is called `name`."""
    kind = _kind(second)
    if first.role == second.role == "prompts":
        return (
            f"a model takes one soft prompt, and {name} is one; give that one more tokens, or write both as one "
            "hybrid_prompt template"
        )
    if second.role == "quantizes" and isinstance(first, (Full, *WRAPPERS)) and _meet(first, second):
        return (
            f"{kind} would round away what {name} trains in the same layers; put {kind} first and train beside it with lora, "
            "or quantize what fettle export --to hf writes of the result"
        )
    if first.role == "quantizes" and _patterns(first) and isinstance(second, Full) and second.targets is None:
        return f"full trains every weight, and {name} holds those of the linear layers fixed; give full targets, or take lora"
    both = ((first, second), (second, first))
    if not frozen and any(isinstance(a, Full) and b.role == "updates" and _meet(a, b) for a, b in both):
        return f"{kind} and {name} would train the same weights twice; keep one of them, or give full other targets"
    return None


def _meet(one: Any, other: Any) -> bool:
    """Whether two edits have a layer in common, as far as their targets alone tell: for certain, or not at all."""
    a, b = (_patterns(edit) for edit in (one, other))
    return a != set() and b != set() and (a is None or b is None or bool(a & b))


def _patterns(edit: Any) -> set[str] | None:
    """None for the whole model."""
    targets = getattr(edit, "targets", ())
    return None if targets is None else {targets} if isinstance(targets, str) else set(targets)


def _weight_trains(module: nn.Module) -> bool:
    weight = innermost(module)._parameters.get("weight") if hasattr(module, "base") else None
    return weight is not None and weight.requires_grad


def _kind(edit: Any) -> str:
    return str(edit.kind)


def _listed(edits: Sequence[Edit]) -> str:
    return ", ".join(_kind(edit) for edit in edits) or "an empty list of edits"
