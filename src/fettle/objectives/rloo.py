"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    R_i = r_i - beta (log pi_old(o_i) - log pi_ref(o_i))          the whole answer is one action
    A_i = R_i - mean of the R_j of the prompt's other answers, j != i
    L   = mean over answers of  - min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i),      log rho_i = sum_t log rho_t

At the first step of a phase rho is 1 and the gradient is that of - A_i log pi(o_i). Shapes: n answers of each prompt, A answers in all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fettle.core.families import Loss
from fettle.objectives.policy import Answers, Judged, Per, PolicyGradient, Tokens, alone, surrogate, whitened


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """[A] -> [A]: each reward less the mean of the others of its group."""
    groups = rewards.view(-1, group)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (group - 1)).reshape(-1)


def sequence_loss(logps: Tensor, tokens: Tokens, clip: tuple[float, float]) -> Loss:
    """The surrogate of whole answers; `logps` [N]. Metrics: loss, and the share of answers whose ratio is clipped."""
    advantages = tokens.by_answer(tokens.advantages) / tokens.by_answer(tokens.advantages.new_ones(len(logps)))
    each, clipped = surrogate(tokens.by_answer(tokens.ratio(logps)), advantages, *clip)
    total = (tokens.by_answer(tokens.weights) * each).sum()
    return Loss(total, tokens.count, {"loss": total.detach(), "clipped": (clipped.sum(), float(len(clipped)))})


class RLOO(PolicyGradient):
    """Each answer against the mean of the prompt's others; no critic."""

    kind: Literal["rloo"] = "rloo"
    clip: tuple[float, float] = Field(default=(0.2, 0.2), description="[low, high] of a whole answer's ratio")
    whiten: bool = Field(default=False, description="advantages of mean 0 and variance 1 over a phase")

    def lack(self, answers: int) -> str | None:
        """Other answers to the prompt."""
        return alone(self.kind, answers)

    def per(self) -> Per:
        """Answers; each is one action."""
        return "answer"

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """An answer's divergence is part of its reward."""
        each = leave_one_out(answers.rewards - beta * answers.divergence(), answers.group)
        each = whitened(each) if self.whiten else each
        return Judged(answers.spread(each.float()))

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """See `sequence_loss`."""
        return sequence_loss(logps, tokens, self.clip)
