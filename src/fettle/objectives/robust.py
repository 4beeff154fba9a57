"""Robust DPO: an unbiased loss under labels that are flipped with a known chance (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12).

    d = beta (log p(y_w | x) / p_ref(y_w | x) - log p(y_l | x) / p_ref(y_l | x))
    L = (- (1 - eps) log sigmoid(d) + eps log sigmoid(-d)) / (1 - 2 eps)

Its mean over flips is DPO's loss of the true label: what a wrong label adds is taken off again. It has no lower bound, and its
spread grows as eps nears a half; cdpo.py is the tamer relative.

Shapes: P pairs; `better`, `worse` the log-ratios log p / p_ref of their answers [P].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import compare
from fettle.objectives.reference import Reference


def robust_loss(better: Tensor, worse: Tensor, beta: float, noise: float) -> Tensor:
    """[P]."""
    margin = beta * (better - worse)
    return (-(1 - noise) * F.logsigmoid(margin) + noise * F.logsigmoid(-margin)) / (1 - 2 * noise)


class Robust(Objective):
    """Prefer the better of two answers, near a reference, and take off what flipped labels add."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["robust"] = "robust"
    beta: float = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    noise: float = Field(default=0.1, ge=0, lt=0.5, description="eps: the chance that a label is flipped")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        pairs, _, ratio = compare(model, batch)
        each = robust_loss(ratio[pairs.better], ratio[pairs.worse], self.beta, self.noise)
        return pairs.loss(each, self.beta * ratio)
