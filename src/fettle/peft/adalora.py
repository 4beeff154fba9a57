"""AdaLoRA: a budget of ranks that training hands out among the layers (Zhang et al. 2023, arXiv 2303.10512).

    y = W x + s P (L * (Q x))                                        P and Q near orthogonal, L the singular values
    loss + gamma * mean ||Q Q' - I||_F, ||P' P - I||_F               (equation 4; the mean over all P and Q, as in `peft`)
    I = |w dw|,  S <- b1 S + (1 - b1) I,  U <- b2 U + (1 - b2) |I - S|,  score of a number: S U       (equations 8 to 11)
    score of triplet i: score(L_i) + mean score(Q_i) + mean score(P_i)                                (equation 7)

The triplets of all layers are ranked together, and those over the budget have their L set to zero. The budget b(t) is all
triplets for `warmup` steps, then falls with the cube of what is left to `target_rank` a layer, and rests for the last
`final` steps, in which the choice stays as it is.

Shapes: W [N, K], Q `a` [r, K], P `b` [N, r], L `values` [r]. L starts at zero, so the model is unchanged at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import Decay
from fettle.models.select import linears
from fettle.models.surgery import beneath, dropout_of, made_by, replace, untie
from fettle.models.weight import in_out, live_weight, place, read_weight, write_weight
from fettle.peft.lora import low_rank

TRIPLET = ("a", "b", "values")


def budget_at(t: int, ends: tuple[int, int], budgets: tuple[int, int]) -> int:
    """Triplets to keep after step 1 <= `t`: `budgets[0]` up to ends[0], `budgets[1]` from ends[1], a cubic fall between."""
    (warm, rest), (first, final) = ends, budgets
    left = 1 - (min(max(t, warm), rest) - warm) / (rest - warm)
    return int((first - final) * left**3 + final)


@torch.no_grad()
def track(
    sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor, betas: tuple[float, float]
) -> None:
    """Move S and U, in place, by what one step's gradient says of a weight."""
    now = (weight * gradient).abs()
    sensitivity.lerp_(now, 1 - betas[0])
    uncertainty.lerp_((now - sensitivity).abs(), 1 - betas[1])


def triplet_scores(a: Tensor, b: Tensor, values: Tensor) -> Tensor:
    """[r]: importance of each triplet from that of the numbers of Q [r, K], P [N, r] and L [r]."""
    return values + a.mean(1) + b.mean(0)


def over_budget(scores: Tensor, budget: int) -> Tensor:
    """bool [n]: the least important, all but `budget` of them; those that tie with the last of them too."""
    spare = len(scores) - budget
    if spare <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores <= torch.kthvalue(scores, spare).values


def skewness(matrices: Iterable[Tensor]) -> Tensor:
    """The mean of ||M M' - I||_F over matrices [r, n]: how far their rows are from orthonormal."""
    each = [torch.linalg.matrix_norm(m @ m.T - torch.eye(len(m), dtype=m.dtype, device=m.device)) for m in matrices]
    return torch.stack(each).mean()


class AdaLoRALinear(nn.Module):
    """Any linear layer plus an update in the form of a singular value decomposition."""

    def __init__(self, base: nn.Module, edit: AdaLoRA) -> None:
        super().__init__()
        inputs, outputs = in_out(base)
        where = place(base)
        self.base, self.edit, self.scale, self.enabled = base, edit, edit.scale, True
        self.a = nn.Parameter(torch.empty(edit.rank, inputs, **where).normal_(std=0.02))
        self.b = nn.Parameter(torch.empty(outputs, edit.rank, **where).normal_(std=0.02))
        self.values = nn.Parameter(torch.zeros(edit.rank, **where))
        for name in TRIPLET:
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(getattr(self, name)))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        if not self.enabled:
            return y
        return low_rank(y, x, *self.factors(), self.scale, dropout_of(self))

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the update s B A: the values go with Q."""
        return self.values[:, None] * self.a, self.b

    def delta(self) -> Tensor:
        """s P L Q, [N, K] in float32 or wider."""
        a, b = self.factors()
        return (b @ a) * self.scale

    def live_weight(self) -> Tensor:
        """The weight [N, K] of the plain layer that computes the same, with the gradients of what trains."""
        if dropout_of(self):
            raise FettleError(
                "adalora: dropout has no place in a weight that is rounded as a whole; set its dropout to 0"
            )
        under = live_weight(self.base)
        return under.to(self.a.dtype) + self.delta() if self.enabled else under

    def track(self, betas: tuple[float, float]) -> None:
        """Take this step's gradients into the importance of every number."""
        for name in TRIPLET:
            if (gradient := getattr(self, name).grad) is not None:
                moments = getattr(self, f"{name}_sensitivity"), getattr(self, f"{name}_uncertainty")
                track(*moments, getattr(self, name), gradient, betas)

    def scores(self) -> Tensor:
        """[r]: importance of each triplet."""
        a, b, values = (getattr(self, f"{n}_sensitivity") * getattr(self, f"{n}_uncertainty") for n in TRIPLET)
        return triplet_scores(a, b, values)


class AdaLoRA(Edit):
    """Low-rank updates whose ranks training chooses under one budget; the base is frozen."""

    role = "updates"
    kind: Literal["adalora"] = "adalora"
    rank: int = Field(default=12, ge=1, description="triplets of each layer at start")
    target_rank: int = Field(default=8, ge=1, description="triplets a layer at the end, on average")
    alpha: float | None = Field(default=None, gt=0, description="numerator of the scale alpha / rank; twice the rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    warmup: float = Field(default=0.1, ge=0, description="steps before the budget falls; a share of all where below 1")
    final: float = Field(default=0.3, ge=0, description="steps after it has fallen; a share of all where below 1")
    every: int = Field(default=10, ge=1, description="steps from one choice to the next while it falls")
    betas: tuple[Decay, Decay] = (0.85, 0.85)
    orthogonality: float = Field(default=0.1, ge=0, description="gamma")

    @model_validator(mode="after")
    def _schedule(self) -> AdaLoRA:
        if self.target_rank > self.rank:
            raise ValueError(f"'target_rank' {self.target_rank} is over 'rank' {self.rank}; the budget only falls")
        if self.warmup < 1 and self.final < 1 and self.warmup + self.final >= 1:
            raise ValueError("'warmup' and 'final' together leave no step in which the budget falls; make one shorter")
        return self

    @property
    def scale(self) -> float:
        """The factor of P L Q."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where one matches nothing or is smaller than the rank."""
        for name, base in linears(model, self.targets).items():
            name, base = beneath(name, base)
            if self.rank > min(in_out(base)):
                raise FettleError(
                    f"adalora: rank {self.rank} is over the size of {name} {in_out(base)}; choose a smaller rank"
                )
            replace(model, name, AdaLoRALinear(base, self))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Q, L and P of every layer, by name."""
        return {f"{n}.{k}": getattr(m, k).detach() for n, m in self._layers(model) for k in TRIPLET}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Sensitivity and uncertainty of every number."""
        return {f"{n}.{k}": t for n, m in self._layers(model) for k, t in m.named_buffers(recurse=False)}

    def penalty(self, model: nn.Module) -> Tensor | None:
        """gamma times how far the P and Q are from orthogonal."""
        if not self.orthogonality:
            return None
        return self.orthogonality * skewness(m for _, layer in self._layers(model) for m in (layer.a, layer.b.T))

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Take in the step's gradients, and where it is time, zero the values over the budget."""
        t, layers = step + 1, [m for _, m in self._layers(model)]
        warm, rest = self.ends(steps)
        if t < rest:
            for layer in layers:
                layer.track(self.betas)
        if t > warm and (t >= rest or t % self.every == 0):
            budgets = len(layers) * self.rank, len(layers) * self.target_rank
            spare = over_budget(torch.cat([m.scores() for m in layers]), budget_at(t, (warm, rest), budgets)).split(
                [len(m.values) for m in layers]
            )
            for layer, drop in zip(layers, spare, strict=True):
                layer.values.data.masked_fill_(drop, 0.0)

    def ends(self, steps: int) -> tuple[int, int]:
        """The last step of the warm-up, and the step after which the budget rests, in a run of `steps`."""
        warm, final = (int(n * steps) if n < 1 else int(n) for n in (self.warmup, self.final))
        if warm >= steps - final:
            raise FettleError(
                f"adalora: {warm} steps of 'warmup' and {final} of 'final' leave none of {steps} in which the budget falls"
            )
        return warm, steps - final

    def merge(self, model: nn.Module) -> None:
        """W + s P L Q, summed in float32, rounded once to the base's type; the wrapper goes."""
        for name, module in reversed(self._layers(model)):
            with torch.no_grad():
                weight = read_weight(module.base).to(module.a.dtype) + module.delta()
            untie(model, module.base)
            write_weight(module.base, weight)
            replace(model, name, module.base)

    def _layers(self, model: nn.Module) -> list[tuple[str, AdaLoRALinear]]:
        return made_by(model, self, AdaLoRALinear)
