"""SimPO: the mean log-probability as the reward, without a reference (Meng et al. 2024, arXiv 2405.14734, equation 6).

    r(y) = beta / |y| log p(y | x)            L = - log sigmoid(r(y_w) - r(y_l) - gamma)

What is trained is what sampling goes by, a likelihood a token, and length gains nothing. With no reference the policy is held by the
learning rate alone: small ones (the paper's are 3e-7 to 1e-6 in full tuning).

Shapes: P pairs; `better`, `worse` the mean log-probabilities of their answers [P].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import Answers, answer_logps


def simpo_loss(better: Tensor, worse: Tensor, beta: float, gamma: float) -> Tensor:
    """[P]."""
    return -F.logsigmoid(beta * (better - worse) - gamma)


class SimPO(Objective):
    """Prefer the better of two answers by their likelihood a token; no reference."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, description="scale of the reward")
    gamma: float = Field(default=1.0, ge=0, description="the margin that the better answer is to be ahead by")

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        answers = Answers.of(batch)
        pairs = answers.pairs()
        logps = answer_logps(model, batch, answers)
        mean = logps / answers.lengths.to(logps)
        return pairs.loss(simpo_loss(mean[pairs.better], mean[pairs.worse], self.beta, self.gamma), self.beta * mean)
