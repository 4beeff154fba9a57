"""PPO as InstructGPT has it (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593; Ouyang et al. 2022,
arXiv 2203.02155), with generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438).

    reward       R_t = - beta (log pi_old(o_t) - log pi_ref(o_t)) + [t is the last] r             of each token, whitened if asked
    advantage    A_t = d_t + gamma lambda A_t+1,      d_t = R_t + gamma V_t+1 - V_t,               V after the last token is 0
    return       G_t = A_t + V_t;                     then A is whitened over the phase
    policy       - min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)
    value        1/2 max((V_t - G_t)^2, (clip(V_t, V_old - c, V_old + c) - G_t)^2)
    L            mean over tokens of  policy + weight * value         (+ the pre-training mix: `mix` of the stage)

The critic V is a tree of its own edits and a scalar head on the policy's base (models/critic.py).
Shapes: A answers, N tokens of all of them one after the other, L the longest answer.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fettle.core.families import Loss
from fettle.objectives.policy import Answers, Judged, PolicyGradient, Tokens, surrogate, whitened


def token_rewards(answers: Answers, beta: float) -> Tensor:
    """float64 [N]: the divergence's price of each token, and the answer's reward at its last one."""
    found = torch.zeros(len(answers.old), dtype=torch.float64)
    if answers.reference is not None:
        found -= beta * (answers.old.double() - answers.reference.double())
    found[answers.lengths.cumsum(0) - 1] += answers.rewards
    return found


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [N] of tokens with `rewards` and `values` [N] in answers of `lengths` [A]."""
    inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [A, L]
    delta = torch.zeros(inside.shape, dtype=rewards.dtype)
    value = torch.zeros(len(lengths), inside.shape[1] + 1, dtype=rewards.dtype)
    delta[inside], value[:, :-1][inside] = rewards, values.to(rewards.dtype)
    delta += gamma * value[:, 1:] - value[:, :-1]
    for t in range(delta.shape[1] - 2, -1, -1):
        delta[:, t] += gamma * lam * delta[:, t + 1] * inside[:, t + 1]
    return delta[inside]


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(half of the clipped squared error, whether the clip holds) [N]."""
    free = (values - returns).square()
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(free, held), (held > free).detach()


def ppo_loss(
    logps: Tensor, values: Tensor, tokens: Tokens, clip: tuple[float, float], clip_value: float, weight: float
) -> Loss:
    """`logps`, `values` [N] now. Metrics: loss, policy_loss, value_loss and the clipped shares, a token."""
    policy, clipped = surrogate(tokens.ratio(logps), tokens.advantages, *clip)
    returns = tokens.advantages.new_zeros(0) if tokens.returns is None else tokens.returns
    value, held = value_loss(values, values.detach() if tokens.values is None else tokens.values, returns, clip_value)
    total, number = tokens.sum(policy + weight * value), float(len(logps))
    return Loss(
        total, tokens.count,
        {
            "loss": total.detach(), "policy_loss": tokens.sum(policy).detach(), "value_loss": tokens.sum(value).detach(),
            "clipped": (clipped.sum(), number), "value_clipped": (held.sum(), number),
        },
    )  # fmt: skip


class PPO(PolicyGradient):
    """A critic's advantages of every token; several passes over the same answers."""

    kind: Literal["ppo"] = "ppo"
    critic: ClassVar[bool] = True
    clip: tuple[float, float] = Field(default=(0.2, 0.2), description="[low, high] of the ratio")
    clip_value: float = Field(default=0.2, gt=0, description="how far a value may move within a phase")
    value_weight: float = Field(default=0.1, ge=0, description="of the critic's loss")
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of generalized advantage estimation")
    whiten_rewards: bool = Field(default=False, description="token rewards of variance 1 over a phase, their mean kept")
    whiten: bool = Field(default=True, description="advantages of mean 0 and variance 1 over a phase")

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """`answers.values` are the critic's, before each token."""
        assert answers.values is not None
        rewards = token_rewards(answers, beta)
        if self.whiten_rewards:
            rewards = whitened(rewards, shift=False)
        values = answers.values.double()
        each = gae(rewards, values, answers.lengths, self.gamma, self.lam)
        returns = each + values
        explained = 1 - float((returns - values).var() / returns.var().clamp_min(1e-12)) if len(returns) > 1 else 0.0
        each = whitened(each) if self.whiten else each
        return Judged(each.float(), returns.float(), figures={"value_explained": explained})

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """See `ppo_loss`."""
        assert values is not None
        return ppo_loss(logps, values, tokens, self.clip, self.clip_value, self.value_weight)
