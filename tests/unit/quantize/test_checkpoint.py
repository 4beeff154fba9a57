"""Quantized folders from elsewhere as bases: what opens, what edits do over it, and what is refused in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.files import read_json, write_json
from fettle.export import export
from fettle.export.parity import plain_logits, probes
from fettle.models.forest import Forest
from fettle.models.load import base_hash, load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA
from fettle.quantize import NF4, RTN, Activations, AsLoaded, Grid
from fettle.quantize.linear import describe, quantized
from fettle.stages.artifact import apply_edits, open_artifact, save_artifact

EDITS = {
    "gptq": RTN(grid=Grid(bits=4, group=32, symmetric=False, scale="float16")),
    "gptq-v2": RTN(grid=Grid(bits=3, group=32, symmetric=False, scale="float16")),
    "awq": RTN(grid=Grid(bits=4, group=32, symmetric=False, scale="float16")),
    "compressed-tensors": RTN(grid=Grid(bits=4, group=32, symmetric=False)),
}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("packed")
    for form, edit in EDITS.items():
        forest = opened(tiny_llama)
        apply_edits(forest, [edit])
        export(forest, [edit], made / form, form)
    return {form: made / form for form in EDITS}


def opened(folder: Path, dtype: str = "float32") -> Forest:
    return load(ModelSpec(path=str(folder), dtype=dtype))  # type: ignore[arg-type]


@torch.no_grad()
def logits(forest: Forest) -> Tensor:
    return plain_logits(forest.model, probes(len(forest.tokenizer), 48))


@pytest.mark.parametrize("form", EDITS)
def test_a_folder_opens_packed(folders: dict[str, Path], tiny_llama: Path, form: str) -> None:
    forest, made = opened(folders[form]), opened(tiny_llama)
    apply_edits(made, [EDITS[form]])
    layers = quantized(forest.model)
    assert layers.keys() == quantized(made.model).keys() and len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.packed.values(), quantized(made.model)[name].packed.values())
        assert isinstance(layer.quantizer, AsLoaded) and layer.quantizer.kind == form.removesuffix("-v2")
    assert torch.equal(logits(forest), logits(made))
    assert type(forest.model.lm_head) is nn.Linear
    assert describe(forest.model)["bits"] == pytest.approx(describe(made.model)["bits"])
    assert not hasattr(forest.config, "quantization_config") and not getattr(forest.model, "is_quantized", False)


def test_a_folder_opens_in_sixteen_bits_too(folders: dict[str, Path]) -> None:
    forest = opened(folders["gptq"], "bfloat16")
    assert forest.model.dtype == torch.bfloat16 and quantized(forest.model)[Q].packed.grid.scale == "float16"
    assert quantized(forest.model)[Q].dequantized().dtype == torch.bfloat16


def test_edits_lie_around_it_and_an_artifact_opens_again(folders: dict[str, Path], tmp_path: Path) -> None:
    forest, edit = opened(folders["awq"]), LoRA(rank=4)
    before = logits(forest)
    apply_edits(forest, [edit])
    assert torch.equal(logits(forest), before)
    forest.model(input_ids=torch.arange(9)[None]).logits.square().mean().backward()
    trained = [p for p in forest.model.parameters() if p.requires_grad]
    assert len(trained) == 28 and all(p.grad is not None for p in trained)
    with torch.no_grad():
        for tensor in trained:
            tensor.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    save_artifact(tmp_path / "a", forest, [edit], {})
    assert read_json(tmp_path / "a" / "manifest.json")["base_hash"] == base_hash(folders["awq"])
    again, edits = open_artifact(tmp_path / "a")
    assert torch.equal(logits(again), logits(forest))
    parity = export(again, edits, tmp_path / "hf", "hf")
    assert parity.largest_difference < 1e-4
    merged = opened(tmp_path / "hf")
    assert not quantized(merged.model) and torch.allclose(logits(merged), logits(forest), atol=1e-4)


def test_it_goes_out_again_as_it_came(folders: dict[str, Path], tmp_path: Path) -> None:
    for form in ("gptq", "gptq-v2", "awq"):
        export(opened(folders[form]), [], tmp_path / form, form)
        one, other = (load_file(f / "model.safetensors") for f in (folders[form], tmp_path / form))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_what_is_quantized_already_is_not_quantized_again(folders: dict[str, Path]) -> None:
    with pytest.raises(FettleError, match="nf4 finds .* quantized already"):
        apply_edits(opened(folders["gptq"]), [NF4()])


def test_inputs_are_rounded_where_the_file_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    edit = RTN(grid=Grid(bits=8), activations=Activations(group="tensor", static=True))
    forest = opened(tiny_llama)
    apply_edits(forest, [edit])
    for layer in quantized(forest.model).values():
        layer.hold_range(torch.tensor(0.02))
    export(forest, [edit], tmp_path / "out", "compressed-tensors")
    again = opened(tmp_path / "out")
    layer = quantized(again.model)[Q]
    assert layer.activations == edit.activations and layer.held_range is not None
    assert layer.held_range[0].item() == pytest.approx(0.02)
    assert torch.allclose(logits(again), logits(forest), atol=1e-5)


# What is refused.

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def said(**settings: Any) -> Change:
    return lambda config, tensors: config.update(settings)


def part(end: str, change: Callable[[Tensor], Tensor] | None) -> Change:
    def changed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key = f"{Q}.{end}"
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key])

    return changed


def group(**settings: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"].update(settings)


def weights(**settings: Any) -> Change:
    return lambda config, tensors: config["config_groups"]["group_0"]["weights"].update(settings)


def nothing_packed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        if key.endswith(("qweight", "qzeros", "scales", "g_idx")):
            del tensors[key]


def another_layer(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        if key.startswith("model.layers.1."):
            tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)


def a_bias(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.bias"] = torch.ones(64)


BAD: dict[str, tuple[str, Change, str]] = {
    "an unknown method": ("gptq", said(quant_method="eetq"), "quantized by 'eetq'; .*gptq.* can be read"),
    "other bits": ("gptq", said(bits=8), "_proj: its 'qzeros' has shape .*; the configuration means"),
    "5 bits": ("gptq", said(bits=5), "have 5 bits; 2, 3, 4, 8 can be read"),
    "no bits": ("gptq", said(bits=None), "quantization_config.bits is None; expected a whole number"),
    "another group": ("gptq", said(group_size=16), "_proj: its 'qzeros' has shape .*; the configuration means"),
    "a group that does not divide": ("gptq", said(group_size=48), "groups of 48 do not divide its rows of (64|128)"),
    "marlin": ("gptq", said(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; gptq and gptq_v2 can be read"),
    "wide words": ("gptq", said(pack_dtype="int16"), "pack_dtype is 'int16'"),
    "no zeros": ("gptq", part("qzeros", None), "q_proj: it has no 'qzeros'"),
    "no codes": ("gptq", part("qweight", None), "lacks 1 of the weights .*q_proj.weight"),
    "half its codes": ("gptq", part("qweight", lambda t: t[:4].contiguous()), "the configuration means"),
    "order of activations": ("gptq", part("g_idx", lambda t: t.flip(0).contiguous()), "in the order of activations"),
    "NaN": ("gptq", part("scales", lambda t: t * torch.nan), "q_proj: a scale is not finite"),
    "float64 scales": ("gptq", part("scales", lambda t: t.double()), "scales are float64"),
    "nothing packed": ("gptq", nothing_packed, "says gptq, and no weight in the folder is packed so"),
    "another layer": ("gptq", another_layer, "packed weights for 'model.layers.7.*no layer"),
    "a bias of its own": ("gptq", a_bias, "has, unasked, .*q_proj.bias"),
    "gemv": ("awq", said(version="gemv"), "the version of AWQ is 'gemv'; gemm can be read"),
    "AWQ in 8 bits": ("awq", said(bits=8), "have 8 bits; 4 can be read"),
    "floats": ("compressed-tensors", weights(type="float"), "its weights are float .*integers, packed or whole, can be read"),
    "fp4": ("compressed-tensors", group(format="nvfp4-pack-quantized"), "in the format 'nvfp4-pack-quantized'"),
    "blocks": ("compressed-tensors", weights(strategy="block"), "the strategy of its weights is 'block'"),
    "a cache": ("compressed-tensors", said(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set, which cannot be computed"),
    "outputs": ("compressed-tensors", group(output_activations={"num_bits": 8}), "output_activations is set"),
    "float inputs": ("compressed-tensors", group(input_activations={"type": "float", "num_bits": 8}), "its activations are float"),
    "no groups": ("compressed-tensors", said(config_groups={}), "has no 'config_groups'"),
    "no target": ("compressed-tensors", group(targets=["re:.*mlp.*"]), "_proj: no group of config_groups means it"),
    "other bits there": ("compressed-tensors", weights(num_bits=8), "_proj: its 'weight_packed' has shape"),
    "another group there": ("compressed-tensors", weights(group_size=64), "_proj: its 'weight_scale' has shape"),
    "no zero points": ("compressed-tensors", part("weight_zero_point", None), "q_proj: it has no 'weight_zero_point'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_said(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    form, change, sentence = BAD[case]
    with pytest.raises(FettleError, match=sentence) as caught:
        opened(changed(folders[form], tmp_path, change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def changed(folder: Path, into: Path, change: Change) -> Path:
    """A copy of a folder with its configuration and tensors changed."""
    copy = into / "changed"
    shutil.copytree(folder, copy)
    config, tensors = read_json(copy / "config.json"), load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    write_json(copy / "config.json", config)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_biases_of_nothing_are_no_biases(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPTQ's tools write a bias of zeros for every layer of a model that has none."""

    def add(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.bias"] = torch.zeros(64)

    assert opened(changed(folders["gptq"], tmp_path, add)).model.get_submodule(Q).bias is None


def test_dynamic_says_what_differs_by_layer(folders: dict[str, Path], tmp_path: Path) -> None:
    """All of layer 1 in another group size, as GPTQModel's `dynamic` says it."""

    def widen(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["dynamic"] = {r"+:model\.layers\.0\..*": {"group_size": 32}, r"-:lm_head": {}}
        config["group_size"] = 64
        for key in [k.removesuffix(".qweight") for k in tensors if "layers.1." in k and k.endswith("qweight")]:
            tensors[f"{key}.qzeros"], tensors[f"{key}.scales"] = (
                tensors[f"{key}.{e}"][::2].contiguous() for e in ("qzeros", "scales")
            )
            tensors[f"{key}.g_idx"] = (torch.arange(len(tensors[f"{key}.g_idx"])) // 64).int()

    layers = quantized(opened(changed(folders["gptq"], tmp_path, widen)).model)
    assert {layer.packed.length for name, layer in layers.items() if "layers.0." in name} == {32}
    assert {layer.packed.length for name, layer in layers.items() if "layers.1." in name} == {64}
