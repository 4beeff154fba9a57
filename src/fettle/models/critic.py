"""The critic: a value of every token, by a tree of its own edits and a scalar head over the policy's base.

    V_t = w . h_t + b        h_t the critic's state before token t [C], w and b float32, zero at first: no value is claimed unasked

It hangs on the policy's model as `fettle_critic`, so that it trains, is checkpointed and is counted with it; a stage takes it off
before it writes the artifact. Its base weights are the policy's (twin.py), or with no edits of its own its states are.

Shapes: T tokens of a batch, C width, N learned targets.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.batch import IGNORE, Batch
from fettle.core.families import Edit

NAME = "fettle_critic"


class CriticEdit(Edit):
    """What the critic's modules belong to. It stands in no recipe."""


class Critic(nn.Module):
    """`model` is a tree like the policy's; None takes the policy's own states."""

    def __init__(self, width: int, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.edit, self.enabled = CriticEdit(), True  # off with the rest of what trains (roles.py)

    def forward(self, states: Tensor) -> Tensor:
        """[N, C] -> float32 [N]."""
        return self.head(states.to(self.head.weight.dtype))[:, 0]  # type: ignore[no-any-return]


def attach(forest: Any, critic: Critic) -> None:
    """Hang a critic on a forest's model, where the model lies."""
    forest.model.add_module(NAME, critic.to(forest.device))


def detach(forest: Any) -> Critic | None:
    """Take it off; None where there is none."""
    critic: Critic | None = getattr(forest.model, NAME, None)
    if critic is not None:
        delattr(forest.model, NAME)
    return critic


def values_of(forest: Any, batch: Batch) -> Tensor:
    """float32 [N]: the values before the learned targets of a batch, in the order of their positions."""
    critic: Critic = getattr(forest.model, NAME)
    own = forest
    if critic.model is not None:
        own = copy.copy(forest)
        own.model = critic.model
    hidden = own.hidden(batch)
    learned = torch.nonzero(batch.targets != IGNORE)[:, 0].to(hidden.device)
    return critic(hidden.index_select(0, learned))  # type: ignore[no-any-return]
