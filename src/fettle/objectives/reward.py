"""Reward models: a number for an answer, from what people prefer (Ouyang et al. 2022, arXiv 2203.02155, equation 1).

    L = - 1 / C(K, 2)  sum over pairs of  log sigmoid(r(x, y_w) - r(x, y_l) - m)   +  c (r(x, y_w) + r(x, y_l))^2

All K answers to a prompt stand in one row below it, so a ranking counts once and costs the prompt once. m is the margin that the
rows bring (Touvron et al. 2023, arXiv 2307.09288, equation 2), c keeps rewards around zero, which the first term leaves free
(Eisenstein et al. 2023, arXiv 2312.09244, section 2). The score is the head's, at the last token of the answer.

Shapes: P pairs; `better`, `worse` the rewards of their answers [P].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import Answers


def reward_loss(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0, centre: float = 0.0) -> Tensor:
    """[P]; `margin` [P] or one for all."""
    return -F.logsigmoid(better - worse - margin) + centre * (better + worse).square()


class Reward(Objective):
    """Score the better of two answers higher, by a head with one output."""

    form: ClassVar[Literal["compared"]] = "compared"
    unit: ClassVar[str] = "prompt"
    kind: Literal["reward"] = "reward"
    margin: float = Field(
        default=1.0, ge=0, description="factor of the rows' margins; of K answers each pair has the row's"
    )
    centre: float = Field(
        default=0.0, ge=0, description="c: weight of the squared sum of a pair's rewards; 0.01 is usual"
    )

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest` with a head of one output; returns sums over the batch's prompts."""
        answers = Answers.of(batch)
        pairs = answers.pairs()
        scores = model.scores(batch)[:, 0]
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        asked = self.margin * batch.extra["margin"].cpu()[pairs.owner].to(scores)
        loss = pairs.loss(reward_loss(scores[pairs.better], scores[pairs.worse], asked, self.centre), scores)
        with torch.no_grad():
            sure = torch.sigmoid(scores[pairs.better] - scores[pairs.worse])
            brier = ((1 - sure).square() * pairs.shares.to(sure)).sum()
        return Loss(loss.sum, loss.count, loss.metrics | {"brier": brier})
