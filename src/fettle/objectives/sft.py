"""Instruction tuning and plain language modelling: the negative log-likelihood of the learned tokens.

    L = - sum_i w_i log p(y_i | what y_i's segment sees before it)  /  sum_i w_i

The sum runs over the whole optimizer step (Ouyang et al. 2022, arXiv 2203.02155, section 3.5, and every language model before it).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.families import Loss, Objective


def sft_loss(logps: Tensor, weights: Tensor) -> Loss:
    """`logps`, `weights`: float32 [N], one for each learned token. Metrics: loss in nats a token."""
    total = -(logps * weights).sum()
    return Loss(total, weights.sum(), {"loss": total.detach()})


class SFT(Objective):
    """Cross-entropy on the tokens that a batch marks as learned; plain text marks them all."""

    kind: Literal["sft"] = "sft"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's learned tokens."""
        learned = torch.nonzero(batch.targets != IGNORE).squeeze(-1)
        return sft_loss(model.logps(batch), batch.weights[learned])
