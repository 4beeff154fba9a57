"""What the policy-gradient methods share: the tokens of a batch of answers, the ratio, the clip, the divergence, whitening.

A policy writes answers o to prompts q, each answer gets a reward, and the methods (grpo.py, rloo.py, reinforce.py, ppo.py,
best_of.py) make it an advantage A of every token and a loss:

    ratio       rho_t = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)              1 where the policy has not moved since it wrote
    surrogate   L_t   = - min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)    Schulman et al. 2017, arXiv 1707.06347, equation 7
    divergence  k_t   = pi_ref / pi - log(pi_ref / pi) - 1 >= 0                 its mean under pi is KL(pi || pi_ref); Schulman 2020

Shapes: P prompts, n answers each, A = P n answers, N tokens of all answers one after the other (of a phase or of a batch).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.core.families import Loss, Objective
from fettle.core.spec import Spec
from fettle.models.critic import values_of

Per = Literal["answer", "token", "constant"]
KEYS = (
    "answer",
    "advantages",
    "old",
    "reference",
    "values",
    "returns",
    "rollout",
)  # of Tokens, as a batch carries them


class KL(Spec):
    """How far the policy may go from its reference.

    With a target, beta adapts after every phase (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):
    beta <- beta (1 + rate clip(KL / target - 1, -0.2, 0.2)).
    """

    beta: float = Field(default=0.05, ge=0, description="weight of the divergence; 0 leaves the policy free")
    target: float | None = Field(default=None, gt=0, description="nats an answer that an adaptive beta aims at")
    rate: float = Field(default=0.1, gt=0, description="of the adaptive beta")
    limit: float | None = Field(
        default=5.0, gt=0, description="nats a token over a phase beyond which the policy has come apart; null for none"
    )
    beyond: Literal["stop", "warn"] = Field(default="stop", description="what happens beyond the limit")

    @model_validator(mode="after")
    def _adapts(self) -> KL:
        if self.target is not None and not self.beta:
            raise ValueError("'target' adapts beta by factors, so beta must begin above 0")
        return self

    @property
    def asked(self) -> bool:
        """Whether anything asks for the reference's log-probabilities."""
        return self.beta > 0 or self.limit is not None

    def adapted(self, beta: float, found: float) -> float:
        """The next phase's beta after a phase with `found` nats an answer."""
        if self.target is None:
            return beta
        return beta * (1 + self.rate * min(max(found / self.target - 1, -0.2), 0.2))


@dataclass(frozen=True)
class Answers:
    """What a phase wrote, and what it was worth: `group` answers of each prompt stand together."""

    group: int
    lengths: Tensor  # int64 [A]
    rewards: Tensor  # float64 [A]
    old: Tensor  # float32 [N], log-probabilities under the policy that wrote
    reference: Tensor | None = None  # float32 [N]
    values: Tensor | None = None  # float32 [N]: the critic's, before each token

    @property
    def owner(self) -> Tensor:
        """int64 [N]: the answer of each token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def spread(self, each: Tensor) -> Tensor:
        """[A] -> [N]: a figure of each answer, for each of its tokens."""
        return each[self.owner]

    def divergence(self) -> Tensor:
        """float64 [A]: log pi_old - log pi_ref of whole answers; zeros where there is no reference."""
        found = torch.zeros(len(self.lengths), dtype=torch.float64)
        if self.reference is None:
            return found
        return found.index_add(0, self.owner, self.old.double() - self.reference.double())


@dataclass(frozen=True)
class Judged:
    """What a method makes of a phase's rewards. Where `used` is false, an answer's loss and gradient are zero at any weights."""

    advantages: Tensor  # float32 [N]
    returns: Tensor | None = None  # float32 [N], what a critic learns
    used: Tensor | None = None  # bool [A]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """The answers' tokens of one batch, in the order of `Forest.logps`. What a method does not use is None.

    `weights` [N] and `count` make a mean over the whole optimizer step: sum of weights x loss over sum of counts.
    """

    weights: Tensor
    count: Tensor
    answer: Tensor  # int64 [N], counted within the batch
    advantages: Tensor
    beta: float = 0.0
    old: Tensor | None = None  # None where the policy has not moved since: then it is its own
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    rollout: Tensor | None = None  # as the sampler gave them, to compare

    @staticmethod
    def of(batch: Batch, device: torch.device) -> Tokens:
        """What train/rollouts.py put into a batch."""
        given = {key: batch.extra[key].to(device) for key in KEYS if key in batch.extra}
        weights = batch.weights[batch.targets != IGNORE].to(device)
        count, beta = batch.extra["count"].to(device), float(batch.extra["beta"])
        return Tokens(weights=weights, count=count, beta=beta, **given)

    def ratio(self, logps: Tensor) -> Tensor:
        """log rho [N]."""
        return logps - (logps.detach() if self.old is None else self.old)

    def by_answer(self, each: Tensor) -> Tensor:
        """[N] -> [answers]: sums over each answer's tokens."""
        answers = int(self.answer.max()) + 1 if len(self.answer) else 0
        return each.new_zeros(answers).index_add(0, self.answer, each)

    def mean_of_answer(self, each: Tensor) -> Tensor:
        """[N] -> [N]: the mean over a token's answer, for each of its tokens."""
        return (self.by_answer(each) / self.by_answer(torch.ones_like(each)))[self.answer]

    def sum(self, each: Tensor) -> Tensor:
        """The weighted sum of [N], a scalar."""
        return (self.weights * each).sum()


class PolicyGradient(Objective):
    """A method that learns from its own answers; for `kind: reinforce`."""

    form: ClassVar[Literal["text", "compared", "judged", "rollouts"]] = "rollouts"
    critic: ClassVar[bool] = False  # whether it learns a value of every token
    only_used: ClassVar[bool] = False  # whether answers that teach nothing are no part of the mean
    one_step: ClassVar[bool] = False  # whether the policy must not have moved since it wrote
    kl: KL = KL()
    gap: float = Field(
        default=0.05, gt=0, description="nats a token by which sampler and trainer may differ on the same answers"
    )

    def judge(self, answers: Answers, beta: float, memory: dict[str, float]) -> Judged:
        """Advantages of a phase's answers. `memory` is what the method keeps from phase to phase; it may write to it."""
        raise NotImplementedError(f"{type(self).__name__}.judge")

    def loss(self, logps: Tensor, tokens: Tokens, values: Tensor | None) -> Loss:
        """The loss of a batch; `logps` float32 [N] of the policy now, `values` [N] of the critic now."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def lack(self, answers: int) -> str | None:
        """Why nothing can be learned from so many answers to each prompt; None where it can."""
        return None

    def per(self) -> Per:
        """What the loss is a mean over: answers, tokens, or answers of a constant length."""
        return "token"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; a batch without answers is one of the pre-training mix."""
        if "beta" not in batch.extra:
            if "mixed" not in batch.extra:
                raise FettleError(f"objective: {self.kind} learns from its own answers; say kind: reinforce")  # type: ignore[attr-defined]
            return mixed_loss(model.logps(batch), batch)
        logps = model.logps(batch)
        tokens = Tokens.of(batch, logps.device)
        loss = self.loss(logps, tokens, values_of(model, batch) if self.critic else None)
        if tokens.rollout is not None:
            loss.metrics["gap"] = compare(logps, tokens.rollout, self.gap, batch.names)
        return loss


def mixed_loss(logps: Tensor, batch: Batch) -> Loss:
    """Language modelling on rows of pre-training data; their weights hold the coefficient (Ouyang et al. 2022, equation 2)."""
    weights = batch.weights[batch.targets != IGNORE].to(logps.device)
    total = -(logps * weights).sum()
    return Loss(
        total,
        batch.extra["count"].to(logps.device),
        {"loss": total.detach(), "mix_loss": (total.detach(), weights.sum())},
    )


def compare(found: Tensor, rolled: Tensor, bound: float, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(sum over tokens of the absolute difference between the trainer's log-probabilities [N] and the sampler's, N).

    FettleError where its mean is over `bound`: then the gradient would be of another policy than the one that wrote.
    """
    apart = (found.detach() - rolled.to(found)).abs().double()
    total, count = apart.sum(), apart.new_tensor(float(len(apart)))
    if not total <= bound * count:
        shown = ", ".join(sorted({n for n in names if n})[:5])
        raise FettleError(
            f"objective.gap: trainer and sampler give the same answers log-probabilities that differ by {float(total / count):.3g} "
            f"nats a token ({float(apart.max()):.3g} at most), more than {bound:g}, on {shown}; set model.dtype: float32, or raise "
            "the gap if that is meant"
        )
    return total, count


def surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(- min(rho A, clip(rho) A), whether the clip holds) [N], both of log rho and A [N]."""
    ratio = log_ratio.exp()
    free, held = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, held), (held < free).detach()


def alone(kind: str, answers: int) -> str | None:
    """The lack of a method that holds a prompt's answers against each other."""
    return (
        f"{kind} compares the answers to a prompt, and 1 has nothing to be compared with; say 2 or more"
        if answers < 2
        else None
    )


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """[N], at least 0: an estimate of KL(pi || pi_ref) of each token that pi drew, unbiased and of low variance."""
    return torch.expm1(reference - logps) - (reference - logps)


def whitened(x: Tensor, shift: bool = True, epsilon: float = 1e-8) -> Tensor:
    """[N] with variance 1, and mean 0 where `shift`, else with its own mean."""
    mean = x.mean()
    scaled = (x - mean) * torch.rsqrt((x.var() if len(x) > 1 else x.new_zeros(())) + epsilon)
    return scaled if shift else scaled + mean


def each_weight(lengths: Tensor, per: Per, most: int) -> tuple[Tensor, Tensor]:
    """(the weight of an answer's tokens [A], what an answer counts [A]) for a mean over answers, tokens or a constant length."""
    one = torch.ones(len(lengths))
    match per:
        case "answer":
            return 1 / lengths.float(), one
        case "token":
            return one, lengths.float()
        case "constant":
            return one / most, one
