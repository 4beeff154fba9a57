"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    r(y) = beta log p(y | x) / p_ref(y | x)            L = - log sigmoid(r(y_w) - r(y_l))

y_w the better answer, y_l the worse one: the Bradley-Terry likelihood of the preference, where the policy is its own reward model.
The policy that maximises r less beta times the KL to the reference is the policy itself, so no reward model and no sampling is needed.

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


def dpo_loss(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """[P]."""
    return -F.logsigmoid(beta * (better - worse))


class DPO(Objective):
    """Prefer the better of two answers, near a reference."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        pairs, _, ratio = compare(model, batch)
        return pairs.loss(dpo_loss(ratio[pairs.better], ratio[pairs.worse], self.beta), self.beta * ratio)
