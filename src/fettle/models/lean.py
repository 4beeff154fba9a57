"""Norms and gated feed-forward parts that keep little for the backward pass, in the places of transformers' own.

    RMSNorm   y = w * (h r),  r = (mean h^2 + eps)^-1/2      keeps h [M, C] and r [M, 1]; eager code keeps h in float32 besides
    gate      y = act(g) * u                                  keeps g and u [M, I]; eager code keeps act(g) besides

Their outputs are cheap to compute again from what they keep, and say how (`again`): a reader that would keep its input, as
LoRA does, keeps nothing then. Forward values are those of the modules replaced, bit for bit, which a trial shows for every
class before it is replaced; what differs is left alone. Names and weights stay, so files and edits know no difference.
M tokens, C width, I width inside.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fettle.models.blocks import EPSILON, is_norm
from fettle.models.surgery import replace
from fettle.models.weight import in_out

GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # as Llama names them, and whoever copied it
FLAVOURS = (
    (0.0, False),
    (1.0, True),
    (0.0, True),
    (1.0, False),
)  # of norms: offset and wide; Llama's first, Gemma's next


class Again:
    """How a tensor is computed again. Several readers in one backward pass share one result.

    `of` are the tensors that it takes, which the graph keeps anyway. A reader says `wanted` in its forward pass.
    """

    def __init__(self, make: Callable[..., Tensor], *of: Tensor) -> None:
        self.make, self.of = make, tuple(t.detach() for t in of)
        self.readers = 0
        self.made: Tensor | None = None

    def wanted(self) -> tuple[Tensor, ...]:
        """What a reader saves for `result`."""
        self.readers += 1
        return self.of

    def result(self, of: tuple[Tensor, ...]) -> Tensor:
        """The tensor; not to be written to. It is let go of when each reader has had it."""
        made = self.make(*of) if self.made is None else self.made
        self.readers -= 1
        self.made = made if self.readers > 0 else None
        return made


def again(x: Tensor) -> Again | None:
    """How to compute x again, where who made it says so."""
    return getattr(x, "again", None)


class _Normed(torch.autograd.Function):
    """x^ = h r, y = x^ (offset + w);  dh = r (d - x^ mean(d x^)) with d = dy (offset + w), all in float32."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """y [.., C] and r [.., 1]."""
        r = norm.inverse(h)
        ctx.save_for_backward(h, r, weight)
        ctx.mark_non_differentiable(r)
        ctx.offset = norm.offset
        return norm.scaled(h, r, weight), r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of h and weight in their types."""
        h, r, weight = ctx.saved_tensors
        x, d = h.float() * r, grad.float()
        grad_weight = (d * x).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d = d * (weight.float() + ctx.offset)
        mean = torch.linalg.vecdot(d, x).div_(x.shape[-1])[..., None]
        return d.sub_(x.mul_(mean)).mul_(r).to(h.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019, arXiv 1910.07467) as Llama computes it, or as Gemma does.

    `offset` is added to the weight; `wide` applies the weight in float32, before rounding.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float = 0.0, wide: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.offset, self.wide = weight, eps, offset, wide

    def forward(self, h: Tensor) -> Tensor:
        """h [.., C] -> [.., C] in its type."""
        if not (torch.is_grad_enabled() and (h.requires_grad or self.weight.requires_grad)):
            return self.scaled(h, self.inverse(h), self.weight)
        y, r = _Normed.apply(h, self.weight, self)
        y.again = Again(self.scaled, h, r, self.weight)
        return y  # type: ignore[no-any-return]

    def inverse(self, h: Tensor) -> Tensor:
        """r [.., 1] in float32."""
        return torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + self.eps)

    def scaled(self, h: Tensor, r: Tensor, weight: Tensor) -> Tensor:
        """w h r [.., C]."""
        x = h.float() * r
        if self.wide:
            return (x * (self.offset + weight.float())).to(h.dtype)
        return (self.offset + weight if self.offset else weight) * x.to(h.dtype)

    def extra_repr(self) -> str:
        """As transformers' own."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _Gated(torch.autograd.Function):
    """y = act(g) u;  du = act(g) dy, dg = act'(g) u dy."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """[.., I]."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate and up in their type."""
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(active, gate, up * grad)
        return grad_gate, active.detach() * grad, None


class GatedMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x), with the layers of the module it stands for."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, child in like.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        """[.., C] -> [.., C]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
            return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        y = _Gated.apply(gate, up, self.act_fn)
        y.again = Again(lambda g, u: self.act_fn(g) * u, gate, up)
        return self.down_proj(y)  # type: ignore[no-any-return]


def make_lean(model: nn.Module) -> None:
    """Put these modules in the places of those that compute the same, class by class."""
    known: dict[type[nn.Module], Callable[[nn.Module], nn.Module] | None] = {}
    for name, module in list(model.named_modules()):
        if type(module) not in known:
            known[type(module)] = _stand_in(module)
        if (make := known[type(module)]) is not None:
            replace(model, name, make(module))


def _stand_in(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """What makes a lean module of one like this; None where none computes exactly what it does."""
    if {name for name, _ in module.named_children()} == GATED and not dict(module.named_parameters(recurse=False)):
        return GatedMLP if _same_mlp(module) else None
    if is_norm(module) and not any(isinstance(module, kind) for kind in (nn.LayerNorm, RMSNorm)):
        return next((make for make in map(_norm, *zip(*FLAVOURS, strict=True)) if _same_norm(module, make)), None)
    return None


def _norm(offset: float, wide: bool) -> Callable[[nn.Module], RMSNorm]:
    def make(module: nn.Module) -> RMSNorm:
        eps = next(float(getattr(module, key)) for key in EPSILON if hasattr(module, key))
        return RMSNorm(module.weight, eps, offset, wide)  # type: ignore[arg-type]

    return make


@torch.no_grad()
def _same_norm(module: nn.Module, make: Callable[[nn.Module], RMSNorm]) -> bool:
    if set(dict(module.named_parameters())) != {"weight"} or dict(module.named_buffers()):
        return False
    (held,) = module.parameters()
    draw = torch.Generator(held.device).manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.randn(n, len(held), generator=draw, device=held.device).to(dtype) for n in (8, 1))
        if not torch.equal(*(functional_call(m, {"weight": weight[0]}, (3 * x,)) for m in (module, make(module)))):
            return False
    return True


@torch.no_grad()
def _same_mlp(module: nn.Module) -> bool:
    gate: Any = module.gate_proj
    held = next(chain(gate.parameters(), gate.buffers()))  # a quantized layer has no parameters
    draw = torch.Generator(held.device).manual_seed(0)
    x = torch.randn(8, in_out(gate)[0], generator=draw, device=held.device).to(held.dtype)
    training = module.training
    try:
        return all(torch.equal(module.train(mode)(x), GatedMLP(module)(x)) for mode in (True, False))
    finally:
        module.train(training)
