"""Labels for texts: what fine-tuned encoders are made for (Devlin et al. 2018, arXiv 1810.04805, section 3.2), and reward heads.

    one of L labels       L = - sum_e log softmax(z_e)[y_e]                                y_e a label's number
    several, or none      L = - sum_e 1/L sum_l  y log sigmoid(z) + (1 - y) log sigmoid(-z)     y_e in {0, 1}^L
    a number              L =   sum_e (z_e - y_e)^2                                        one output, y_e real

each text with its weight (1 unless its row says), divided by the sum of the weights of the optimizer step.

Shapes: E texts, L labels; z scores [E, L], y labels [E, 1], or [E, L] where there are several.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.families import Loss, Objective


def classify_loss(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> Loss:
    """`scores` [E, L], `labels` as above, `weights` [E]. Metrics: loss, and accuracy (of a number its absolute error) a text."""
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    weights = scores.new_ones(len(scores)) if weights is None else weights.to(scores)
    outputs = scores.shape[1]
    if outputs == 1:
        errors = scores[:, 0] - labels[:, 0].to(scores)
        each, metrics = errors.square(), {"absolute_error": errors.detach().abs()}
    elif labels.shape[1] > 1:
        wanted = labels.to(scores)
        each = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(1)
        metrics = {"accuracy": ((scores > 0) == (wanted > 0)).all(1)}
    else:
        number = labels[:, 0].long()
        each, metrics = F.cross_entropy(scores, number, reduction="none"), {"accuracy": scores.argmax(1) == number}
    total = (each * weights).sum()
    return Loss(total, weights.sum(), {"loss": total.detach(), **{k: (v * weights).sum() for k, v in metrics.items()}})


class Classify(Objective):
    """Cross-entropy of a text's label, by the head of a model with task: classify; squared error where it has one output."""

    kind: Literal["classify"] = "classify"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's texts."""
        if "labels" not in batch.extra:
            raise FettleError("objective: classify needs a label for each text; give it data of format: labelled")
        scores = model.scores(batch)
        labels = batch.extra["labels"].to(scores.device)
        if len(labels) != len(scores):
            raise FettleError(
                f"objective: classify found {len(labels)} labels for {len(scores)} texts; give each text one segment"
            )
        return classify_loss(scores, labels, batch.extra.get("label_weights"))
