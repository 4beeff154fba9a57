"""GGUF: one file for llama.cpp and what is built on it (Ollama, LM Studio), with tokenizer and chat template inside.

Packed layers whose grid a type of GGUF has are written as they are (gguf_blocks.py). With `type` everything goes into that type,
by its own rounding where it is not on that grid already; embeddings and the head, which lose most, go into Q8_0 at least. Norms
and biases stay in float32.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import fettle
from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder
from fettle.core.spec import nearest
from fettle.export.common import folded, refuse_rounded_inputs, write_manifest
from fettle.export.gguf_blocks import FLOATS, TYPES, blocks, fitting, rounded
from fettle.export.gguf_model import Facts, architecture, arranged, named, rope_factors, sizes
from fettle.export.gguf_tokenizer import Vocabulary, vocabulary
from fettle.export.parity import QUANTIZED, Parity, check, measure, plain_logits, silently
from fettle.export.readback import reading
from fettle.models.tasks import auto_class
from fettle.models.weight import read_weight
from fettle.peft.new_tokens import rows_of
from fettle.quantize.layouts import Affine, affine_of
from fettle.quantize.linear import quantized, requantizing

if TYPE_CHECKING:
    from fettle.models.forest import Forest

OWN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WIDE = ("token_embd.weight", "output.weight")  # in Q8_0 where others have fewer bits
FEW = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}  # llama.cpp's numbers


@dataclass
class _File:
    """What is to be written."""

    main: str  # the type that the layers have, but for what is left wide
    tensors: dict[str, tuple[str, np.ndarray[Any, Any]]] = field(
        default_factory=dict
    )  # by llama.cpp's name: type and bytes
    kinds: Counter[str] = field(default_factory=Counter)  # weights by type

    def put(self, name: str, kind: str, data: np.ndarray[Any, Any], count: int) -> None:
        self.tensors[name] = kind, data
        self.kinds[kind] += count


def export_gguf(
    forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None, type: str | None = None
) -> Parity:
    """Write <name>-<type>.gguf; read it back with transformers, compare. FettleError where llama.cpp has no such model.

    `type` is one of TYPES; None writes packed layers as they are and the rest in the model's own type.
    """
    _needs()
    if dtype is not None:
        raise FettleError("export: a GGUF file has types of its own; use --type, as in --type F16, in place of --dtype")
    if type is not None and type not in TYPES:
        raise FettleError(f"export: GGUF has no type '{type}': {nearest(type, TYPES)}")
    arch, facts = architecture(forest.config), sizes(forest.config)
    words = vocabulary(forest.tokenizer, rows_of(forest.model.get_input_embeddings()))
    refuse_rounded_inputs(forest.model)
    reference = measure(forest, FLOATS.get(type or "", forest.dtype))
    model = folded(forest, edits)
    reference.agree(plain_logits(model, reference.probes), reference.adapted, "export: merging the edits")
    around = any(".base" in name for name in quantized(forest.model))  # an edit lies around a packed layer
    costs = requantizing(forest.model, model) if around and type is None else {}
    with torch.no_grad():
        made = _lay(forest, model, type)
    written = plain_logits(model, reference.probes)
    few = made.main not in FLOATS
    with new_folder(folder) as aside:
        file = aside / f"{_name(forest)}-{made.main}.gguf"
        _write(file, arch, _name(forest), facts, words, made)
        by = "transformers with gguf"
        with reading(folder, by):
            reread = _reread(forest, model.config, file)
            parity = check(
                reference,
                lambda rows: plain_logits(reread, rows),
                str(folder),
                by,
                written,
                lost=QUANTIZED if few else None,
            )
        parity = replace(parity, dtype=made.main)
        more = {"types": dict(made.kinds), "tokenizer": {"rule": words.pre, "other_tokens_for": words.differs}}
        write_manifest(aside, "gguf", forest, edits, parity, costs, **more)
    return parity


def _needs() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FettleError(f"export: GGUF needs {' and '.join(missing)}; pip install 'fettle[formats]'")


def _name(forest: Forest) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(forest.spec.path).name or "model")


def _lay(forest: Forest, model: Any, wanted: str | None) -> _File:
    """Every weight in its type; the model gets, in place, the values that the file will hold."""
    config, exact = model.config, _packed(forest, model, wanted)
    packed_as = Counter(kind for kind, _ in exact.values()).most_common(1)
    made = _File(wanted or (packed_as[0][0] if packed_as else OWN[forest.dtype]))
    for key, there, weight in named(model, config):
        name = key.rpartition(".")[0]
        try:
            if name in exact and key.endswith(".weight"):
                kind, packed = exact[name]
                data, values = blocks(packed, kind)
            else:
                kind = _kind(forest, there, weight, wanted)
                data, values = rounded(weight.cpu(), kind)
        except FettleError as error:
            raise FettleError(f"export: {name}: {error}") from None
        made.put(there, kind, arranged(config, name, torch.from_numpy(data)).numpy(), weight.numel())
        weight.copy_(values)
    factors = rope_factors(config)
    if factors is not None:
        made.put("rope_freqs.weight", "F32", factors.numpy(), 0)
    return made


def _packed(forest: Forest, model: nn.Module, wanted: str | None) -> dict[str, tuple[str, Affine]]:
    """The layers that go into the file as they are packed, and their types."""
    found: dict[str, tuple[str, Affine]] = {}
    for name, layer in quantized(forest.model).items() if wanted not in FLOATS else ():
        outer = name.split(".base")[0]
        alone = outer == name
        if not alone and wanted is not None:  # the sum is rounded by the type's own rule
            continue
        try:
            packed = layer.packed if alone else layer.quantizer.quantize(read_weight(model.get_submodule(outer)))
            weight = affine_of(packed)
            found[outer] = fitting(weight, wanted), weight
        except FettleError as error:
            if wanted is None:
                raise FettleError(
                    f"export: {name}: {error}; give --type to round its weights again (Q4_0, Q8_0, ..) or to write them out (F16), "
                    "or quantize with {kind: rtn, grid: {bits: 4, group: 32, scale: float16}}, which is written as it is"
                ) from None
    return found


def _kind(forest: Forest, there: str, weight: Tensor, wanted: str | None) -> str:
    if weight.ndim < 2 or there == "position_embd.weight":
        return "F32"
    kind = wanted or OWN[forest.dtype]
    return "Q8_0" if there in WIDE and kind in FEW else kind


def _write(file: Path, arch: str, name: str, facts: Facts, words: Vocabulary, made: _File) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    writer.add_name(name)
    writer.add_quantized_by(f"fettle {fettle.__version__}")
    writer.add_file_type(FILE_TYPES[made.main])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in facts.items():
        add: Any = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    for key, number in words.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    writer.add_add_bos_token(words.adds_start)
    if words.template is not None:
        writer.add_chat_template(words.template)
    for key, (kind, data) in made.tensors.items():
        writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reread(forest: Forest, config: Any, file: Path) -> nn.Module:
    """The file as transformers opens it, dequantized, in the merged model's configuration: it does not read all of the file's."""
    from transformers import GgufConfig, LlamaConfig

    config = copy.deepcopy(config)
    if config.model_type == "mistral":  # without windows it is a Llama, and as such the file names it
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in ("model_type", "sliding_window")})
    with silently():
        return auto_class(forest.spec.model_copy(update={"task": "causal"}), config).from_pretrained(  # type: ignore[no-any-return]
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, config=config,
            local_files_only=True,
        )  # fmt: skip
