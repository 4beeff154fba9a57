"""Best of n: rejection sampling and tuning on what it keeps, the simple control (Stiennon et al. 2020, arXiv 2009.01325;
RAFT, Dong et al. 2023, arXiv 2304.06767).

    L = - mean over the kept answers' tokens of log pi(o_t)          kept: the `keep` best of each prompt's n answers

A prompt whose answers are all worth the same keeps none. The best of n drawn from pi is pi moved by at most log n - (n - 1) / n
nats (Beirami et al. 2024, arXiv 2401.01879).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.core.families import Loss
from fettle.objectives.policy import KL, Answers, Judged, PolicyGradient, Tokens


def best_of(rewards: Tensor, group: int, keep: int = 1) -> Tensor:
    """[A] -> bool [A]: the `keep` best of each group, the first of equals; none of a group whose rewards are all equal."""
    groups = rewards.view(-1, group)
    order = groups.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter(1, order[:, :keep], True)
    return (chosen & (groups != groups[:, :1]).any(1, keepdim=True)).reshape(-1)


def kept_loss(logps: Tensor, tokens: Tokens) -> Loss:
    """Cross-entropy of the kept answers, whose advantage is 1; `logps` [N]."""
    total = -tokens.sum(tokens.advantages * logps)
    return Loss(total, tokens.count, {"loss": total.detach()})


class BestOf(PolicyGradient):
    """Tune on the best of each prompt's own answers."""

    kind: Literal["best_of"] = "best_of"
    only_used: ClassVar[bool] = True
    keep: int = Field(default=1, ge=1, description="answers kept of each prompt")
    kl: KL = KL(beta=0)

    def lack(self, answers: int) -> str | None:
        """Answers that are not kept."""
        if answers > self.keep:
            return None
        return f"best_of keeps {self.keep} of {answers}, so none is chosen before another; say {self.keep + 1} or more"

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """An answer that is not kept teaches nothing."""
        kept = best_of(answers.rewards, answers.group, self.keep)
        figures = {"kept": float(kept.double().mean())}
        if kept.any():
            figures["kept_reward"] = float(answers.rewards[kept].mean())
        return Judged(answers.spread(kept.float()), used=kept, figures=figures)

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """See `kept_loss`."""
        return kept_loss(logps, tokens)
