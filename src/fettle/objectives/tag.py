"""Labels for words (Devlin et al. 2018, arXiv 1810.04805, section 5.3): the first piece of each word carries the word's label.

    L = - sum_n w_n log softmax(z_n)[y_n]  /  sum_n w_n

N first pieces of the optimizer step, z_n scores [L] at the piece, y_n the word's label, w_n its weight (1 unless the row says).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.families import Loss, Objective


def tag_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Loss:
    """`scores` [N, L], `labels` int64 [N], `weights` float32 [N]. Metrics: loss and accuracy a word."""
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    total = (F.cross_entropy(scores, labels, reduction="none") * weights).sum()
    right = ((scores.argmax(1) == labels) * weights).sum()
    return Loss(total, weights.sum(), {"loss": total.detach(), "accuracy": right})


class Tag(Objective):
    """Cross-entropy of words' labels, by the head of a model with task: tag."""

    kind: Literal["tag"] = "tag"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's labelled words."""
        scores = model.scores(batch)
        learned = torch.nonzero(batch.targets != IGNORE).squeeze(-1)
        return tag_loss(scores, batch.targets[learned].to(scores.device), batch.weights[learned].to(scores.device))
