"""Forest batches on models that know nothing of them: every path from root to leaf becomes a row of its own.

This is the fallback for architectures without transformers' attention interface (BLOOM, Falcon, GPT-J, MPT, DeBERTa) and
for those that carry a state from token to token (Mamba and its hybrids), which no mask can stop. It is exact for any causal
model, because what fills up a row stands after it, and for encoders, which are told by a mask; it computes shared prompts
once a path, and some padding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import Segment, ancestors
from fettle.core.errors import FettleError
from fettle.models.plan import Plan, rounded

# Places in the row int64 [N, L], and for encoders which of them are real bool [N, L] -> hidden [N, L, C].
Run = Callable[[Tensor, Tensor | None], Tensor]


def hidden_by_paths(
    plan: Plan, device: torch.device, run: Run, encoder: bool = False, bound: int | None = None
) -> Tensor:
    """[T, C]: hidden states of a row, computed a path at a time; zeros for padding.

    `encoder`: the model sees ahead; `bound`: the most tokens that it can see, if there is a most.
    """
    groups: dict[int, list[np.ndarray]] = {}
    for path in _paths(plan, encoder):
        groups.setdefault(rounded(len(path), bound), []).append(path)
    pieces: list[Tensor] = []
    back = np.full(plan.length, -1)
    row = 0
    for length, group in sorted(groups.items()):
        most = max(1, plan.length // length)
        for some in (group[i : i + most] for i in range(0, len(group), most)):
            index, real = stacked(some, length)
            for i, path in enumerate(some):
                back[path] = row + i * length + np.arange(len(path))
            mask = torch.from_numpy(real).to(device) if encoder else None
            pieces.append(run(torch.from_numpy(index).to(device), mask).flatten(0, 1))
            row += index.size
    return laid_out(pieces, back, device)


def stacked(paths: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [n_i] as rows of one length, the last element repeated, and which of it is real: two [N, length]."""
    index = np.stack([np.pad(path, (0, length - len(path)), mode="edge") for path in paths])
    return index, np.arange(length)[None, :] < np.array([len(path) for path in paths])[:, None]


def laid_out(pieces: list[Tensor], back: np.ndarray, device: torch.device) -> Tensor:
    """[T, C]: row `back[t]` of all pieces at token t; zeros where that is negative."""
    if not pieces:
        raise FettleError("a batch without a segment that is not padding has nothing to compute")
    zeros = pieces[0].new_zeros(1, pieces[0].shape[1])
    back = np.where(back < 0, sum(map(len, pieces)), back)
    return torch.cat([*pieces, zeros]).index_select(0, torch.from_numpy(back).to(device))


def _paths(plan: Plan, encoder: bool) -> list[np.ndarray]:
    """The tokens of each path from a root to a leaf."""
    positions = plan.positions.cpu().numpy()
    parents = {segment.parent for segment in plan.segments}
    found = []
    for i, segment in enumerate(plan.segments):
        if i in plan.padding or segment.stop == segment.start and segment.parent < 0:
            continue
        if segment.causal == encoder or encoder and segment.parent >= 0:
            raise FettleError(_refusal(encoder))
        if i in parents:
            continue
        path = np.concatenate([span(plan.segments[k]) for k in ancestors(plan.segments, i)])
        if not np.array_equal(positions[path], np.arange(len(path))):
            raise FettleError("this architecture counts positions by itself, and this batch asks for others")
        found.append(path)
    return found


def _refusal(encoder: bool) -> str:
    if encoder:
        return (
            "this encoder has no attention interface, so its segments can only be whole texts that see themselves both ways; "
            "choose a model of the BERT, RoBERTa, DistilBERT or ELECTRA families"
        )
    return (
        "this architecture has no attention interface, so a segment cannot see ahead in it (prefix LM, "
        "bidirectional prompts); choose a model of the Llama, Qwen, Mistral, Gemma or GPT-NeoX families"
    )


def span(segment: Segment) -> np.ndarray:
    """The places of a segment's tokens in the row."""
    return np.arange(segment.start, segment.stop)
