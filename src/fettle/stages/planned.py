"""A recipe of mixed precision: one with a single quantizer in, the same with a quantizer for each number of bits out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from ruamel.yaml import YAML

from fettle.core.config import read
from fettle.core.errors import FettleError
from fettle.core.files import new_file
from fettle.quantize.mixed import Sensitivity, allocate, sensitivities, spent
from fettle.stages.pipeline import AnyStage, load_recipe
from fettle.stages.quantize import Quantize

CHOICES = (2, 3, 4, 5, 6, 8)


def plan_bits(
    recipe: Path,
    budget: float,
    output: Path,
    overrides: Sequence[str] = (),
    choices: Sequence[int] = CHOICES,
    rows: int = 8,
) -> tuple[list[Sensitivity], dict[str, int]]:
    """Write `output`, a recipe whose layers have as many bits as they need, `budget` a weight over all with scales counted.

    `rows` of the calibration text are looked at. Returns what was measured and what was chosen. FettleError where the recipe has not
    one quantizer with a grid, where it has no calibration text, or where the budget is too small.
    """
    if output.exists():
        raise FettleError(f"{output}: is there already; choose another name, or remove it")
    (stage,) = load_recipe(recipe, overrides, kind="quantize").stages
    edit = _quantizer(stage, recipe)
    by_bits = {
        bits: edit.model_copy(update={"grid": edit.grid.model_copy(update={"bits": bits})}) for bits in sorted(choices)
    }
    forest, _ = stage.open(None)
    batches = stage.batches(forest)[:rows]
    with Progress(console=Console(stderr=True), transient=True) as bar, torch.no_grad():
        task = bar.add_task("layers", total=None)
        found = sensitivities(forest, batches, by_bits, lambda i, n: bar.update(task, completed=i, total=n))
    bits = allocate(found, budget)
    document = read(recipe)
    document.data.setdefault("kind", "quantize")
    data = document.override(AnyStage, overrides).data
    (place,) = (i for i, e in enumerate(stage.edits) if e.role == "quantizes")
    data["edits"] = [*data["edits"][:place], *_edits(data["edits"][place], edit, bits), *data["edits"][place + 1 :]]
    _write(
        output,
        data,
        f"# {spent(found, bits):.3f} bits a weight with scales, at most {budget:g}; by `fettle quantize plan {recipe}`.\n",
    )
    load_recipe(output)
    return found, bits


def _quantizer(stage: Any, recipe: Path) -> Any:
    edits = [edit for edit in getattr(stage, "edits", ()) if edit.role == "quantizes"]
    if (
        not isinstance(stage, Quantize)
        or len(edits) != 1
        or not all(hasattr(edits[0], key) for key in ("grid", "quantize"))
    ):
        raise FettleError(
            f"{recipe}: edits: a plan needs one quantizer with a grid, as {{kind: gptq, grid: {{group: 64}}}}"
        )
    if stage.calibration is None:
        raise FettleError(f"{recipe}: calibration: a plan looks at text; add {{data: [{{path: ...}}]}}")
    return edits[0]


def _edits(said: dict[str, Any], edit: Any, bits: dict[str, int]) -> list[dict[str, Any]]:
    """The quantizer once for each number of bits that is used, with the layers that have it."""
    grid = edit.grid.model_dump(mode="json", exclude_unset=True)
    return [
        {**said, "targets": [name for name, b in bits.items() if b == width], "grid": {**grid, "bits": width}}
        for width in sorted(set(bits.values()))
    ]


def _write(file: Path, data: dict[str, Any], head: str) -> None:
    with new_file(file) as handle:
        handle.write(head.encode())
        YAML(typ="safe", pure=True).dump(data, handle)
