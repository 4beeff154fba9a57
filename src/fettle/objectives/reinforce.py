"""REINFORCE with a baseline (Williams 1992): the plainest policy gradient.

    R_i = r_i - beta (log pi_old(o_i) - log pi_ref(o_i))          A_i = R_i - b          L = mean over answers of - A_i log pi(o_i)

    baseline: running   b <- decay b + (1 - decay) mean(R) after each phase; the first phase's own mean before that
              phase     the mean over the phase
              none      0

There is no ratio, so each phase is one optimizer step. Shapes: A answers, N tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fettle.core.families import Loss
from fettle.objectives.policy import Answers, Judged, Per, PolicyGradient, Tokens, whitened


def reinforce_loss(logps: Tensor, tokens: Tokens) -> Loss:
    """- A log pi of whole answers; `logps` [N]."""
    lengths = tokens.by_answer(tokens.weights.new_ones(len(tokens.weights)))[tokens.answer]
    total = -tokens.sum(lengths * tokens.advantages * logps)  # the weights are 1 / length, and an answer is a sum
    return Loss(total, tokens.count, {"loss": total.detach()})


class REINFORCE(PolicyGradient):
    """Rewards against a running mean; one answer a prompt is enough."""

    kind: Literal["reinforce"] = "reinforce"
    one_step: ClassVar[bool] = True
    baseline: Literal["running", "phase", "none"] = "running"
    decay: float = Field(default=0.9, ge=0, lt=1, description="of the running mean")
    whiten: bool = Field(default=False, description="advantages of mean 0 and variance 1 over a phase")

    def per(self) -> Per:
        """Answers; each is one action."""
        return "answer"

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """The running mean is kept in `memory`."""
        total = answers.rewards - beta * answers.divergence()
        mean = float(total.mean())
        before = memory.get("baseline", mean)
        memory["baseline"] = self.decay * before + (1 - self.decay) * mean
        each = total - {"running": before, "phase": mean, "none": 0.0}[self.baseline]
        each = whitened(each) if self.whiten else each
        return Judged(answers.spread(each.float()), figures={"baseline": before})

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """See `reinforce_loss`."""
        return reinforce_loss(logps, tokens)
