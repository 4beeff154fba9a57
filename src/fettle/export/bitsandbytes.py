"""bitsandbytes: what transformers opens with `bitsandbytes` installed; github.com/bitsandbytes-foundation/bitsandbytes.

    nf4    weight uint8 [N K / 2, 1], .absmax (in 8 bits with .nested_absmax, double quantization), .quant_map, .quant_state
    int8   weight int8 [N, K], SCB float32 [N]:  W = weight SCB / 127                       (LLM.int8, whose inputs are rounded too)

The layers of `nf4`, and of any symmetric grid of 8 bits a row, are written as they are. A dense model is rounded to the `type`.
One type for all layers; those that are not packed stand in `llm_int8_skip_modules`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder
from fettle.core.spec import nearest
from fettle.export.common import (
    finish,
    folded,
    refuse_linear_experts,
    refuse_rounded_inputs,
    save_tokenizer,
    write_manifest,
)
from fettle.export.packed import Packed, Tensors, packed, save_folder, unrounded
from fettle.export.parity import QUANTIZED, Parity, Reference, check, measure, plain_logits, silently, wide_logits
from fettle.export.readback import reading
from fettle.models.select import linears
from fettle.models.surgery import replace
from fettle.models.tasks import auto_class
from fettle.models.weight import read_weight
from fettle.quantize.checkpoint import AsLoaded
from fettle.quantize.grid import Grid, dynamic, levels
from fettle.quantize.layouts import affine_of
from fettle.quantize.linear import QuantizedLinear, quantized
from fettle.quantize.nf4 import SCALES, nf4
from fettle.quantize.packed import Quantized, quantize

if TYPE_CHECKING:
    from fettle.models.forest import Forest

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # weights that may share a scale there
# A rounding of dense weights by type.
TYPES: dict[str, Callable[[Tensor], Quantized]] = {"nf4": nf4, "int8": lambda w: quantize(w, Grid(bits=8, narrow=True))}


def export_bitsandbytes(
    forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None, type: str | None = None
) -> Parity:
    """Write the model in a type of TYPES, open it with bitsandbytes, compare. FettleError where it does not have the grid.

    `type` None keeps packed layers as they are, and is nf4 for a dense model.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FettleError(f"export: bitsandbytes needs {' and '.join(missing)}; pip install 'fettle[formats]'")
    if type is not None and type not in TYPES:
        raise FettleError(f"export: bitsandbytes has no type '{type}': {nearest(type, TYPES)}")
    refuse_linear_experts(forest, "bitsandbytes")
    with unrounded(forest.model):
        reference = measure(forest, dtype)
    held = quantized(forest.model)
    threshold = _threshold(held)
    if not held or type is not None:
        made = _rounded(forest, edits, reference, type or "nf4", dtype)
    else:
        made = packed(forest, edits, reference, lambda _, p: _fitting(p), dtype, activations=threshold is not None)
    kinds = {name: kind_of(layer.packed) for name, layer in made.layers.items()}
    if len(set(kinds.values())) > 1:
        (one, first), (two, second), *_ = {kind: name for name, kind in kinds.items()}.items()
        raise FettleError(
            f"export: {first} is {one}, {second} {two}, and a bitsandbytes model has one type; give --type"
        )
    with new_folder(folder) as aside:
        config = partial(config_of, threshold=threshold)
        save_folder(made, {name: tensors(layer) for name, layer in made.layers.items()}, config, aside)
        save_tokenizer(forest, aside)
        written = _as_read(made)
        with reading(folder, "transformers with bitsandbytes"):
            reread = _reread(forest, aside)
            parity = check(
                reference, lambda rows: wide_logits(reread, rows), str(folder), "bitsandbytes", written,
                lost=QUANTIZED if made.costs or type or not held else None,
            )  # fmt: skip
        parity = dataclasses.replace(parity, dtype=next(iter(kinds.values())))
        write_manifest(aside, "bitsandbytes", forest, edits, parity, made.costs)
    return parity


def _threshold(layers: dict[str, QuantizedLinear]) -> float | None:
    """From which size on an input is an outlier, where layers round theirs as LLM.int8 does, all alike; else None."""
    found = {layer.activations for layer in layers.values()}
    alike = found.pop() if len(found) == 1 else None
    if alike is None or (alike.bits, alike.group, alike.static, alike.symmetric) != (8, "row", False, True):
        return None
    return alike.outliers if alike.narrow else None


def kind_of(weights: Quantized) -> str:
    """The type that holds a packed weight as it is. FettleError, beginning 'its', where none does."""
    grid = weights.grid
    if (grid.levels, grid.bits) == ("normal", 4) and grid.symmetric and weights.length in BLOCKS:
        if weights.shape[-1] % weights.length:
            raise FettleError(
                f"its blocks of {weights.length} run on from one row of {weights.shape[-1]} to the next, which bitsandbytes does not "
                "read alike everywhere; quantize with a block that divides its rows"
            )
        inner = weights.scale
        if isinstance(inner, Tensor) or inner.grid == SCALES:
            return "nf4"
    if (grid.levels, grid.bits, grid.symmetric) == ("int", 8, True) and affine_of(weights).scale.shape[1] == 1:
        return "int8"
    what = f"{grid.bits} bits, levels: {grid.levels}, groups of {weights.length}"
    raise FettleError(
        f"its weights ({what}) are neither NF4 in blocks of 64, 128, .. nor symmetric in 8 bits a row; give --type nf4 or int8 "
        "to round them again, or quantize with {kind: nf4}"
    )


def _fitting(weights: Quantized) -> Quantized:
    kind_of(weights)
    return weights


def _rounded(
    forest: Forest, edits: Sequence[Edit], reference: Reference, kind: str, dtype: torch.dtype | None
) -> Packed:
    """The merged model with every linear layer but the head in a type; those that are in it already stay as they are."""
    refuse_rounded_inputs(forest.model)
    model = folded(forest, edits)
    reference.agree(plain_logits(model, reference.probes), reference.adapted, "export: merging the edits")
    held = quantized(forest.model)
    for name in list(linears(model)):
        base = model.get_submodule(name)
        same = held.get(name)
        keep = same is not None and _is(same.packed, kind)
        weights = same.packed if same is not None and keep else TYPES[kind](read_weight(base))
        replace(model, name, QuantizedLinear(base, weights, AsLoaded("bitsandbytes", weights)))
    finish(model, forest, dtype)
    return Packed(model, quantized(model), wide_logits(model, reference.probes), {}, reference.probes)


def _is(weights: Quantized, kind: str) -> bool:
    try:
        return kind_of(weights) == kind
    except FettleError:
        return False


def tensors(layer: QuantizedLinear) -> Tensors:
    """What stands in the place of a layer's weight."""
    weights = layer.packed
    if kind_of(weights) == "int8":
        affine = affine_of(weights)
        return {
            "weight": (affine.codes.short() - 128).to(torch.int8),
            "SCB": affine.scale.float().view(-1) * 127,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    said = {
        "quant_type": "nf4", "blocksize": weights.length, "dtype": _name(layer.like.dtype), "shape": list(weights.shape)
    }  # fmt: skip
    made = {"weight": weights.codes.view(-1, 1), "weight.quant_map": levels(weights.grid)}
    if isinstance(weights.scale, Quantized):
        inner = weights.scale
        assert isinstance(inner.scale, Tensor) and inner.offset is not None
        made |= {
            "weight.absmax": inner.codes, "weight.nested_absmax": inner.scale, "weight.nested_quant_map": dynamic(signed=True)
        }  # fmt: skip
        said |= {"nested_blocksize": inner.length, "nested_dtype": "float32", "nested_offset": inner.offset.item()}
    else:
        made["weight.absmax"] = weights.scale.float()
    said_bytes = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return made | {"weight.quant_state.bitsandbytes__nf4": said_bytes}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def config_of(layers: dict[str, QuantizedLinear], dense: list[str], threshold: float | None = None) -> dict[str, Any]:
    """The `quantization_config`; `threshold`: from which size on inputs are outliers, 6.0 where None."""
    first = next(iter(layers.values()))
    four = kind_of(first.packed) == "nf4"
    said = {
        "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four, "llm_int8_threshold": threshold or 6.0,
        "llm_int8_skip_modules": dense,
    }  # fmt: skip
    if four:
        said |= {
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": _name(first.like.dtype),
            "bnb_4bit_use_double_quant": isinstance(first.packed.scale, Quantized),
        }  # fmt: skip
    return said


def _as_read(made: Packed) -> Tensor:
    """Logits of what bitsandbytes dequantizes, which rounds to the type of the model; the packed layers are let go of."""
    for name, layer in made.layers.items():
        replace(made.model, name, layer.dense())
    return wide_logits(made.model, made.probes)


def _reread(forest: Forest, folder: Path) -> nn.Module:
    """The folder as transformers opens it, dequantized by bitsandbytes: its int8 layers would round their inputs too."""
    with silently():
        model = auto_class(forest.spec.model_copy(update={"task": forest.task}), forest.config).from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            device_map="cpu",
            trust_remote_code=forest.spec.trust_remote_code,
        )
        return model.dequantize(model.dtype)  # type: ignore[no-any-return]
