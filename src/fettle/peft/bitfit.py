"""BitFit: only the biases train (Ben Zaken et al. 2021, arXiv 2106.10199).

    y = W x + b  ->  W x + b + d           d [N], zero at start: the change of the bias, in float32

`which: query-mlp` is the paper's subset, b_q and b_m2: the biases of the queries and of the layers that enter the
feed-forward part. Norms that have a bias count too (`all`), for their biases train in the paper.
Models of today (Llama) have few biases or none. With `add`, every linear layer but the head gets one, at zero; without
it, what has none stays as it is. The gradient of a bias is the sum of the output's gradient: nothing of the forward
pass is kept for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.blocks import Attention, blocks, norms
from fettle.models.select import linears
from fettle.models.surgery import made_by, replace
from fettle.models.weight import in_out, innermost, is_linear, place

FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias")  # how configurations say that layers have biases


class Biased(nn.Module):
    """A linear layer or a norm, and the change of its bias."""

    def __init__(self, base: nn.Module, edit: Edit, span: slice = slice(None)) -> None:
        super().__init__()
        width = in_out(base)[1] if is_linear(base) else len(innermost(base).weight)  # type: ignore[arg-type]
        self.base, self.edit, self.enabled, self.width = base, edit, True, width
        self.start, self.stop, _ = span.indices(width)  # which of the outputs
        self.delta = nn.Parameter(torch.zeros(self.stop - self.start, **place(base)))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        y = self.base(x)
        return y + self.shift().to(y.dtype) if self.enabled else y

    def shift(self) -> Tensor:
        """d [N], zero outside of its span."""
        if len(self.delta) == self.width:
            return self.delta
        return nn.functional.pad(self.delta, (self.start, self.width - self.stop))

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type or device."""
        return self.base.weight  # type: ignore[return-value]


class BitFit(Edit):
    """Train biases; the base is frozen."""

    role = "updates"
    kind: Literal["bitfit"] = "bitfit"
    which: Literal["all", "query-mlp"] = "all"
    add: bool = True

    def apply(self, model: nn.Module) -> None:
        """Put the trained biases in. FettleError where there is none to train, or queries cannot be told from keys."""
        chosen = every_bias(model, self.add) if self.which == "all" else dict(self._paper(model))
        if not chosen:
            raise FettleError(
                f"bitfit: {type(model).__name__} has no {'' if self.which == 'all' else 'such '}biases, and add is false"
            )
        put_biases(model, chosen, self)

    def _paper(self, model: nn.Module) -> Iterable[tuple[str, slice]]:
        for block in blocks(model):
            for attention in block.attentions:
                yield from ((n, _queries(model, attention)) for n in attention.query if self._has(model, n))
            if block.mlp is not None:
                yield from ((n, slice(None)) for n in block.mlp.enter if self._has(model, n))

    def _has(self, model: nn.Module, name: str) -> bool:
        return self.add or _bias(model.get_submodule(name)) is not None

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The changes of the biases, by name."""
        return {f"{n}.delta": m.delta.detach() for n, m in _ours(model, self)}

    def merge(self, model: nn.Module) -> None:
        """b + d, rounded once to the base's type. FettleError where the architecture has no place for a bias added."""
        added: set[str] = set()
        for name, module in reversed(_ours(model, self)):
            base, shift = module.base, module.shift().detach()
            bias = _bias(base)
            if bias is not None:
                bias.data.copy_(bias.data.to(shift.dtype) + shift)
            elif isinstance(base, nn.Linear):
                base.bias = nn.Parameter(shift.to(base.weight.dtype), requires_grad=False)
                added.add(f"{_bare(name)}.bias")
            else:
                raise FettleError(
                    f"bitfit: {name} is {type(base).__name__}, into which no bias can be merged; merge the edits around it first"
                )
            replace(model, name, base)
        make_room(model, added)


def every_bias(model: nn.Module, add: bool) -> dict[str, slice]:
    """The linear layers and norms with a bias, and with `add` all other linear layers but the head."""
    named = {n: m for n, m in linears(model).items() if add or _bias(m) is not None}
    named |= {n: m for n, m in norms(model).items() if _bias(m) is not None}
    return {name: slice(None) for name, _ in model.named_modules() if name in named}


def put_biases(model: nn.Module, chosen: dict[str, slice], edit: Edit) -> None:
    """Wrap the named modules."""
    for name, span in chosen.items():
        replace(model, name, Biased(model.get_submodule(name), edit, span))


def _ours(model: nn.Module, edit: Edit) -> list[tuple[str, Biased]]:
    return made_by(model, edit, Biased)


def _bias(module: nn.Module) -> nn.Parameter | None:
    bias = getattr(innermost(module), "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def _queries(model: nn.Module, attention: Attention) -> slice:
    """Which outputs of the layer that makes the queries are queries."""
    if not attention.fused:
        return slice(None)
    width, out = in_out(model.get_submodule(attention.out))[0], in_out(model.get_submodule(attention.query[0]))[1]
    split = getattr(
        model.get_submodule(attention.core), "split_size", None
    )  # GPT-2 cuts its output into three such parts
    if split == width and out == 3 * width:
        return slice(0, width)
    raise FettleError(
        f"bitfit: {attention.query[0]} makes queries, keys and values in one layer, and which of its outputs are queries "
        "is not known; use which: all"
    )


def make_room(model: nn.Module, added: set[str]) -> None:
    """Let the configuration say that the layers with the biases `added` have them; zeros fill up what it then asks for.

    FettleError where the architecture cannot say it: others would load the model without them.
    """
    config: Any = model.config
    plain = {_bare(name): innermost(module) for name, module in reversed(list(model.named_modules()))}
    settings = [flag for flag in FLAGS if getattr(config, flag, None) is False]
    left = added - _biases(_empty(model, config)) if added else added
    for flags in [[], *([flag] for flag in settings), settings] if left else ():
        wider = copy.deepcopy(config)
        for flag in flags:
            setattr(wider, flag, True)
        asked = _biases(_empty(model, wider))
        if added <= asked:
            for layer in (plain[name.removesuffix(".bias")] for name in sorted(asked)):
                if layer.bias is None:
                    zeros = layer.weight.new_zeros(in_out(layer)[1])  # type: ignore[operator, union-attr]
                    layer.bias = nn.Parameter(zeros, requires_grad=False)
            for flag in flags:
                setattr(config, flag, True)
            return
    if left:
        raise FettleError(
            f"bitfit: {sorted(left)[0]} was added, and {type(config).__name__} has no setting that gives such layers a bias, "
            "so a merged model could not be loaded; keep the artifact, or train with add: false"
        )


def _bare(name: str) -> str:
    """The name that a module has in the plain model."""
    return ".".join(part for part in name.split(".") if part != "base")


def _biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(".bias")}


def _empty(model: nn.Module, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))
