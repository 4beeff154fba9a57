"""The optimizer of a run: AdamW over float32 masters, schedules, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.spec import Decay, Spec
from fettle.train.adam8bit import AdamW8bit


class OptimSpec(Spec):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) and its schedule."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = Field(default=2e-4, gt=0)
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; or say epochs")
    epochs: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1, description="batches an optimizer step")
    warmup: float = Field(default=0.03, ge=0, description="steps of linear warm-up; a share of all steps where below 1")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = Field(default=0.0, ge=0, le=1, description="the schedule ends at this share of lr")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null for none")

    @model_validator(mode="after")
    def _one_length(self) -> OptimSpec:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("both 'steps' and 'epochs' are given; keep one")
        return self

    def length(self, batches: int) -> int:
        """Optimizer steps, for an epoch of `batches` batches."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * batches / self.accumulate))

    def warmup_of(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return int(self.warmup * steps) if self.warmup < 1 else int(self.warmup)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0 <= `step` < `steps`: warm-up, then the schedule down to `floor`."""
        warmup = self.warmup_of(steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        match self.schedule:
            case "cosine":
                shape = 0.5 * (1 + math.cos(math.pi * share))
            case "linear":
                shape = 1 - share
            case _:
                return self.lr
        return self.lr * (self.floor + (1 - self.floor) * shape)


class Masters:
    """Float32 masters of the weights that train, and the gradients summed into them.

    A weight that is float32 or wider already is its own master. For a narrower one, each backward
    pass adds its gradient to the master's in float32 and lets go of the narrow one, so that a sum
    over many batches, and an update smaller than the weight's last bit, are not lost to rounding.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.weights: dict[str, nn.Parameter] = dict(named)
        self.masters: dict[str, nn.Parameter] = {}
        self._hooks = []
        for name, weight in self.weights.items():
            if weight.dtype in (torch.float32, torch.float64):
                self.masters[name] = weight
            else:
                self.masters[name] = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(_adder(self.masters[name])))

    def gradients(self) -> list[Tensor]:
        """The gradients there are, float32 or wider, in the order of the weights."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights."""
        for name, weight in self.weights.items():
            if (master := self.masters[name]) is not weight:
                weight.copy_(master)

    def zero(self) -> None:
        """Forget all gradients."""
        for name, weight in self.weights.items():
            weight.grad = self.masters[name].grad = None

    def close(self) -> None:
        """Take the hooks off the weights."""
        for hook in self._hooks:
            hook.remove()


def _adder(master: nn.Parameter) -> Callable[[nn.Parameter], None]:
    def add(weight: nn.Parameter) -> None:
        if master.grad is None:
            master.grad = weight.grad.float()  # type: ignore[union-attr]
        else:
            master.grad.add_(weight.grad)  # type: ignore[arg-type]
        weight.grad = None

    return add


def build(spec: OptimSpec, masters: Masters, scales: Mapping[str, float] | None = None) -> torch.optim.Optimizer:
    """The optimizer over the masters; matrices decay, vectors (norms, biases) do not.

    `scales` are factors on the learning rate by the name of a weight; a group keeps its own as `lr_scale`.
    """
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, master in masters.masters.items():
        decay = spec.weight_decay if master.ndim > 1 else 0.0
        alike.setdefault((decay, (scales or {}).get(name, 1.0)), []).append(master)
    groups = [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in alike.items()]
    if spec.kind == "adamw8bit":
        return AdamW8bit(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
