"""Hinge: SLiC's calibration loss on DPO's rewards (Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657, section 3).

    d = beta (log p(y_w | x) / p_ref(y_w | x) - log p(y_l | x) / p_ref(y_l | x))            L = max(0, 1 - d)

A pair whose margin is reached has no gradient: what is learned already is left alone.

Shapes: P pairs; `better`, `worse` the log-ratios log p / p_ref of their answers [P].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import compare
from fettle.objectives.reference import Reference


def hinge_loss(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """[P]."""
    return (1 - beta * (better - worse)).clamp_min(0)


class Hinge(Objective):
    """Bring the better answer ahead of the worse one by 1 / beta, near a reference."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["hinge"] = "hinge"
    beta: float = Field(default=0.1, gt=0, description="one over the margin in nats")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        pairs, _, ratio = compare(model, batch)
        return pairs.loss(hinge_loss(ratio[pairs.better], ratio[pairs.worse], self.beta), self.beta * ratio)
