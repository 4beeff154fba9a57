"""BitDelta: a fine-tune as its base, one bit a weight, and a scale a matrix (Liu et al. 2024, arXiv 2402.10193).

    W' = W + s S,    S = sign(W_tuned - W), 0 counted as +1,    s = mean |W_tuned - W|       (equations 1, 2: the least |W' - W_tuned|)

            x [.., K] ──┬── W [N, K], of the base, frozen ────┬── y [.., N]
                        └── S, one bit each ── * s ───────────┘

As it begins s is the best for the weights; training it, and nothing else, towards the fine-tune's logits makes it the best for what
the model says ("scale distillation", equation 3):

    edits: [{kind: bitdelta, tuned: runs/mine}]    objective: {kind: distill, divergence: mse, teacher: runs/mine}

A fine-tune of bfloat16 takes a sixteenth of its linear layers' size. What else it changed (norms, embeddings, biases, a head) is kept
whole, beside the bits; where it changed nothing else, nothing is. The base is in memory once, however many such fine-tunes stand on
it (tenants.py).

The signs are a function of base and fine-tune, found as a stage opens; an artifact keeps them, and needs the fine-tune no more.

Shapes: W [N, K], S packed uint8 [N, ceil(K / 8)], s a scalar.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.select import linears
from fettle.models.surgery import added, made_by, replace
from fettle.models.weight import in_out, is_adapter, place, read_weight, write_weight
from fettle.quantize.signs import pack_signs, unpack_signs, with_signs

_WHOLE = "fettle_whole"  # on a weight of the model: the edit that replaced it by the fine-tune's


def signs_of(delta: Tensor) -> tuple[Tensor, Tensor]:
    """(packed signs, scale) of W_tuned - W [N, K], in float32 or wider."""
    return pack_signs(delta), delta.abs().mean(dtype=torch.promote_types(delta.dtype, torch.float32))


class SignedLinear(nn.Module):
    """Any linear layer plus s S, whose scale trains."""

    signs: Tensor

    def __init__(self, base: nn.Module, edit: BitDelta) -> None:
        super().__init__()
        inputs, outputs = in_out(base)
        where = place(base)
        self.base, self.edit, self.enabled, self.inputs = base, edit, True, inputs
        self.register_buffer("signs", torch.zeros(outputs, -(-inputs // 8), dtype=torch.uint8, device=where["device"]))
        self.scale = nn.Parameter(torch.zeros((), **where))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        return with_signs(y, x, self.signs, self.scale) if self.enabled else y

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]

    @torch.no_grad()
    def take(self, tuned: nn.Module) -> None:
        """Signs and scale from the fine-tune's layer. FettleError where a weight is not finite."""
        signs, scale = signs_of(read_weight(tuned).to(self.scale.dtype) - read_weight(self.base).to(self.scale))
        if not torch.isfinite(scale):
            raise FettleError("values that are not finite (NaN or infinity); the weights are damaged")
        self.signs.copy_(signs)
        self.scale.copy_(scale)

    def delta(self) -> Tensor:
        """s S, [N, K]."""
        return unpack_signs(self.signs, self.inputs, self.scale.dtype) * self.scale


class BitDelta(Edit):
    """What a fine-tune changed, at one bit a weight; the scales train."""

    kind: Literal["bitdelta"] = "bitdelta"
    tuned: str = Field(description="the fine-tune: a run or artifact folder, a model folder or a hub id")
    targets: str | tuple[str, ...] = "all-linear"
    whole: bool = Field(
        default=True, description="keep what else the fine-tune changed, as it is; false: it must be nothing"
    )

    @property
    def detachable(self) -> bool:
        """Whether switching it off gives the base: where nothing of the base was replaced."""
        return not self.whole

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets, with nothing added yet: `take` brings what the fine-tune changed."""
        for name, base in linears(model, self.targets).items():
            if is_adapter(base):
                raise FettleError(f"bitdelta: {name} has an adapter already; put bitdelta before it in the list")
            replace(model, name, SignedLinear(base, self))

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """The same; of an artifact's tensors, those that are weights of the model itself will be the fine-tune's."""
        self.apply(model)
        wanted = set(names or ())
        for name, parameter in _rest(model).items():
            if name in wanted:
                setattr(parameter, _WHOLE, self)

    @torch.no_grad()
    def take(self, model: nn.Module, tuned: nn.Module) -> None:
        """What a fine-tune, all its edits merged, changed. FettleError where it is a fine-tune of something else."""
        theirs = linears(tuned)
        for name, layer in made_by(model, self, SignedLinear):
            if name not in theirs or in_out(theirs[name]) != in_out(layer.base):
                raise FettleError(
                    f"bitdelta: '{self.tuned}' has no {name} of the base's size, so it is no fine-tune of this base"
                )
            try:
                layer.take(theirs[name])
            except FettleError as error:
                raise FettleError(f"bitdelta: '{self.tuned}': {name}: {error}") from None
        values = dict(tuned.named_parameters())
        rest = _rest(model)
        if more := [n for n in values if n not in rest and n.rpartition(".")[0] not in theirs]:
            raise FettleError(
                f"bitdelta: '{self.tuned}' has weights that the base has not ({more[0]}), as where a fine-tune gave its head a weight of "
                "its own; such a fine-tune has no delta"
            )
        changed: list[str] = []
        for name, parameter in rest.items():
            other = values.get(name)
            if other is not None and other.shape != parameter.shape:
                raise FettleError(
                    f"bitdelta: '{self.tuned}' has {name} of {tuple(other.shape)}, the base of {tuple(parameter.shape)}; a fine-tune "
                    "with new words needs a base that has them"
                )
            if other is None or torch.equal(other.to(parameter), parameter):
                continue
            changed.append(name)
            if self.whole:
                parameter.copy_(other)
                setattr(parameter, _WHOLE, self)
        if changed and not self.whole:
            raise FettleError(
                f"bitdelta: '{self.tuned}' changed {changed[0]} too{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}, which "
                "is no linear layer of the targets; set whole: true to keep it beside the bits"
            )

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Signs and scales, and the weights that are kept whole."""
        found = {
            f"{n}.{key}": t.detach()
            for n, m in made_by(model, self, SignedLinear)
            for key, t in chain(m.named_parameters(recurse=False), m.named_buffers(recurse=False))
        }
        return found | {n: p.detach() for n, p in model.named_parameters() if getattr(p, _WHOLE, None) == self}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The signs: the fine-tune's folder may be another one by then."""
        return {f"{n}.signs": m.signs for n, m in made_by(model, self, SignedLinear)}

    def merge(self, model: nn.Module) -> None:
        """W + s S, rounded once to the base's type."""
        for name, module in reversed(made_by(model, self, SignedLinear)):
            write_weight(module.base, read_weight(module.base).to(module.scale.dtype) + module.delta())
            replace(model, name, module.base)


def _rest(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own weights but for those that signs stand for, by the name that the plain model has for each."""
    signed = {
        id(read)
        for m in model.modules()
        if isinstance(m, SignedLinear) and (read := m.base._parameters.get("weight")) is not None
    }
    others = added(model)
    return {
        ".".join(part for part in name.split(".") if part != "base"): p
        for name, p in model.named_parameters()
        if name not in others and id(p) not in signed
    }


def size_of(model: Any, edit: BitDelta) -> int:
    """Bytes that an artifact of the edit holds."""
    return sum(t.numel() * t.element_size() for t in edit.tensors(model).values())
