"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and what differs from it only in numbers.

    y = W x + s B (A dropout(x)),    s = alpha / r   (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732: alpha / sqrt(r))

            x [.., K] ──┬── W [N, K], frozen ───────────────┬── y [.., N]
                        └── A [r, K] ── B [N, r] ── * s ────┘

K in, N out, r rank, M tokens. A starts uniform as `nn.Linear` does, B at zero, so the model is unchanged at start; `init`
takes another start (pissa.py; quantize/loftq.py), `dora` rescales the result (dora.py), `ranks` and `alphas` differ by layer,
and `lr_ratio` is the learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354, equation 5; about 16).
An embedding is a linear map from one-hot vectors, so there A [r, V] is looked up; A starts at zero and B normal.
A and B are float32 masters whatever the base's type: an update of 1e-5 is lost in bf16's 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.lean import Again, again
from fettle.models.select import adaptable, matches
from fettle.models.still import derived
from fettle.models.surgery import beneath, dropout_of, made_by, replace, untie
from fettle.models.weight import (
    in_out,
    innermost,
    is_adapter,
    is_embedding,
    live_weight,
    place,
    read_weight,
    write_weight,
)
from fettle.peft.dora import rescale, row_norms
from fettle.peft.pissa import principal, without_start

T = TypeVar("T")
Start = Callable[[nn.Module, "LoRA", int, float], tuple[Tensor, Tensor]]  # (base, edit, rank, scale) -> (A, B)


def low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """y + s B A dropout(x): y [.., N], x [.., K]; A [r, K] and B [N, r] in float32 or wider."""
    rows = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if not dropout and not torch.is_grad_enabled():  # as a token is generated: the same two products and nothing around
        return torch.addmm(rows[0], rows[1] @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale).view_as(y)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    flat = LowRank.apply(*rows, a, b, scale, dropout, seed, again(x))
    return flat.view_as(y)


def looked_up(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """y + s B A[:, ids]: y [.., C], ids [..]; A [r, V], B [C, r]."""
    return y + F.embedding(ids, a.T).to(y.dtype) @ (b.T * scale).to(y.dtype)


class LowRank(torch.autograd.Function):
    """y + s B A dropout(x) for one linear, in one sum.

    It keeps the small A x, and of x what it can be computed again from, where x says so (models/lean.py); else x itself, which
    all adapters that read the same x keep as one. A dropped x is made again from its seed in the backward pass, and nothing
    of width N is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        seed: int,
        source: Again | None,
    ) -> Tensor:
        """y [M, N], x [M, K] -> [M, N] in their type; `source` tells how x is computed again."""
        mask = dropout_mask(x, dropout, seed)
        h = (x if mask is None else mask.mul_(x)) @ a.to(x.dtype).T
        kept = ((x,) if source is None else source.wanted()) if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(h if ctx.needs_input_grad[3] else None, a, b, *kept)
        ctx.numbers, ctx.source = (scale, dropout, seed), source
        return torch.addmm(y, h, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y and x in their type, of a and b in theirs."""
        h, a, b, *kept = ctx.saved_tensors
        scale, dropout, seed = ctx.numbers
        _, for_x, for_a, for_b, *_ = ctx.needs_input_grad
        down = grad @ (b.to(grad.dtype) * scale)
        mask = dropout_mask(grad.new_empty(len(grad), a.shape[1]), dropout, seed) if for_x or for_a else None
        grad_x = down @ a.to(grad.dtype) if for_x else None
        if grad_x is not None and mask is not None:
            grad_x.mul_(mask)
        grad_a = None
        if for_a:
            x = (kept[0] if ctx.source is None else ctx.source.result(kept)).view(-1, a.shape[1])
            grad_a = (down.T @ (x if mask is None else mask.mul_(x))).to(a.dtype)
        grad_b = (h.T @ grad).T.to(b.dtype).mul_(scale) if for_b else None  # grad.T @ h takes up to 5 times as long
        return grad, grad_x, grad_a, grad_b, None, None, None, None


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor | None:
    """None where p is 0; else 1 / keep, with a share 1 - keep of zeros: the same mask for the same seed, shape and device.

    16 random bits decide about each value, so the share is p to the nearest 1/65536; a Bernoulli draw takes 64.
    """
    share = round(p * 65536)
    if not share:
        return None
    generator = torch.Generator(like.device).manual_seed(seed)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)  # the whole range of 64 bits
    mask = bits.view(torch.int16)[: like.numel()].view(like.shape) >= share - 32768
    return mask.to(like.dtype).mul_(65536 / (65536 - share))


class LoRALinear(nn.Module):
    """Any linear layer, or an embedding, plus a low-rank update that trains."""

    a0: Tensor
    b0: Tensor

    def __init__(self, base: nn.Module, edit: LoRA, rank: int, alpha: float, start: Start) -> None:
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True
        self.rank, self.alpha = rank, alpha
        self.scale = alpha / (math.sqrt(rank) if edit.rslora else rank)
        a, b = start(base, edit, rank, self.scale)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        if edit.init == "pissa":
            self.register_buffer("a0", a.clone())
            self.register_buffer("b0", b.clone())
        self.magnitude = nn.Parameter(self._norms(*self.factors())) if edit.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]; ids [..] -> [.., C] around an embedding."""
        y = self.base(x)
        if not self.enabled:
            return y
        if is_embedding(self.base):
            a, b = self.factors()
            z = looked_up(y, x, a, b, self.scale * getattr(innermost(self.base), "embed_scale", 1.0))
        else:
            z = low_rank(y, x, *self._acting(x.dtype), self.scale, dropout_of(self))
        if self.magnitude is None:
            return z
        norms = derived((self, "norms"), lambda: self._norms(*self.factors()))
        return rescale(z, getattr(self.base, "bias", None), self.magnitude, norms)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the update s B A to the base's weight; twice the rank where the start is taken off (pissa.py)."""
        if self.edit.init != "pissa":
            return self.a, self.b
        return without_start(self.a, self.b, self.a0, self.b0)

    def _acting(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B; without gradients in the type that they act in, rounded once while weights are still."""
        if torch.is_grad_enabled():
            return self.factors()
        return derived((self, dtype), lambda: tuple(factor.to(dtype) for factor in self.factors()))  # type: ignore[return-value]

    def delta(self) -> Tensor:
        """s B A, [N, K] in float32 or wider."""
        a, b = self.factors()
        return (b @ a) * self.scale

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight [N, K] of the plain layer that computes the same, in float32 or wider."""
        return self._on(read_weight(self.base))

    def live_weight(self) -> Tensor:
        """The same with the gradients of what trains, whatever is under it; what is under it while this is off."""
        if dropout_of(self):
            raise FettleError(
                "lora: dropout has no place in a weight that is rounded as a whole; set lora's dropout to 0"
            )
        under = live_weight(self.base)
        return self._on(under) if self.enabled else under

    def _on(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.a.dtype) + self.delta()
        return weight if self.magnitude is None else weight * (self.magnitude / self._norms(*self.factors()))[:, None]

    def _norms(self, a: Tensor, b: Tensor) -> Tensor:
        return row_norms(read_weight(self.base), a, b, self.scale)


def _start(base: nn.Module, edit: LoRA, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) as training begins."""
    where = place(base)
    if edit.init == "pissa":
        a, b = principal(read_weight(base), rank, scale, edit.iterations)
        return a.to(**where), b.to(**where)
    if edit.init == "loftq":
        b, a = base.residual  # type: ignore[misc]
        base.residual = None  # type: ignore[assignment]  # it is handed over
        return a.to(**where) / math.sqrt(scale), b.to(**where) / math.sqrt(scale)
    a, b = _blank(base, edit, rank, scale)
    if is_embedding(base):
        nn.init.normal_(b)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, b


def _blank(base: nn.Module, edit: LoRA, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """(A, B) of zeros, for tensors that are there; what LoftQ left is in those."""
    if edit.init == "loftq":
        base.residual = None  # type: ignore[assignment]
    inputs, outputs = in_out(base)
    return torch.zeros(rank, inputs, **place(base)), torch.zeros(outputs, rank, **place(base))


class LoRA(Edit):
    """Low-rank updates beside linear layers; the base is frozen."""

    role = "updates"
    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(
        default=None, gt=0, description="numerator of the scale; twice the rank where left out, with rslora 8"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="linear layers; the head and embeddings are meant only by name"
    )
    rslora: bool = False
    dora: bool = Field(default=False, description="a trained length for the weights of each output (DoRA)")
    init: Literal["uniform", "pissa", "loftq"] = Field(default="uniform", description="where A and B start")
    iterations: int | None = Field(default=None, ge=1, description="PiSSA by a fast SVD; exact where left out")
    ranks: dict[str, PositiveInt] = Field(default={}, description="ranks of some targets, by pattern")
    alphas: dict[str, PositiveFloat] = Field(default={}, description="alphas of some targets, by pattern")
    lr_ratio: float = Field(default=1.0, gt=0, description="learning rate of B over that of A (LoRA+); about 16 there")

    @property
    def detachable(self) -> bool:
        """Whether the base is whole without it; what LoftQ takes from the base is in A and B."""
        return self.init != "loftq"

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where one matches nothing, is smaller than its rank, or cannot be wrapped."""
        self._wrap(model, _start)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """The same; with an artifact's tensors to come, nothing is made that a start is made of."""
        self._wrap(model, _start if names is None else _blank)

    def _wrap(self, model: nn.Module, start: Start) -> None:
        found = adaptable(model, self.targets)
        ranks, alphas = by_layer(self.ranks, found, "lora.ranks"), by_layer(self.alphas, found, "lora.alphas")
        for name, base in found.items():
            rank = ranks.get(name, self.rank)
            alpha = alphas.get(name, self.usual_alpha(rank))
            name, base = beneath(name, base)
            self._check(name, base, rank)
            _check_runs(name, base, model)
            if start is _start and self.init == "loftq":
                _check_residual(name, base, rank)
            replace(model, name, LoRALinear(base, self, rank, alpha, start))

    def usual_alpha(self, rank: int) -> float:
        """Where no pattern names another: as given, else a constant for rsLoRA, whose point it is, else twice the rank."""
        return self.alpha or (8.0 if self.rslora else 2.0 * rank)

    def _check(self, name: str, base: nn.Module, rank: int) -> None:
        if rank > min(in_out(base)):
            raise FettleError(f"lora: rank {rank} is over the size of {name} {in_out(base)}; choose a smaller rank")
        if is_adapter(base) and (self.dora or self.init != "uniform"):
            what = "dora" if self.dora else f"init: {self.init}"
            raise FettleError(
                f"lora: '{what}' needs the plain weight of {name}, which has an adapter already; put this edit before that one"
            )
        inner = innermost(base)
        if is_embedding(base) and type(inner).forward is not nn.Embedding.forward and not hasattr(inner, "embed_scale"):
            raise FettleError(f"lora: {name} is a {type(inner).__name__}, which is more than a table; leave it out")

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """A and B, DoRA's magnitudes, PiSSA's start, by name."""
        return {
            f"{n}.{key}": t.detach()
            for n, m in made_by(model, self, LoRALinear)
            for key, t in chain(m.named_parameters(recurse=False), m.named_buffers(recurse=False))
        }

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """PiSSA's start, which another machine's SVD would give with other last bits."""
        return {f"{n}.{k}": t for n, m in made_by(model, self, LoRALinear) for k, t in m.named_buffers(recurse=False)}

    def lr_scales(self, model: nn.Module) -> dict[str, float]:
        """LoRA+'s ratio for every B."""
        return {f"{n}.b": self.lr_ratio for n, _ in made_by(model, self, LoRALinear)} if self.lr_ratio != 1 else {}

    def merge(self, model: nn.Module) -> None:
        """W + s B A (DoRA: rescaled), summed in float32, rounded once to the base's type; the wrapper goes.

        A head or an embedding that shares its weight gets one of its own first, for only it was adapted.
        """
        for name, module in reversed(made_by(model, self, LoRALinear)):  # from the inside out
            weight = module.merged()
            untie(model, module.base)
            write_weight(module.base, weight)
            replace(model, name, module.base)


def _check_runs(name: str, base: nn.Module, model: Any) -> None:
    """FettleError for the embedding of an encoder-decoder that only keeps a weight for those of its two stacks."""
    if is_embedding(base) and model.config.is_encoder_decoder:
        used = {stack.get_input_embeddings() for stack in (model.get_encoder(), model.get_decoder())}
        keeps = base is model.get_input_embeddings() or any(m.weight is base.weight for m in used)
        if keeps and base not in used:
            users = [n for n, m in model.named_modules() if m in used]
            raise FettleError(
                f"lora: {name} only keeps the weight that {' and '.join(users)} look tokens up in, and an update of it alone would "
                "change nothing; name those in its place"
            )


def _check_residual(name: str, base: nn.Module, rank: int) -> None:
    residual = getattr(base, "residual", None)
    if residual is None:
        raise FettleError(
            f"lora: 'init: loftq' finds no residual at {name}; quantize it before with loftq, as in {{kind: nf4, loftq: {{rank: {rank}}}}}"
        )
    if residual[0].shape[1] != rank:
        raise FettleError(
            f"lora: rank {rank} of {name} is not the {residual[0].shape[1]} of the quantizer's loftq; make them equal"
        )


def by_layer(patterns: Mapping[str, T], names: Iterable[str], key: str) -> dict[str, T]:
    """What `patterns` say of each layer. FettleError where one matches none, or two disagree."""
    said: dict[str, tuple[str, T]] = {}
    names = list(names)
    for pattern, value in patterns.items():
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise FettleError(f"{key}: '{pattern}' matches none of the {len(names)} targets, as {names[0]}")
        for name in hits:
            if name in said and said[name][1] != value:
                raise FettleError(
                    f"{key}: '{said[name][0]}' says {said[name][1]} of {name} and '{pattern}' says {value}; make one narrower"
                )
            said[name] = pattern, value
    return {name: value for name, (_, value) in said.items()}
