"""IPO: a margin to reach, not to outgrow (Azar et al. 2023, arXiv 2310.12036, equation 17).

    h = log p(y_w | x) / p_ref(y_w | x) - log p(y_l | x) / p_ref(y_l | x)            L = (h - 1 / (2 beta))^2

beta is the paper's tau. Where all preferences are certain, DPO's optimum is infinitely far from the reference whatever its beta;
this one is not. The log-ratios are means over an answer's tokens, as the authors computed the paper's results (they are sums in its
text): then one beta suits answers of every length. `average: false` takes the sums.

Shapes: P pairs; `better`, `worse` the log-ratios of their answers [P].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import compare
from fettle.objectives.reference import Reference


def ipo_loss(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """[P]."""
    return (better - worse - 1 / (2 * beta)).square()


class IPO(Objective):
    """Bring the better answer a fixed margin ahead of the worse one."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0, description="tau: the margin is 1 / (2 beta)")
    average: bool = Field(default=True, description="log-ratios are means over an answer's tokens, not sums")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        pairs, answers, ratio = compare(model, batch)
        ratio = ratio / answers.lengths.to(ratio) if self.average else ratio
        return pairs.loss(ipo_loss(ratio[pairs.better], ratio[pairs.worse], self.beta), self.beta * ratio)
