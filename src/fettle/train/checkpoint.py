"""Checkpoints that survive: whole or absent, hashed, the last k kept, the newest sound one found again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, NotWritten, new_folder, verify, write_json
from fettle.core.spec import Spec
from fettle.train.optim import Masters

SOURCE = "source"  # before the names of what a source of batches keeps


class CheckpointSpec(Spec):
    """How often to save, and how many to keep."""

    every: int = Field(default=100, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(default=2, ge=1, description="how many of the newest to keep")


def pack_state(masters: Masters, optimizer: torch.optim.Optimizer, edits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that training changes, as named tensors: weights, masters, optimizer, and what the edits remember.

    Generators are not among it: the loop seeds them from (seed, index of the batch), so they have no history.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in masters.weights.items():
        master = masters.masters[name]
        tensors[f"weight/{name}"] = weight.detach()
        if master is not weight:
            tensors[f"master/{name}"] = master.detach()
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"optim/{key}/{name}"] = value
    tensors |= {f"edit/{name}": value.detach() for name, value in edits.items()}
    return {key: value.cpu().contiguous() for key, value in tensors.items()}


def unpack_state(
    tensors: dict[str, Tensor], masters: Masters, optimizer: torch.optim.Optimizer, edits: dict[str, Tensor]
) -> None:
    """Put back what `pack_state` gave. FettleError where the trained weights are not the same ones."""
    saved = {key.removeprefix("weight/") for key in tensors if key.startswith("weight/")}
    if saved != set(masters.weights):
        odd = sorted(saved ^ set(masters.weights))[0]
        raise FettleError(f"the checkpoint trains other weights than this recipe ('{odd}' is on one side only)")
    with torch.no_grad():
        for name, weight in masters.weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            master = masters.masters[name]
            if master is not weight:
                master.copy_(tensors[f"master/{name}"])
        for name, value in edits.items():
            value.copy_(tensors[f"edit/{name}"])
    for key, value in tensors.items():
        if key.startswith("optim/"):
            _, slot, name = key.split("/", 2)
            master = masters.masters[name]
            where = "cpu" if slot == "step" and master.device.type == "cpu" else master.device
            optimizer.state[master][slot] = value.clone().to(where)


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below `name/`, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-NNNNNNNN and drop all but the newest `keep`. FettleError where the disk refuses."""
    target = folder / f"step-{step:08d}"
    try:
        with new_folder(target) as aside:
            save_file(tensors, aside / "state.safetensors")
            write_json(aside / MANIFEST, {"kind": "checkpoint", "step": step, **facts})
    except NotWritten as error:
        kept = [path.name for path in _all(folder)]
        raise FettleError(
            f"{target}: the checkpoint could not be written ({error.reason}); "
            f"{'the earlier ones are whole: ' + ', '.join(kept) if kept else 'there is no earlier one'}; "
            "make room and go on with --resume"
        ) from error
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]] | None:
    """Manifest and tensors of the newest sound checkpoint, and a sentence for each damaged one stepped over."""
    problems: list[str] = []
    for path in reversed(_all(folder)):
        try:
            facts = verify(path)
            return facts, load_file(path / "state.safetensors"), problems
        except (FettleError, OSError) as error:
            problems.append(f"{error}; stepped over")
    if problems:
        raise FettleError(f"{folder}: no sound checkpoint is left. " + " ".join(problems))
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
