"""ORPO: instruction tuning and preference in one stage, without a reference (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    l(y) = 1 / |y| log p(y | x)        log odds(y) = l - log(1 - e^l)
    L = - l(y_w) - weight log sigmoid(log odds(y_w) - log odds(y_l))

The first term is the likelihood of the better answer, as in instruction tuning; the second draws the odds of the two apart.
weight is the paper's lambda.

Shapes: P pairs; `better`, `worse` the mean log-probabilities of their answers [P], below zero.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import Answers, answer_logps


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, exact for p near 0 and near 1 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))").

    A p nearer to 1 than a millionth is taken for that, and has no gradient: its odds have none that is finite.
    """
    logp = logp.clamp_max(-1e-6)
    near = logp > -0.6931
    rest = torch.where(
        near, (-torch.expm1(torch.where(near, logp, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, logp).exp())
    )  # each branch at a harmless place where the other is taken, or its gradient would be none times infinity
    return logp - rest


def orpo_loss(better: Tensor, worse: Tensor, weight: float) -> Tensor:
    """[P]."""
    return -better - weight * F.logsigmoid(log_odds(better) - log_odds(worse))


class ORPO(Objective):
    """Learn the better answer, and draw its odds away from those of the worse; no reference."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["orpo"] = "orpo"
    weight: float = Field(default=0.1, gt=0, description="lambda: the odds ratio's weight beside the likelihood")

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's prompts."""
        answers = Answers.of(batch)
        pairs = answers.pairs()
        logps = answer_logps(model, batch, answers)
        mean = logps / answers.lengths.to(logps)
        each = orpo_loss(mean[pairs.better], mean[pairs.worse], self.weight)
        loss = pairs.loss(each, self.weight * mean)
        nll = -(mean.detach()[pairs.better] * pairs.shares.to(mean)).sum()
        return Loss(loss.sum, loss.count, loss.metrics | {"nll": nll})
