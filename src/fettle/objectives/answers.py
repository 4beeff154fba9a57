"""What objectives over preferences share: the answers of a batch, the pairs among them, and their log-probabilities.

    log p(y | x) = sum of the log-probabilities of y's learned tokens

Shapes: E examples (prompts) of a batch, A answers, P pairs of a better and a worse answer to one prompt, N learned tokens. Answers
are counted in the order of the row; those of an example stand the best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.core.families import Loss


@dataclass(frozen=True)
class Answers:
    """The answers of a batch.

    `lengths` int64 [A]: learned tokens of each; `owner` int64 [A]: its example; `place` int64 [A]: its number within that;
    `ranks` float32 [A]: 1 for the best (of one answer that was judged: 1 where it is desired); `weights` float32 [E].
    """

    lengths: Tensor
    owner: Tensor
    place: Tensor
    ranks: Tensor
    weights: Tensor

    @staticmethod
    def of(batch: Batch) -> Answers:
        """Read from the segments. FettleError where the batch holds no preferences."""
        if "ranks" not in batch.extra:
            raise FettleError(
                "objective: it learns from preferences, and the batch holds none; give it rows with 'chosen' and 'rejected' "
                "(data/preference.py makes the examples)"
            )
        ranks = batch.extra["ranks"].cpu()
        owner, place = (ranks > 0).nonzero(as_tuple=True)
        parents = {s.parent for s in batch.segments}
        leaves = [
            s for i, (s, name) in enumerate(zip(batch.segments, batch.names, strict=True)) if name and i not in parents
        ]
        if len(leaves) != len(owner):
            raise FettleError(
                f"objective: {len(leaves)} answers in the row and {len(owner)} ranks; each answer needs one"
            )
        learned = batch.targets.cpu() != IGNORE
        lengths = torch.stack([learned[s.start : s.stop].sum() for s in leaves])
        if int(lengths.sum()) != int(learned.sum()):
            raise FettleError(
                "objective: a prompt has learned tokens; answers stand below their prompt, cut one token short"
            )
        return Answers(lengths, owner, place, ranks[owner, place], batch.extra["example_weights"].cpu().float())

    def sums(self, logps: Tensor) -> Tensor:
        """[A]: what the learned tokens [N] of each answer sum to."""
        return torch.stack([part.sum() for part in logps.split(self.lengths.tolist())])

    def pairs(self) -> Pairs:
        """Every two answers to one prompt with different ranks. FettleError where there are none."""
        same = self.owner[:, None] == self.owner[None, :]
        better, worse = (same & (self.ranks[:, None] < self.ranks[None, :])).nonzero(as_tuple=True)
        if not len(better):
            raise FettleError(
                "objective: no two answers of the batch are compared; judged answers are learned from by kto"
            )
        of = self.owner[better]
        each = self.weights / torch.bincount(of, minlength=len(self.weights)).clamp_min(1)
        return Pairs(better, worse, each[of], of)


class Pairs(NamedTuple):
    """Pairs of answers: `better` and `worse` int64 [P]; `shares` float32 [P], which sum to its weight in each example; `owner` [P].

    So a prompt with K answers counts once, however many pairs they make (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
    """

    better: Tensor
    worse: Tensor
    shares: Tensor
    owner: Tensor

    def loss(self, each: Tensor, rewards: Tensor) -> Loss:
        """The losses [P] of the pairs as one, with what to report of the answers' `rewards` [A]."""
        better, worse = (
            rewards.detach()[self.better.to(rewards.device)],
            rewards.detach()[self.worse.to(rewards.device)],
        )
        shares = self.shares.to(each)
        total = (each * shares).sum()

        def mean(values: Tensor) -> Tensor:
            return (values.to(shares) * shares).sum()

        figures = {"loss": total.detach(), "accuracy": mean((better > worse) + 0.5 * (better == worse))}
        figures |= {"margin": mean(better - worse), "chosen": mean(better), "rejected": mean(worse)}
        return Loss(total, shares.sum(), figures)


def answer_logps(model: Any, batch: Batch, answers: Answers) -> Tensor:
    """[A]: log p(y | x) of every answer; `model` is a Forest."""
    return answers.sums(model.logps(batch))


def reference_logps(model: Any, batch: Batch, answers: Answers) -> Tensor:
    """[A]: the same by the model from before this stage: what the batch brings of it, or computed with what trains switched off."""
    if "reference" in batch.extra:
        kept = batch.extra["reference"].to(model.device)
        return kept[answers.owner.to(kept.device), answers.place.to(kept.device)]
    with model.reference() as before:
        return answer_logps(before, batch, answers)


def ratios(model: Any, batch: Batch, answers: Answers) -> Tensor:
    """[A]: log p(y | x) / p_ref(y | x) of every answer."""
    before = reference_logps(model, batch, answers)
    return answer_logps(model, batch, answers) - before


def compare(model: Any, batch: Batch) -> tuple[Pairs, Answers, Tensor]:
    """The pairs of a batch, its answers, and the log-ratio [A] of each, by which the methods with a reference tell better from worse."""
    answers = Answers.of(batch)
    return answers.pairs(), answers, ratios(model, batch, answers)
