"""Forest batches on models that know nothing of them: every path from root to leaf becomes a row of its own.

This is the fallback for architectures without transformers' attention interface (BLOOM, Falcon, GPT-J, MPT) and for
those that carry a state from token to token (Mamba and its hybrids), which no mask can stop. It is exact for any causal
model, because what fills up a row stands after it; it computes shared prompts once a path, and some padding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import Segment, ancestors
from fettle.core.errors import FettleError
from fettle.models.plan import Plan, rounded

Run = Callable[[Tensor], Tensor]  # token ids int64 [N, L] -> hidden [N, L, C]


def hidden_by_paths(tokens: Tensor, plan: Plan, run: Run) -> Tensor:
    """[T, C]: hidden states of a row of `tokens` [T], computed a path at a time; zeros for padding."""
    groups: dict[int, list[np.ndarray]] = {}
    for path in _paths(plan):
        groups.setdefault(rounded(len(path)), []).append(path)
    pieces: list[Tensor] = []
    back = np.full(plan.length, -1)
    row = 0
    for length, group in sorted(groups.items()):
        most = max(1, plan.length // length)
        for some in (group[i : i + most] for i in range(0, len(group), most)):
            index = np.stack([np.pad(path, (0, length - len(path)), mode="edge") for path in some])
            for i, path in enumerate(some):
                back[path] = row + i * length + np.arange(len(path))
            pieces.append(run(tokens[torch.from_numpy(index).to(tokens.device)]).flatten(0, 1))
            row += index.size
    back[back < 0] = row
    if not pieces:
        raise FettleError("a batch without a segment that is not padding has nothing to compute")
    zeros = pieces[0].new_zeros(1, pieces[0].shape[1])
    return torch.cat([*pieces, zeros]).index_select(0, torch.from_numpy(back).to(tokens.device))


def _paths(plan: Plan) -> list[np.ndarray]:
    """The tokens of each path from a root to a leaf."""
    positions = plan.positions.cpu().numpy()
    parents = {segment.parent for segment in plan.segments}
    found = []
    for i, segment in enumerate(plan.segments):
        if i in plan.padding or segment.stop == segment.start and segment.parent < 0:
            continue
        if not segment.causal:
            raise FettleError(
                "this architecture has no attention interface, so a segment cannot see ahead in it (prefix LM, "
                "bidirectional prompts); choose a model of the Llama, Qwen, Mistral, Gemma or GPT-NeoX families"
            )
        if i in parents:
            continue
        path = np.concatenate([_span(plan.segments[k]) for k in ancestors(plan.segments, i)])
        if not np.array_equal(positions[path], np.arange(len(path))):
            raise FettleError("this architecture counts positions by itself, and this batch asks for others")
        found.append(path)
    return found


def _span(segment: Segment) -> np.ndarray:
    return np.arange(segment.start, segment.stop)
