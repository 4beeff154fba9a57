"""Memory: what a training step will need, before it runs, and what it did need.

`predict` rehearses one step, forward and backward, on fake tensors: shapes flow through the very modules, edits,
checkpointing and loss of the run, nothing is computed and nothing is allocated, and every storage is counted from
its birth to its death. So the figure holds for any architecture and any edit, with no formula for each.
"""

from __future__ import annotations

import copy
import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.batch import Batch, Segment
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.rehearsal import Rehearsal, rehearsing

WIDE = (torch.float32, torch.float64)  # weights that are their own masters


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run holds at its peak, by what they are for."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int  # moments, and float32 masters of narrower weights
    activations: int  # saved for the backward pass, and what a layer needs while it runs
    logits: int
    workspace: int = 0  # what kernels take for themselves, and the allocator's losses
    runtime: int = 0  # the interpreter and its libraries, in this process now

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) in the order in which a reader wants them, the total last."""
        return [*asdict(self).items(), ("total", self.total)]


def predict(
    forest: Forest, batch: Batch, loss: Callable[[Forest, Batch], Tensor], state_bytes: float = 8.0, accumulate: int = 1
) -> MemoryPlan:
    """The peak of a training step whose scalar loss is `loss(forest, batch)`.

    The weights of `forest` that require gradients train; they may lie on the meta device, so that a model which
    would not fit need not be loaded. `state_bytes` is what the optimizer keeps for each trained weight (AdamW: 8).
    Nothing of `forest` changes. FettleError where nothing trains.
    """
    device = forest.device if forest.device.type != "meta" else torch.device("cpu")
    trained = [p for p in forest.model.parameters() if p.requires_grad]
    if not trained:
        raise FettleError("memory: nothing trains, so there is no step to predict; add an edit such as {kind: lora}")
    masters = sum(4 * p.numel() for p in trained if p.dtype not in WIDE)
    state = int(sum(state_bytes * p.numel() for p in trained))
    with rehearsing(device) as rehearsal:
        twin = copy.copy(forest)
        twin.model = fake_copy(forest.model, rehearsal)
        twin.model.train()
        weights = rehearsal.live()
        vocabulary = _vocabulary(forest)
        _emulate_masters(twin.model)
        rehearsal.start(lambda: {id(p) for p in twin.model.parameters()}, vocabulary)
        for _ in range(min(accumulate, 2)):
            loss(twin, batch).backward()
        peak = rehearsal.peak
        held = sum(_grad_bytes(p) for p in trained)
    update = _largest_temporary(trained, state_bytes)
    gradients, logits = peak.gradients, peak.logits
    activations = peak.total - gradients - logits
    if held + update > peak.total:  # the optimizer's own moment is the highest
        gradients, activations, logits = held, update, 0
    return MemoryPlan(
        weights=weights, gradients=gradients, optimizer=masters + state, activations=activations, logits=logits,
        workspace=_workspace(forest.model, device), runtime=_runtime(forest.model, device),
    )  # fmt: skip
