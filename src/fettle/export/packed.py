"""What the exports of quantized models share: the merged model with packed layers as a format holds them, written as a folder.

A packed layer is written as it is held. Where an edit lies around it, as a LoRA does, the sum of both is rounded to the layer's
grid again, and the manifest says under `requantizing` what that costs. The scales may be rounded to the type that the format
stores; what that moves stands in the manifest like the rounding of merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder
from fettle.export.common import (
    finish,
    folded,
    refuse_linear_experts,
    refuse_rounded_inputs,
    save_tokenizer,
    write_manifest,
)
from fettle.export.parity import QUANTIZED, Parity, Reference, check, measure, plain_logits, wide_logits
from fettle.export.readback import reading
from fettle.models.load import load
from fettle.models.surgery import replace
from fettle.models.weight import read_weight
from fettle.quantize.linear import QuantizedLinear, quantized, requantizing
from fettle.quantize.packed import Quantized

if TYPE_CHECKING:
    from fettle.models.forest import Forest

Fit = Callable[[str, Quantized], Quantized]
Tensors = dict[str, Tensor]
Reader = tuple[str, Callable[[], nn.Module]]  # its name, and what opens the model


@dataclass(frozen=True)
class Packed:
    """A model to be written."""

    model: Any  # merged; packed layers hold what the file will hold
    layers: dict[str, QuantizedLinear]
    logits: Tensor  # on the probes, float32
    costs: dict[str, Any]  # of quantizing again what edits lay around
    probes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Format:
    """A folder of safetensors whose configuration says how layers are packed.

    `fit(name, packed)` -> the same as the format stores it; FettleError, beginning 'its', where it cannot.
    `tensors(layer)` -> what stands in the place of its weight, by the end of the name.
    `config(layers, dense)` -> the `quantization_config`; `dense` are the linear layers that are not packed.
    """

    name: str
    takes: str  # the grid that the format takes, for a sentence
    advice: str  # an edit that makes it
    scales: str  # the type that it stores scales in
    fit: Fit
    tensors: Callable[[QuantizedLinear], Tensors]
    config: Callable[[dict[str, QuantizedLinear], list[str]], dict[str, Any]]
    activations: bool = False  # whether it can say that activations are rounded


def packed(
    forest: Forest, edits: Sequence[Edit], reference: Reference, fit: Fit, dtype: torch.dtype | None = None,
    activations: bool = False,
) -> Packed:  # fmt: skip
    """The merged model with its packed layers fitted to a format. FettleError where one does not fit, naming it."""
    held = quantized(forest.model)
    if not activations:
        refuse_rounded_inputs(forest.model)
    model = folded(forest, edits)
    around = {name: name.split(".base")[0] for name in held}
    again = any(outer != name for name, outer in around.items())
    if again:
        reference.agree(plain_logits(model, reference.probes), reference.adapted, "export: merging the edits")
    costs = requantizing(forest.model, model) if again else {}
    for name, layer in held.items():
        outer = around[name]
        weights = layer.packed if outer == name else layer.quantizer.quantize(read_weight(model.get_submodule(outer)))
        _put(model, outer, layer, weights)
    if not again:
        with unrounded(model):
            reference.agree(plain_logits(model, reference.probes), reference.adapted, "export: merging the edits")
    for name, layer in quantized(model).items():
        try:
            _put(model, name, layer, fit(name, layer.packed))
        except FettleError as error:
            raise FettleError(f"export: {name}: {error}") from None
    finish(model, forest, dtype)
    with unrounded(model):
        return Packed(model, quantized(model), wide_logits(model, reference.probes), costs, reference.probes)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Within it, quantized layers take their inputs as they are.

    Rounding inputs is a staircase: what differs by float32's rounding may differ by a step behind it, so that only weights can
    be compared closely.
    """
    before = [(layer, layer.activations, layer.fits) for layer in quantized(model).values()]
    without_rounding(model)
    try:
        yield
    finally:
        for layer, activations, fits in before:
            layer.activations, layer.fits = activations, fits


def without_rounding(model: nn.Module) -> nn.Module:
    """The model, in place, with layers that take their inputs as they are."""
    for layer in quantized(model).values():
        if layer.activations is not None:
            layer.activations, layer.fits = None, frozenset()  # no kernel: some of them round
    return model


def _put(model: nn.Module, name: str, like: QuantizedLinear, weights: Quantized) -> None:
    there = model.get_submodule(name)
    base = there.dense() if isinstance(there, QuantizedLinear) else there
    layer = QuantizedLinear(base, weights, like.quantizer, activations=like.activations)
    if like.held_range is not None:
        layer.hold_range(*like.held_range)
    replace(model, name, layer)


def export_folder(
    form: Format,
    forest: Forest,
    edits: Sequence[Edit],
    folder: Path,
    dtype: torch.dtype | None,
    reread: Callable[[Path, bool], Reader],
) -> Parity:
    """Write a folder of a format, have it read back, compare.

    `reread(aside, inputs)` -> (who reads it, what opens the model then); `inputs` asks for a model that rounds what its layers
    are given, where the file says so. FettleError where the model is not quantized, or on a grid that the format does not have.
    """
    if not quantized(forest.model):
        raise FettleError(
            f"export: the model is not quantized, and {form.name} is for {form.takes}; quantize it with {form.advice}"
        )
    refuse_linear_experts(forest, form.name)
    with unrounded(forest.model):
        reference = measure(forest, dtype)

    def fit(name: str, weights: Quantized) -> Quantized:
        try:
            return form.fit(name, weights)
        except FettleError as error:
            raise FettleError(f"{error}; {form.name} takes {form.takes}: quantize with {form.advice}") from None

    made = packed(forest, edits, reference, fit, dtype, form.activations)
    with new_folder(folder) as aside:
        save_folder(made, {name: form.tensors(layer) for name, layer in made.layers.items()}, form.config, aside)
        save_tokenizer(forest, aside)
        by, opened = reread(aside, False)
        with reading(folder, by):
            model = opened()
            parity = check(
                reference, lambda rows: wide_logits(model, rows), str(folder), by, made.logits,
                lost=QUANTIZED if made.costs else None,
            )  # fmt: skip
        parity = replace_fields(parity, dtype=f"{form.scales} scales")
        more = {}
        if any(layer.activations for layer in made.layers.values()):
            by, opened = reread(aside, True)
            with reading(folder, by):
                more = {"inputs": _check_inputs(made, opened(), str(folder))}
        write_manifest(aside, form.name, forest, edits, parity, made.costs, **more)
    return parity


def _check_inputs(made: Packed, reread: nn.Module, what: str) -> dict[str, float]:
    """How far a reader's logits lie from what was written where both round the inputs too, beside what that rounding does.

    Right readers may differ by up to sqrt(2) of that in the mean, where steps of the staircase fall apart layer after layer;
    FettleError where it is more.
    """
    for layer in chain(made.layers.values(), quantized(reread).values()):
        layer.fits = frozenset()  # kernels sum in another order, and a step of the staircase may follow
    wanted, found = wide_logits(made.model, made.probes), wide_logits(reread, made.probes)
    effect = float((wanted - made.logits).abs().mean())
    difference = float((wanted - found).abs().mean())
    if not difference <= 1.5 * effect:
        raise FettleError(
            f"{what}: with inputs rounded too, logits differ by {difference:.3g} in the mean, where that rounding moves them by "
            f"{effect:.3g}; nothing was written"
        )
    return {"mean_difference": difference, "mean_effect": effect}


def save_folder(
    made: Packed,
    tensors: dict[str, Tensors],
    config: Callable[[dict[str, QuantizedLinear], list[str]], dict[str, Any]],
    folder: Path,
) -> None:
    """Configuration and weights as safetensors, packed layers by their own tensors."""
    model = made.model
    inside = tuple(f"{name}." for name in made.layers)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}
    for name, layer in made.layers.items():
        state |= {f"{name}.{end}": value.detach().cpu().contiguous().clone() for end, value in tensors[name].items()}
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    model.config.quantization_config = config(made.layers, dense_linears(model))
    model.save_pretrained(folder, state_dict=state)


def one_grid(layers: dict[str, QuantizedLinear], form: str) -> tuple[int, int]:
    """(bits, group size or -1 for whole rows) of all layers. FettleError where two differ."""
    found: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        length, width = layer.packed.length, layer.packed.shape[1]
        found.setdefault((layer.packed.grid.bits, -1 if length == width else length), name)
    if len(found) > 1:
        (one, first), (two, second), *_ = found.items()
        raise FettleError(
            f"export: {first} has {_said(*one)}, {second} {_said(*two)}, and {form} has one grid for all layers; use "
            "--to compressed-tensors"
        )
    return next(iter(found))


def _said(bits: int, group: int) -> str:
    return f"{bits} bits in {'whole rows' if group == -1 else f'groups of {group}'}"


def dense_linears(model: nn.Module) -> list[str]:
    """The names of the linear layers that are not packed, the head among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def reread_here(forest: Forest, folder: Path, inputs: bool) -> Reader:
    """A folder as fettle opens it as a base; `inputs`: whether its layers round what they are given, where it says so."""
    spec = forest.spec.model_copy(update={"path": str(folder), "revision": None, "config": None, "tokenizer": None})

    def opened() -> nn.Module:
        model = load(spec.model_copy(update={"task": forest.task, "device": str(forest.device)})).model
        return model if inputs else without_rounding(model)

    return "fettle", opened
