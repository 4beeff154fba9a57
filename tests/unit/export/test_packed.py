"""Exports of quantized models: packed weights as they are, what edits around them cost, what a format has no grid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from fettle.core import FettleError
from fettle.core.files import read_json, verify
from fettle.export import FORMATS, export, gguf
from fettle.export import packed as packed_module
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA
from fettle.quantize import NF4, RTN, Activations, Grid
from fettle.quantize.linear import quantized
from fettle.stages.artifact import apply_edits
from small import make

W4 = RTN(grid=Grid(bits=4, group=32, scale="float16"))
PACKED = ("compressed-tensors", "gptq", "gptq-v2", "awq")


def opened(folder: Path, *edits: Any, dtype: str = "float32") -> Forest:
    return apply_edits(load(ModelSpec(path=str(folder), dtype=dtype)), edits)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", [*PACKED, "bitsandbytes", "gguf"])
def test_every_format_reads_back(tiny_llama: Path, tmp_path: Path, to: str, dtype: str) -> None:
    edit = NF4() if to == "bitsandbytes" else W4
    forest = opened(tiny_llama, edit, dtype=dtype)
    before = {name: layer.packed.values() for name, layer in quantized(forest.model).items()}
    parity = export(forest, [edit], tmp_path / "out", to)
    assert parity.written_difference <= parity.tolerance < 1e-3
    exact = dtype == "float32" or to in ("gptq", "gptq-v2", "awq", "gguf")
    assert parity.largest_difference < (1e-4 if exact else 0.01)
    manifest = verify(tmp_path / "out")
    assert manifest["kind"] == "export" and manifest["format"] == to and manifest["edits"][0]["kind"] == edit.kind
    assert manifest["parity"]["same_top"] == parity.same_top and "requantizing" not in manifest
    assert all(torch.equal(layer.packed.values(), before[name]) for name, layer in quantized(forest.model).items())


@pytest.mark.parametrize("to", PACKED)
def test_what_lies_around_a_packed_layer_is_rounded_with_it(tiny_llama: Path, tmp_path: Path, to: str) -> None:
    edits = [RTN(grid=Grid(bits=4, group=32, scale="float16")), LoRA(rank=4, targets=("q_proj",))]
    forest = opened(tiny_llama, *edits)
    with torch.no_grad():
        for parameter in forest.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    parity = export(forest, edits, tmp_path / "out", to)
    costs = read_json(tmp_path / "out" / "manifest.json")["requantizing"]
    assert costs["layers"] == 14 and costs["worst_error"] > 0 and costs["mean_update"] > 0
    assert parity.effect_kept == pytest.approx(1, abs=0.3) and parity.written_difference < parity.tolerance


def test_scales_are_rounded_and_that_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    wide = RTN(grid=Grid(bits=4, group=32))
    parity = export(opened(tiny_llama, wide), [wide], tmp_path / "wide", "gptq")
    narrow = export(opened(tiny_llama, W4), [W4], tmp_path / "narrow", "gptq")
    assert narrow.largest_difference < 1e-6 < parity.largest_difference < 0.01
    assert parity.dtype == "float16 scales"


def test_layers_left_dense_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    edit = RTN(grid=W4.grid, targets=("q_proj", "down_proj"))
    for to, key in (("gptq", "dynamic"), ("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        export(opened(tiny_llama, edit), [edit], tmp_path / to, to)
        said = read_json(tmp_path / to / "config.json")["quantization_config"][key]
        named = " ".join(said).replace("\\", "")
        assert "model.layers.1.mlp.up_proj" in named and "q_proj" not in named
        assert "model.layers.1.mlp.up_proj.weight" in load_file(tmp_path / to / "model.safetensors")


REFUSED: dict[str, tuple[tuple[Any, ...], str, dict[str, Any], str]] = {
    "dense": ((), "gptq", {}, "the model is not quantized, and gptq is for integers of 2, 3, 4 or 8 bits.*quantize it with {kind: rtn"),
    "NF4": ((NF4(),), "awq", {}, "q_proj: its weights are NF4, not integers; awq takes integers of 4 bits.*quantize with {kind: rtn"),
    "3 bits": ((RTN(grid=Grid(bits=3)),), "compressed-tensors", {}, "have 3 bits; compressed-tensors takes integers of 4 or 8 bits"),
    "5 bits": ((RTN(grid=Grid(bits=5)),), "gptq", {}, "have 5 bits; gptq takes"),
    "8 bits": ((RTN(),), "awq", {}, "have 8 bits, and the format has 4 alone; awq takes"),
    "two grids": ((RTN(targets="q_proj"), RTN(grid=W4.grid, targets="o_proj")), "gptq", {}, "q_proj has 8 bits in whole rows, .*o_proj 4 bits in groups of 32, and gptq has one grid"),
    "inputs": ((RTN(activations=Activations()),), "gptq", {}, "rounds its activations, .* use --to compressed-tensors"),
    "inputs, merged": ((RTN(activations=Activations()),), "hf", {}, "rounds its activations, .* use --to compressed-tensors"),
    "inputs by group": ((RTN(activations=Activations(group=32)),), "compressed-tensors", {}, "rounded in a way that compressed-tensors does not have"),
    "bits of bitsandbytes": ((W4,), "bitsandbytes", {}, "4 bits, levels: int, groups of 32.* are neither NF4 .* give --type nf4 or int8"),
    "a type of bitsandbytes": ((), "bitsandbytes", {"type": "nf5"}, "bitsandbytes has no type 'nf5': did you mean 'nf4'"),
    "two types": ((NF4(targets="q_proj"), RTN(targets="o_proj")), "bitsandbytes", {}, "one type; give --type"),
    "rows of bitsandbytes": ((NF4(block=128),), "bitsandbytes", {}, "blocks of 128 run on from one row of 64 to the next"),
    "a type of no format": ((W4,), "gptq", {"type": "Q4_0"}, "--type is for gguf and bitsandbytes; gptq has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_has_no_place_for(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    edits, to, settings, sentence = REFUSED[case]
    with pytest.raises(FettleError, match=sentence) as caught:
        export(opened(tiny_llama, *edits), list(edits), tmp_path / "out", to, **settings)
    assert str(caught.value).startswith("export: ") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed_module.save_folder

    def damaged(made: Any, tensors: Any, *rest: Any) -> None:
        tensors["model.layers.0.mlp.up_proj"]["qweight"][0, 0] ^= 8
        whole(made, tensors, *rest)

    monkeypatch.setattr(packed_module, "save_folder", damaged)
    with pytest.raises(FettleError, match="logits differ by .* nothing was written"):
        export(opened(tiny_llama, W4), [W4], tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())


READERS = {
    "hf": ("fettle.export.hf.auto_class", "transformers"),
    "peft": ("fettle.export.peft.wide_logits", "fettle"),
    "gptq": ("fettle.export.packed.load", "fettle"),
    "compressed-tensors": ("fettle.export.compressed_tensors.auto_class", "transformers with compressed-tensors"),
    "bitsandbytes": ("fettle.export.bitsandbytes.auto_class", "transformers with bitsandbytes"),
}


@pytest.mark.parametrize("to", READERS)
def test_a_reader_that_fails_is_named_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    place, by = READERS[to]

    def fails(*given: Any) -> None:
        raise RuntimeError("no such layer\nand more")

    edits = [W4, LoRA(rank=4)]
    forest = opened(tiny_llama, *edits)
    monkeypatch.setattr(place, fails)
    settings = {"type": "nf4"} if to == "bitsandbytes" else {}
    sentence = rf"out: {by} could not read back what was written \(RuntimeError: no such layer\); nothing was written"
    with pytest.raises(FettleError, match=sentence) as caught:
        export(forest, edits, tmp_path / "out", to, **settings)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_what_is_missing_is_said(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("gguf", "bitsandbytes") else there(name, *a)
    )
    for to in ("gguf", "bitsandbytes"):
        with pytest.raises(FettleError, match=rf"needs {to}; pip install 'fettle\[formats\]'"):
            export(opened(tiny_llama), [], tmp_path / "out", to)


def test_without_their_library_fettle_reads_compressed_tensors(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "compressed_tensors" else there(name, *a)
    )
    assert export(opened(tiny_llama, W4), [W4], tmp_path / "out", "compressed-tensors").checked_with == "fettle"


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "base", "AutoModelForSequenceClassification", hidden_size=32, intermediate_size=64)
    edit = RTN(grid=Grid(bits=4, group=32))
    forest = opened(folder, edit)
    parity = export(forest, [edit], tmp_path / "out", "compressed-tensors")
    assert parity.written_difference <= parity.tolerance
    assert "classifier" in read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]


@pytest.mark.parametrize("to", PACKED)
def test_a_model_that_initializes_the_layers_inside_its_parts(tmp_path: Path, to: str) -> None:
    """As T5 does, whose attention reaches for the weights of q, k and v: its folders are read back, and are bases again."""
    even = to != "compressed-tensors"  # those with zero points transformers dequantizes as it opens them
    edit = RTN(grid=Grid(bits=4, group=16, symmetric=even, scale="float16" if even else "float32"))
    forest = opened(make("t5", tmp_path / "base"), edit)
    parity = export(forest, [edit], tmp_path / "out", to)
    assert parity.written_difference <= parity.tolerance
    again = quantized(opened(tmp_path / "out").model)
    assert again.keys() == quantized(forest.model).keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", PACKED)
def test_stacked_experts_stay_dense_beside_packed_layers(tokenizer: Any, tmp_path: Path, to: str, dtype: str) -> None:
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=3, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    forest = opened(tmp_path / "base", W4, dtype=dtype)
    parity = export(forest, [W4], tmp_path / "out", to)
    assert parity.written_difference <= parity.tolerance
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    )  # as checkpoints of the architecture have them
    assert len(quantized(opened(tmp_path / "out").model)) == 4


def test_every_format_is_known_to_the_command() -> None:
    from typer.testing import CliRunner

    from fettle.cli import app

    text = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "400"}).output
    assert all(name in text for name in FORMATS) and all(kind in text for kind in gguf.TYPES)


def test_an_update_below_the_grid_is_not_written_as_if_it_were_there(tiny_llama: Path, tmp_path: Path) -> None:
    edits = [W4, LoRA(rank=4)]
    forest = opened(tiny_llama, *edits)
    with torch.no_grad():
        for parameter in forest.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.0003)
    with pytest.raises(
        FettleError, match="of the adaptation arrived in weights of so few bits; .* --to hf, .* or --to peft"
    ):
        export(forest, edits, tmp_path / "out", "gptq")
    assert not list(tmp_path.iterdir())
