"""Quantized checkpoints from elsewhere as bases: GPTQ, AWQ and compressed-tensors folders, whose packed weights stay packed.

transformers builds the model and loads what is dense, with a place of no weight where a layer is packed; then each place gets
its layer, one after the other, so that no dense weight of theirs is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.models import load
from fettle.models.surgery import replace
from fettle.models.weight import in_out
from fettle.quantize.activations import Activations
from fettle.quantize.layouts import Affine
from fettle.quantize.linear import QuantizedLinear, quantized
from fettle.quantize.loftq import LoftQ
from fettle.quantize.packed import Quantized, quantize
from fettle.quantize.schemes import READERS, Scheme


@dataclass(frozen=True)
class AsLoaded:
    """Stands in a layer for the edit that quantized it, where the checkpoint itself was quantized."""

    kind: str  # the checkpoint's method
    packed: Quantized  # its layout, over no tensors: the layer holds those
    activations: Activations | None = None
    targets: str | tuple[str, ...] = "all-linear"
    loftq: LoftQ | None = None

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> AsLoaded:
        return self

    def quantize(self, weight: Tensor) -> Quantized:
        """A weight [N, K] rounded to the nearest of the layer's grid."""
        return quantize(weight, self.packed.grid)


class _Place(nn.Module):
    """Where a packed layer will stand: all of it but its weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = in_out(base)
        self.bias, self.dtype = base.bias, base.weight.dtype
        # What initializes a model may reach for the weights of the layers in it, as T5's attention does.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def filled(self, packed: Quantized, quantizer: AsLoaded) -> QuantizedLinear:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        # One number that stands for all: a layer asks for the type and the device, and the weight itself is packed.
        one = torch.zeros((), dtype=self.dtype).expand(self.out_features, self.in_features)
        layer.weight = nn.Parameter(one, requires_grad=False)
        layer.bias = self.bias
        return QuantizedLinear(layer, packed, quantizer, activations=quantizer.activations)


@dataclass
class Checkpoint:
    """The packed layers of a folder."""

    folder: Path
    scheme: Scheme
    parts: dict[str, dict[str, Path]] = field(default_factory=dict)  # by layer: its tensors, and the files they are in

    @contextmanager
    def opening(self, config: Any) -> Iterator[None]:
        """Within it, transformers builds a model of `config` with places for the packed layers."""
        from fettle.quantize.places import METHOD, PLACES  # imports every quantizer of transformers

        config.quantization_config = {"quant_method": METHOD}
        token = PLACES.set(self._put_places)
        try:
            yield
        finally:
            PLACES.reset(token)
            del config.quantization_config

    def _put_places(self, model: nn.Module) -> None:
        for name in self.parts:
            layer = dict(model.named_modules()).get(name)
            if type(layer) is not nn.Linear:
                what = "no layer" if layer is None else f"a {type(layer).__name__}"
                raise FettleError(
                    f"{self.folder}: holds packed weights for '{name}', where {type(model).__name__} has {what}"
                )
            replace(model, name, _Place(layer))

    def held(self, names: list[str]) -> list[str]:
        """Of the weights that transformers did not ask for, those that are no part of a packed layer."""
        own = {f"{name}.{part}" for name, parts in self.parts.items() for part in parts}
        own |= {f"{name}.bias" for name in self.parts if f"{name}.bias" in names and self._is_zero(f"{name}.bias")}
        return [name for name in names if name not in own]

    def _is_zero(self, tensor: str) -> bool:
        """Whether a bias is one that GPTQ's tools write where the model has none."""
        for file in load.weight_files(self.folder):
            with safe_open(file, "pt") as stored:
                if tensor in stored.keys():
                    return not stored.get_tensor(tensor).any()
        return False

    def fill(self, model: nn.Module) -> None:
        """Put the packed layers in their places. FettleError where their tensors are not what the configuration means."""
        for name, parts in self.parts.items():
            place = model.get_submodule(name)
            assert isinstance(place, _Place)
            tensors = {part: _tensor(file, f"{name}.{part}") for part, file in parts.items()}
            try:
                weight = self._fitting(self.scheme.read(name, tensors), place)
                packed = weight.packed()
                layout = packed.holding({key: t.new_empty(0) for key, t in packed.tensors().items()})
                layer = place.filled(packed, AsLoaded(self.scheme.method, layout, self.scheme.activations(name)))
                _hold_range(layer, tensors)
            except FettleError as error:
                raise FettleError(f"{self.folder}: {name}: {error}") from None
            replace(model, name, layer)

    def _fitting(self, weight: Affine, place: _Place) -> Affine:
        found, wanted = tuple(weight.codes.shape), (place.out_features, place.in_features)
        if found != wanted:
            raise FettleError(
                f"its tensors hold {found} weights of {weight.bits} bits, the model needs {wanted}; the configuration is another "
                "file's, or says other bits than the file has"
            )
        if not torch.isfinite(weight.scale).all():
            raise FettleError("a scale is not finite (NaN or infinity); the file is damaged")
        return weight


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as stored:
        return stored.get_tensor(name)  # type: ignore[no-any-return]


def _hold_range(layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
    if layer.activations is None or not layer.activations.static:
        return
    if "input_scale" not in tensors:
        raise FettleError("its activations are static, and it has no 'input_scale'")
    zero = tensors.get("input_zero_point")
    if zero is not None:
        zero = zero.float() + 2 ** (layer.activations.bits - 1)
    layer.hold_range(tensors["input_scale"].float(), None if layer.activations.symmetric else zero)


def open_checkpoint(folder: Path, said: Mapping[str, Any]) -> Checkpoint:
    """What a folder holds packed, by its `quantization_config`. FettleError where its scheme cannot be read."""
    try:
        made = Checkpoint(folder, READERS[said["quant_method"]](said))
    except FettleError as error:
        raise FettleError(f"{folder}: {error}") from None
    found: dict[str, dict[str, Path]] = {}
    for file in load.weight_files(folder):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():
                name, _, part = key.rpartition(".")
                if part in made.scheme.parts:
                    found.setdefault(name, {})[part] = file
    marks = [set(mark.split("+")) for mark in made.scheme.marks]
    made.parts = {name: parts for name, parts in found.items() if any(mark <= parts.keys() for mark in marks)}
    if not made.parts:
        raise FettleError(f"{folder}: config.json says {made.scheme.method}, and no weight in the folder is packed so")
    return made


def unpacked(model: nn.Module) -> nn.Module:
    """The model, in place, with dense layers for those that its checkpoint held packed, so that edits can be folded into them."""
    for name, layer in quantized(model).items():
        if isinstance(layer.quantizer, AsLoaded):
            replace(model, name, layer.dense())
    return model


load.packed_checkpoints |= dict.fromkeys(READERS, open_checkpoint)
