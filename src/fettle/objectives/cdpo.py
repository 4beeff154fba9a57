"""cDPO: DPO that takes a share of the labels to be wrong (Mitchell 2023, "A note on DPO with noisy preferences").

    d = beta (log p(y_w | x) / p_ref(y_w | x) - log p(y_l | x) / p_ref(y_l | x))
    L = - (1 - eps) log sigmoid(d) - eps log sigmoid(-d)

The loss is least where sigmoid(d) = 1 - eps, so a margin is learned and then left, where DPO goes on to push it towards infinity.

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


def cdpo_loss(better: Tensor, worse: Tensor, beta: float, noise: float) -> Tensor:
    """[P]."""
    margin = beta * (better - worse)
    return -(1 - noise) * F.logsigmoid(margin) - noise * F.logsigmoid(-margin)


class CDPO(Objective):
    """Prefer the better of two answers, near a reference, with a share of wrong labels in mind."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["cdpo"] = "cdpo"
    beta: float = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    noise: float = Field(default=0.1, ge=0, lt=0.5, description="eps: the share of labels that are the wrong way round")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        pairs, _, ratio = compare(model, batch)
        each = cdpo_loss(ratio[pairs.better], ratio[pairs.worse], self.beta, self.noise)
        return pairs.loss(each, self.beta * ratio)
