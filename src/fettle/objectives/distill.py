"""Distillation: a student is trained towards a teacher's distribution over the next token (Hinton et al. 2015, arXiv 1503.02531).

    p = softmax(u / t), q = softmax(z / t)        u the teacher's logits, z the student's, t the temperature

    forward   D = KL(p || q) = sum_v p_v (log p_v - log q_v)                covers all that the teacher says
    reverse   D = KL(q || p)                                                keeps to what the teacher says often
    jsd       D = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q   between the two, and bounded
    mse       D = mean_v (u_v - z_v)^2                                      logits themselves, without t

    L = sum_i w_i [ (1 - h) t^2 D_i  -  h log softmax(z_i)[y_i] ]  /  sum_i w_i

t^2 keeps the gradient's size where t changes (Hinton, section 2); h is the share of the hard loss. Reverse: MiniLLM (Gu et al.
2023, arXiv 2306.08543). jsd: GKD (Agarwal et al. 2023, arXiv 2306.13649), where b -> 0 and b -> 1 turn towards forward and reverse.

With `top_k` the teacher keeps its k likeliest tokens, and all others count as one event with what they share: D of k + 1 events,
never more than D of V, and 0 only where the two agree on each of them. Cut off without that event, a student would learn that
the tail has no probability at all. For mse: the mean over the k.

No more than a chunk of rows has logits at once, neither the student's nor the teacher's.

Shapes: N learned targets, n rows of a chunk, C width, V vocabulary, k kept tokens, E events (V, or k + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.core.families import Loss, Objective
from fettle.core.spec import Spec
from fettle.models.head import Head, chunks
from fettle.models.roles import obstacle

Divergence = Literal["forward", "reverse", "jsd", "mse"]
# What a batch brings of a teacher that was asked before: ids int32 [N, k], logits [N, k], norms [N, 2].
GIVEN = {"ids": "teacher_ids", "logits": "teacher_logits", "norms": "teacher_norms"}


# Divergences of log-probabilities [.., E], each [..].


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log p and log q; where p is 0, nothing is added."""
    share = p.exp()
    return torch.where(share > 0, share * (p - q), 0.0).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p)."""
    return forward_kl(q, p)


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence, 0 < beta < 1."""
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


# What the teacher says.


@dataclass(frozen=True)
class Target:
    """The teacher's logits [n, k] of the tokens `ids` int64 [n, k] (all V in order where None), with what makes them log p.

    `norm` [n] is log sum_v exp(u_v / t) over all V, and `rest` [n] the log-probability of all tokens that are not kept.
    """

    logits: Tensor
    norm: Tensor
    ids: Tensor | None = None
    rest: Tensor | None = None

    @staticmethod
    def of(logits: Tensor, temperature: float, top_k: int | None) -> Target:
        """From logits [n, V], in float32 or wider."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scaled = wide / temperature
        norm = scaled.logsumexp(-1)
        if top_k is None or top_k >= wide.shape[-1]:
            return Target(wide, norm)
        kept, ids = wide.topk(top_k, -1)
        return Target(kept, norm, ids, scaled.scatter(1, ids, -math.inf).logsumexp(-1) - norm)

    def logps(self, temperature: float) -> Tensor:
        """log p of the events: [n, E]."""
        known = self.logits / temperature - self.norm[:, None]
        return known if self.rest is None else torch.cat([known, self.rest[:, None]], -1)


def student_logps(logits: Tensor, target: Target, temperature: float) -> Tensor:
    """log q of the target's events, [n, E], of logits [n, V]."""
    scaled = logits / temperature
    norm = scaled.logsumexp(-1, keepdim=True)
    if target.ids is None:
        return scaled - norm
    rest = scaled.scatter(1, target.ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scaled.gather(1, target.ids), rest], -1) - norm


def distance(logits: Tensor, target: Target, kind: Divergence, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """D of each row [n]: the student's logits [n, V] from what the teacher says."""
    if kind == "mse":
        mine = logits if target.ids is None else logits.gather(1, target.ids)
        return (target.logits - mine).square().mean(-1)
    p, q = target.logps(temperature), student_logps(logits, target, temperature)
    match kind:
        case "forward":
            return forward_kl(p, q)
        case "reverse":
            return reverse_kl(p, q)
        case _:
            return jensen_shannon(p, q, beta)


Says = Callable[[slice], Target]  # what a teacher says of the learned targets of a batch, a chunk of them at a time


def given(batch: Batch, device: torch.device) -> Says:
    """What a batch brings of a teacher that was asked before."""
    ids, logits, norms = (batch.extra[key].to(device) for key in GIVEN.values())

    def says(at: slice) -> Target:
        return Target(logits[at], norms[at, 0], ids[at].long(), norms[at, 1])

    return says


class Source(Protocol):
    """Where a teacher's targets come from: a model, or a file."""

    def targets(self, student: Any, batch: Batch, learned: Tensor) -> Says:
        """What it says at the positions `learned` [N] of a batch; `student` is the Forest that is trained."""
        ...


@dataclass(frozen=True)
class Live:
    """A teacher that is asked as training goes: another model, or where `forest` is None the student before this stage.

    It speaks of the student's tokens alone, although its embedding may have more rows.
    """

    temperature: float
    top_k: int | None
    forest: Any = None

    def targets(self, student: Any, batch: Batch, learned: Tensor) -> Says:
        """One forward pass now; the head once for each chunk."""
        if self.forest is None:
            return self._of_itself(student, batch, learned)
        with torch.no_grad():
            hidden, head = self.forest.hidden(batch).index_select(0, learned.to(self.forest.device)), self.forest.head
        return self._says(head, hidden, student)

    def _of_itself(self, student: Any, batch: Batch, learned: Tensor) -> Says:
        with student.reference():
            hidden, head = student.hidden(batch).index_select(0, learned.to(student.device)), student.head
        says = self._says(head, hidden, student)

        def again(at: slice) -> Target:
            with student.reference():  # edits may stand around the head too
                return says(at)

        return again

    def _says(self, head: Head, hidden: Tensor, student: Any) -> Says:
        shared = int(student.config.get_text_config().vocab_size)  # further rows only fill up the teacher's embedding

        def says(at: slice) -> Target:
            with torch.no_grad():
                logits = head.logits(hidden[at])[:, :shared]
                return Target.of(logits.to(student.device), self.temperature, self.top_k)

        return says


# The loss, a chunk at a time.

Piece = Callable[[Tensor, slice], tuple[Tensor, Tensor]]  # hidden [n, C] -> loss [n], figures [n, F] without gradient


class _FrozenHead(torch.autograd.Function):
    """Rows of a loss whose head does not train: each row's gradient by its hidden state is made while its logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, piece: Piece, spans: list[slice]) -> tuple[Tensor, Tensor]:
        """hidden [N, C] -> [N], [N, F]."""
        losses, figures = [], []
        direction = torch.empty_like(hidden)
        for at in spans:
            with torch.enable_grad():
                part = hidden[at].detach().requires_grad_()
                loss, figure = piece(part, at)
                (direction[at],) = torch.autograd.grad(loss.sum(), part)
            losses.append(loss.detach())
            figures.append(figure)
        ctx.save_for_backward(direction)
        found = torch.cat(figures)
        ctx.mark_non_differentiable(found)
        return torch.cat(losses), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The cotangent of each row times its direction."""
        (direction,) = ctx.saved_tensors
        return (direction * grad[:, None]).to(direction.dtype), None, None


def by_chunks(hidden: Tensor, head: Head, piece: Piece) -> tuple[Tensor, Tensor]:
    """`piece` over all rows, N > 0; where the head trains, each chunk is computed again in the backward pass."""
    spans = chunks(len(hidden), head.vocabulary(hidden), hidden.device)
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.module.parameters()):
        parts = [checkpoint(piece, hidden[at], at, use_reentrant=False) for at in spans]
    elif torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHead.apply(hidden, piece, spans)  # type: ignore[no-any-return]
    else:
        parts = [piece(hidden[at], at) for at in spans]
    return torch.cat([loss for loss, _ in parts]), torch.cat([figure for _, figure in parts])


class Teacher(Spec):
    """Who teaches. In a recipe a plain string stands for `path`."""

    plain: ClassVar[str | None] = "path"

    path: str | None = Field(
        None,
        description="a run or artifact folder, a model folder or a hub id, with the student's vocabulary; left out: the "
        "student itself from before this stage, its edits switched off",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cached: bool = Field(
        False, description="ask the teacher once for every example, keep its top_k logits on disk, and train without it"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_string(cls, data: Any) -> Any:
        return {cls.plain: data} if isinstance(data, str) else data


class Distill(Objective):
    """A divergence from a teacher, mixed with the cross-entropy of the learned tokens."""

    kind: Literal["distill"] = "distill"
    teacher: Teacher = Teacher()
    divergence: Divergence = Field("forward", description="from the teacher; mse compares logits")
    beta: float = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(None, ge=1, description="keep this many of the teacher's logits, the rest as one event")
    hard: float = Field(0.0, ge=0, le=1, description="share of the cross-entropy of the data's own tokens")
    _source: Source | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        if self.teacher.cached and self.top_k is None:
            raise ValueError(
                "top_k: teacher.cached keeps a number of logits a token on disk; say how many, as in top_k: 64"
            )
        if self.divergence == "mse" and self.temperature != 1:
            raise ValueError("temperature: mse compares the logits as they are; leave it out")
        return self

    def taught_by(self, source: Source) -> Distill:
        """The same, which asks `source`."""
        made = self.model_copy()
        made._source = source
        return made

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`; returns sums over the batch's learned tokens. Metrics: loss, divergence, nll."""
        learned = torch.nonzero(batch.targets != IGNORE).squeeze(-1)
        says = self._says(model, batch, learned)  # before the student's pass holds its memory
        hidden = model.hidden(batch)
        device = hidden.device
        hidden, weights = hidden.index_select(0, learned.to(device)), batch.weights[learned].to(device)
        wanted = batch.targets[learned].to(device)
        if not len(learned):
            nothing = hidden.sum().float()
            return Loss(nothing, weights.sum(), dict.fromkeys(("loss", "divergence", "nll"), nothing.detach()))
        head = model.head

        def piece(part: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            return self.rows(head.logits(part), wanted[at], says(at))

        losses, figures = by_chunks(hidden, head, piece)
        total = (losses * weights).sum()
        apart, nll = (figures * weights[:, None]).sum(0)
        return Loss(total, weights.sum(), {"loss": total.detach(), "divergence": apart, "nll": nll})

    def rows(self, logits: Tensor, wanted: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """The loss of each row [n], and [n, 2] its divergence and the negative log-likelihood of `wanted` int64 [n]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shared = logits.shape[-1] if target.ids is not None else target.logits.shape[-1]
        apart = distance(logits[:, :shared], target, self.divergence, self.temperature, self.beta)
        nll = logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]
        scale = 1.0 if self.divergence == "mse" else self.temperature**2
        soft = (1 - self.hard) * scale
        loss = soft * apart if not self.hard else soft * apart + self.hard * nll
        return loss, torch.stack([apart, nll], 1).detach()

    def teacher_in(self, model: Any) -> Source:
        """The student from before this stage, as its own teacher. FettleError where its edits cannot be switched off."""
        if why := obstacle(model.model):
            raise FettleError(
                f"objective.teacher: the student from before this stage cannot be had by switching its edits off, since {why}; "
                "name the teacher by its path, or set teacher: {cached: true} and top_k"
            )
        return Live(self.temperature, self.top_k)

    def _says(self, model: Any, batch: Batch, learned: Tensor) -> Says:
        if GIVEN["ids"] in batch.extra:
            return given(batch, model.device)
        if self._source is not None:
            return self._source.targets(model, batch, learned)
        if self.teacher.path is not None or self.teacher.cached:
            raise FettleError(
                "objective: distill was not given its teacher; a recipe's stage opens it, or call taught_by"
            )
        return self.teacher_in(model).targets(model, batch, learned)
