"""GRPO: group relative policy optimization (Shao et al. 2024, arXiv 2402.03300), and what differs from it by one choice.

    A_i = (r_i - mean(r)) / (std(r) + e)                over the n answers of a prompt, the same for all tokens of answer i
    L   = mean of  - min(rho A, clip(rho, 1 - low, 1 + high) A) + beta k(pi || pi_ref)

    scale: group     the paper's           none    Dr. GRPO, no bias towards easy and hard prompts (Liu et al. 2025, arXiv 2503.20783)
           batch     std over all answers of the phase
    mean:  answer    the paper's: of each answer's mean      token   over all tokens of the step (DAPO, Yu et al. 2025, arXiv 2503.14476)
           constant  sums over max_tokens (Dr. GRPO)
    clip:  [low, high]; a larger high is DAPO's clip-higher
    ratio: token     rho_t                 answer  exp(mean_t log rho_t), one for all tokens (GSPO, Zheng et al. 2025, arXiv 2507.18071)

Shapes: P prompts, n answers each, A = P n answers, N tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.core.families import Loss
from fettle.objectives.policy import Answers, Judged, Per, PolicyGradient, Tokens, alone, k3, surrogate

EPSILON = 1e-4  # added to a standard deviation
Scale = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, group: int, scale: Scale = "group") -> Tensor:
    """[A] -> [A]: each reward less the mean of its group of `group`; the standard deviation is the unbiased one."""
    groups = rewards.view(-1, group)
    centred = (groups - groups.mean(1, keepdim=True)).reshape(-1)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (rewards.std() + EPSILON)
    return (centred.view(-1, group) / (groups.std(1, keepdim=True) + EPSILON)).reshape(-1)


def grpo_loss(
    logps: Tensor, tokens: Tokens, clip: tuple[float, float] = (0.2, 0.2), ratio: Literal["token", "answer"] = "token"
) -> Loss:
    """`logps` [N]. Metrics: loss, the share of tokens whose ratio is clipped, and the mean of the loss's divergence, a token."""
    log_ratio = tokens.ratio(logps)
    if ratio == "answer":
        log_ratio = tokens.mean_of_answer(log_ratio)
    each, clipped = surrogate(log_ratio, tokens.advantages, *clip)
    number = float(len(clipped))
    figures: dict[str, Any] = {"clipped": (clipped.sum(), number)}
    if tokens.beta and tokens.reference is not None:
        apart = k3(logps, tokens.reference)
        each = each + tokens.beta * apart
        figures["k3"] = (apart.detach().sum(), number)
    total = tokens.sum(each)
    return Loss(total, tokens.count, {"loss": total.detach(), **figures})


class GRPO(PolicyGradient):
    """Advantages within the group of a prompt's answers; no critic."""

    kind: Literal["grpo"] = "grpo"
    scale: Scale = Field(default="group", description="what centred rewards are divided by; none: Dr. GRPO")
    mean: Per = Field(default="answer", description="what the loss is a mean over; token: DAPO, constant: Dr. GRPO")
    clip: tuple[float, float] = Field(default=(0.2, 0.2), description="[low, high]; [0.2, 0.28]: DAPO's clip-higher")
    ratio: Literal["token", "answer"] = Field(default="token", description="answer: GSPO")

    def lack(self, answers: int) -> str | None:
        """Other answers to the prompt."""
        return alone(self.kind, answers)

    def per(self) -> Per:
        """As the recipe says."""
        return self.mean

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """An answer of a group whose rewards are all equal teaches nothing, unless the divergence does."""
        each = group_advantages(answers.rewards, answers.group, self.scale)
        groups = answers.rewards.view(-1, answers.group)
        equal = (groups == groups[:, :1]).all(1)
        used = torch.ones_like(equal) if beta else ~equal
        figures = {"equal_groups": float(equal.double().mean())}
        return Judged(answers.spread(each.float()), used=used.repeat_interleave(answers.group), figures=figures)

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """See `grpo_loss`."""
        return grpo_loss(logps, tokens, self.clip, self.ratio)
