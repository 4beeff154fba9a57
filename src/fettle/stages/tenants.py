"""Fine-tunes as one-bit deltas: made, with their scales distilled or not, and opened many at a time on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fettle.core.errors import FettleError
from fettle.data import DataSpec
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives.distill import Distill, Teacher
from fettle.quantize.bitdelta import BitDelta
from fettle.quantize.tenants import Signed, Tenants
from fettle.stages.artifact import TENSORS, Adaptation, apply_edits, find_artifact, read_artifact, save_artifact
from fettle.stages.deltas import bring
from fettle.stages.reference import other_identity
from fettle.stages.tune import ARTIFACT, BatchSpec, Recipe
from fettle.train import OptimSpec


def base_of(tuned: str) -> ModelSpec:
    """The base that an artifact was tuned from. FettleError where that is not on record."""
    if (folder := find_artifact(tuned)) is None:
        raise FettleError(f"{tuned}: no artifact, so its base is not on record; name the base with --base")
    return read_artifact(folder).model


def make_delta(
    tuned: str, output: Path, base: str | None = None, data: Sequence[str] = (), steps: int = 200, seed: int = 0
) -> Path:
    """The artifact of a fine-tune as a delta; with `data` its scales are trained towards the fine-tune's logits first.

    The defaults of training are the paper's: AdamW at 1e-4, cosine, four texts of 128 tokens a step.
    """
    spec = ModelSpec(path=base) if base is not None else base_of(tuned)
    edit = BitDelta(tuned=tuned)
    if data:
        recipe = Recipe(
            model=spec, edits=(edit,), data=tuple(DataSpec(path=path) for path in data),
            objective=Distill(divergence="mse", teacher=Teacher(path=tuned)),
            optim=OptimSpec(lr=1e-4, steps=steps, warmup=0.0, betas=(0.9, 0.999)), batch=BatchSpec(tokens=512),
            seed=seed, output=output,
        )  # fmt: skip
        return recipe.run()
    forest = load(spec)
    apply_edits(forest, [edit])
    bring(forest, [edit])
    if (output / ARTIFACT).exists():
        raise FettleError(f"{output}: holds an artifact already; choose another output")
    save_artifact(output / ARTIFACT, forest, [edit], {"tuned": other_identity(tuned)})
    return output / ARTIFACT


def open_tenants(refs: Mapping[str, str], **changes: Any) -> tuple[Forest, Tenants]:
    """The base with the deltas of the artifacts (or run folders) `refs`, by name, all off; `changes` as in `open_artifact`.

    FettleError where they have not one base, or hold more than signs and scales.
    """
    if not refs:
        raise FettleError("tenants: none was given")
    made: dict[str, Adaptation] = {}
    deltas: dict[str, dict[str, Signed]] = {}
    for name, ref in refs.items():
        if (folder := find_artifact(ref)) is None:
            raise FettleError(f"tenants: '{name}': {ref} holds no artifact; give the folder of one, or of its run")
        made[name] = read_artifact(folder, **changes)
        deltas[name] = _signed(name, made[name], load_file(folder / TENSORS))
    first = next(iter(made))
    for name, other in made.items():
        if other.model != made[first].model:
            raise FettleError(
                f"tenants: '{name}' and '{first}' have not one base: {other.model.path} and {made[first].model.path}"
            )
    forest = load(made[first].model)
    forest.model.requires_grad_(False)
    return forest, Tenants(forest, deltas)


def _signed(name: str, made: Adaptation, tensors: Mapping[str, Any]) -> dict[str, Signed]:
    if len(made.edits) != 1 or not isinstance(made.edits[0], BitDelta):
        raise FettleError(f"tenants: '{name}' has the edits {[e.kind for e in made.edits]}; a tenant is one bitdelta")
    layers = sorted({key.removeprefix("0/").removesuffix(".signs") for key in tensors if key.endswith(".signs")})
    known = {f"0/{layer}.{part}" for layer in layers for part in ("signs", "scale")}
    if more := sorted(set(tensors) - known):
        raise FettleError(
            f"tenants: '{name}' keeps {more[0].removeprefix('0/')} whole{f' and {len(more) - 1} more' if len(more) > 1 else ''}, "
            "which tokens of one batch cannot have apart; open it alone, or fine-tune linear layers only"
        )
    return {layer: Signed(tensors[f"0/{layer}.signs"], tensors[f"0/{layer}.scale"]) for layer in layers}
