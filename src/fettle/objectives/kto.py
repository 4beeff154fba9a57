"""KTO: from single answers that are desired or not (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

    r(y) = log p(y | x) / p_ref(y | x)        z = max(0, mean of r over mismatched answers)
    L = w_d (1 - sigmoid(beta (r - z)))       of a desired answer
        w_u (1 - sigmoid(beta (z - r)))       of another

z estimates the KL from the reference by answers to other prompts of the same row (each prompt with the first answer of the
example before); it has no gradient. As in the paper it is the batch's own, so that rows with more examples estimate it better; of a row
with one example it is 0. Pairs serve too: the better answer is desired, the others are not.

Where a long prompt meets a long answer, the answer is cut to what the model can see of both.

Shapes: A answers; `ratio` their log-ratios r [A], `desired` bool [A].
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fettle.core.batch import IGNORE, Batch, Example, Node, ancestors, pack
from fettle.core.families import Loss, Objective
from fettle.objectives.answers import Answers, answer_logps, ratios
from fettle.objectives.reference import Reference


def kto_loss(ratio: Tensor, desired: Tensor, kl: Tensor, beta: float) -> Tensor:
    """[A], before the weights of the two kinds; `kl` is z, a scalar."""
    sign = torch.where(desired, 1.0, -1.0).to(ratio)
    return 1 - torch.sigmoid(beta * sign * (ratio - kl))


def mismatched(batch: Batch, bound: int | None = None) -> Batch | None:
    """Each prompt of a batch followed by the first answer of the example before; None where there is one example.

    It needs no more tokens than the batch, and has its shape. An answer is cut to what its prompt leaves it of `bound`, the most
    tokens that the policy sees.
    """
    answers = Answers.of(batch)
    parents = {s.parent for s in batch.segments}
    leaves = [i for i, name in enumerate(batch.names) if name and i not in parents]
    firsts = [leaves[int(a)] for a in (answers.place == 0).nonzero()[:, 0]]
    if len(firsts) < 2:
        return None
    tokens, learned = batch.tokens.cpu(), (batch.targets != IGNORE).cpu()
    prompts, ends, marks = [], [], []
    for leaf in firsts:
        path = [batch.segments[i] for i in ancestors(batch.segments, leaf)]
        whole = torch.cat([tokens[s.start : s.stop] for s in path])
        cut = sum(s.stop - s.start for s in path[:-1]) + int(learned[path[-1].start : path[-1].stop].nonzero()[0]) + 1
        prompts.append(whole[:cut])
        ends.append(whole[cut:])
        marks.append(learned[path[-1].stop - len(whole) + cut - 1 : path[-1].stop - 1])
    examples = []
    for prompt, answer, mark in zip(prompts, [ends[-1], *ends[:-1]], [marks[-1], *marks[:-1]], strict=True):
        room = (len(tokens) if bound is None else bound) - len(prompt)  # a token or more: its own answer fits
        answer, mark = answer[:room], mark[:room]
        weights = np.zeros(len(prompt) + len(answer), np.float32)
        weights[len(prompt) :] = mark.numpy()
        extra = {"ranks": np.array([1], np.float32), "example_weights": np.array(1, np.float32)}
        node = Node(torch.cat([prompt, answer]).numpy().astype(np.int32), weights)
        examples.append(Example((node,), "mismatched", extra))
    return pack(examples, len(batch.tokens), int(tokens[-1]))


@torch.no_grad()
def estimated_kl(model: Any, batch: Batch) -> Tensor:
    """z: the mean log-ratio of mismatched answers, at least 0."""
    other = mismatched(batch, model.context)
    if other is None:
        return torch.zeros((), device=model.device)
    answers = Answers.of(other)
    if "reference_mismatched" in batch.extra:
        reference = batch.extra["reference_mismatched"].to(model.device)
    else:
        with model.reference() as before:
            reference = answer_logps(before, other, answers).mean()
    return (answer_logps(model, other, answers).mean() - reference).clamp_min(0)


class KTO(Objective):
    """Make desired answers likelier than the reference does, and others less likely."""

    form: ClassVar[Literal["judged"]] = "judged"
    unit: ClassVar[str] = "answer"
    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, description="how soon an answer is far enough from the reference")
    desired: float = Field(default=1.0, gt=0, description="weight of desired answers")
    undesired: float = Field(default=1.0, gt=0, description="weight of the others; with few of them raise it")
    reference: Reference = "auto"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's answers."""
        answers = Answers.of(batch)
        kl = estimated_kl(model, batch)
        ratio = ratios(model, batch, answers)
        good = (answers.ranks == 1).to(ratio.device)
        weights = answers.weights[answers.owner].to(ratio)
        each = kto_loss(ratio, good, kl, self.beta) * torch.where(good, self.desired, self.undesired)
        total = (each * weights).sum()
        ahead = torch.where(good, 1, -1) * (ratio.detach() - kl)
        figures = {"accuracy": (ahead > 0).to(weights), "margin": self.beta * ahead, "kl": kl.expand_as(ahead)}
        metrics = {"loss": total.detach(), **{key: (value * weights).sum() for key, value in figures.items()}}
        return Loss(total, weights.sum(), metrics)
