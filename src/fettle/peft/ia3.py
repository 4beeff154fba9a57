"""(IA)^3: keys, values and the inside of the feed-forward part scaled by trained vectors (Liu et al. 2022, arXiv 2205.05638).

    k = l_k * (W_k x)      v = l_v * (W_v x)      h = W_down (l_ff * act(W_up x))          equation 1

l [K] or [I], ones at start, in float32. Scaling a linear layer's input or output is a diagonal matrix beside its weight,
so merging is exact. Where one layer makes queries, keys and values (GPT-2), the vector spans them all, as in PEFT: a scale
of the queries says nothing that a scale of the keys could not. Of experts, l_ff scales the inside of each alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.blocks import blocks
from fettle.models.experts import expert_ends
from fettle.models.select import linears
from fettle.models.surgery import made_by, replace
from fettle.models.weight import in_out, is_adapter, place, read_weight, write_weight


class Scaled(nn.Module):
    """A linear layer with its input or its output scaled, or an experts' activation with its output scaled."""

    def __init__(self, base: nn.Module, edit: IA3, width: int, of_input: bool, near: nn.Module) -> None:
        super().__init__()
        self.base, self.edit, self.of_input, self.enabled = base, edit, of_input, True
        self.scale = nn.Parameter(torch.ones(width, **place(near)))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if not self.enabled:
            return self.base(x)
        scale = self.scale.to(x.dtype)
        return self.base(x * scale) if self.of_input else self.base(x) * scale

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]


class IA3(Edit):
    """Scale keys, values and the inside of the feed-forward part; the base is frozen."""

    role = "updates"
    kind: Literal["ia3"] = "ia3"
    outputs: str | tuple[str, ...] | None = Field(
        default=None, description="linear layers whose output is scaled; those of keys and values where left out"
    )
    inputs: str | tuple[str, ...] | None = Field(
        default=None,
        description="linear layers whose input is scaled; the ends of the feed-forward parts where left out",
    )

    def apply(self, model: nn.Module) -> None:
        """Put the vectors in. FettleError where keys and values, or a feed-forward part, are not understood."""
        outputs, inputs, stacks = scaled_layers(self, model)
        for name in outputs:
            self._wrap(model, name, False)
        for name in inputs:
            self._wrap(model, name, True)
        for name in stacks:
            self._experts(model, name)

    def _wrap(self, model: nn.Module, name: str, of_input: bool) -> None:
        base = model.get_submodule(name)
        replace(model, name, Scaled(base, self, in_out(base)[0 if of_input else 1], of_input, base))

    def _experts(self, model: nn.Module, name: str) -> None:
        experts = model.get_submodule(name)
        down, act = getattr(experts, "down_proj", None), getattr(experts, "act_fn", None)
        if not isinstance(down, nn.Parameter) or not isinstance(act, nn.Module):
            raise FettleError(
                f"ia3: {name} ({type(experts).__name__}) keeps its experts in a way that is not understood"
            )
        replace(model, f"{name}.act_fn", Scaled(act, self, _inside(experts, down), False, experts))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The vectors, by name."""
        return {f"{n}.scale": m.scale.detach() for n, m in self._ours(model)}

    def merge(self, model: nn.Module) -> None:
        """diag(l) W and l * b, or W diag(l), multiplied in float32, rounded once to the base's type."""
        for name, module in reversed(self._ours(model)):
            scale, base = module.scale.detach(), module.base
            if name.endswith(".act_fn"):
                experts = model.get_submodule(name.rpartition(".")[0])
                down: Tensor = experts.down_proj.data  # type: ignore[assignment, union-attr]
                along = (1, -1, 1) if _transposed(experts) else (1, 1, -1)
                down.copy_(down.to(scale.dtype) * scale.view(along))
            else:
                _fold(name, base, scale, module.of_input)
            replace(model, name, base)

    def _ours(self, model: nn.Module) -> list[tuple[str, Scaled]]:
        return made_by(model, self, Scaled)


def scaled_layers(edit: IA3, model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """(layers whose output is scaled, whose input is, and modules that hold experts) of an edit on a model."""
    outputs = _keys_and_values(model) if edit.outputs is None else _named(model, edit.outputs)
    inputs, stacks = _ends(model) if edit.inputs is None else (_named(model, edit.inputs), [])
    if both := set(outputs) & set(inputs):
        raise FettleError(f"ia3: {sorted(both)[0]} stands among 'outputs' and 'inputs'; name it in one")
    if not outputs and not inputs and not stacks:
        raise FettleError("ia3: 'outputs' and 'inputs' are both empty, so nothing would train")
    return outputs, inputs, stacks


def _named(model: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    return list(linears(model, targets)) if targets else []


def _keys_and_values(model: nn.Module) -> list[str]:
    found: list[str] = []
    for block in blocks(model):
        for attention in block.attentions:
            if not attention.key or not attention.value:
                raise FettleError(
                    f"ia3: which layers of {attention.name} make keys and values is not understood; name them in 'outputs'"
                )
            found += dict.fromkeys((*attention.key, *attention.value))
    return found


def _ends(model: nn.Module) -> tuple[list[str], list[str]]:
    """The layers that end a feed-forward part, and the modules that hold experts."""
    ends: list[str] = []
    stacks: list[str] = []
    for block in blocks(model):
        if block.mlp is not None and block.mlp.leave is not None:
            ends.append(block.mlp.leave)
        elif block.mlp is not None and block.mlp.experts:
            stacks += block.mlp.experts
        elif block.mlp is not None and block.mlp.name and (own := expert_ends(model, block.mlp.name)):
            ends += own
        else:
            raise FettleError(f"ia3: the feed-forward part of {block.name} is not understood; name layers in 'inputs'")
    return ends, stacks


def _fold(name: str, base: nn.Module, scale: Tensor, of_input: bool) -> None:
    if is_adapter(base):
        raise FettleError(f"ia3: {name} still has another adapter inside; merge the edits in the order of their list")
    weight = read_weight(base).to(scale.dtype)
    write_weight(base, weight * scale if of_input else weight * scale[:, None])
    bias = getattr(base, "bias", None)
    if bias is not None and not of_input:
        bias.data.copy_(bias.data.to(scale.dtype) * scale)


def _transposed(experts: nn.Module) -> bool:
    """Whether stacks are [E, in, out] rather than [E, out, in]."""
    return bool(getattr(experts, "is_transposed", False))


def _inside(experts: nn.Module, down: Tensor) -> int:
    """I, of a stack [E, C, I] or its transpose."""
    return down.shape[1] if _transposed(experts) else down.shape[2]
