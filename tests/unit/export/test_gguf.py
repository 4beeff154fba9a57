"""GGUF: blocks, names, tokenizers and templates; llama.cpp itself reads it in tests/parity/test_formats.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils.chat_template_utils import render_jinja_template

from fettle.core import FettleError
from fettle.core.files import read_json
from fettle.data.templates import CHATML, PLAIN
from fettle.export import export
from fettle.export.gguf_blocks import TYPES, blocks, fitting, rounded
from fettle.export.gguf_model import architecture, rope_factors, sizes
from fettle.export.gguf_tokenizer import CONTROL, NORMAL, TEXTS, UNUSED, plain, rule, vocabulary, with_rule
from fettle.models.forest import Forest
from fettle.models.load import folder_of, load
from fettle.models.spec import EMBEDDED, ModelSpec
from fettle.peft import BitFit, LoRA
from fettle.quantize import NF4, RTN, Grid
from fettle.quantize.layouts import affine_of
from fettle.quantize.packed import quantize
from fettle.stages.artifact import apply_edits
from small import make

gguf: Any = pytest.importorskip("gguf")


def opened(folder: Path | str, *edits: Any) -> Forest:
    return apply_edits(load(ModelSpec(path=str(folder), dtype="float32")), edits)


def read(folder: Path) -> Any:
    return gguf.GGUFReader(next(folder.glob("*.gguf")))


# Blocks.


@pytest.mark.parametrize("group", [32, 64, "row", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packed_weights_are_the_same_numbers_in_blocks(bits: int, symmetric: bool, group: int | str) -> None:
    there = quantize(torch.randn(6, 128), Grid(bits=bits, symmetric=symmetric, group=group, scale="float16"))
    weight = affine_of(there)
    if bits == 8 and not symmetric:
        with pytest.raises(FettleError, match="8 bits, not symmetric, which no type of GGUF holds"):
            fitting(weight)
        return
    kind = fitting(weight)
    expected = {2: "Q4", 3: "Q4", 4: "Q4", 5: "Q5", 8: "Q8"}[bits] + ("_0" if symmetric else "_1")
    data, values = blocks(weight, kind)
    theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert kind == expected and np.array_equal(theirs, values.numpy())
    step = float(weight.scale.float().max())
    assert torch.allclose(values, there.values(), rtol=0, atol=0 if symmetric else 2**-11 * step * 2**bits)


@pytest.mark.parametrize("kind", TYPES)
def test_dense_weights_are_rounded_by_the_type(kind: str) -> None:
    x = torch.randn(5, 64)
    data, values = rounded(x, kind)
    assert np.array_equal(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), values.numpy())
    bound = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q5_0": 0.15, "Q5_1": 0.15, "Q4_0": 0.3, "Q4_1": 0.3}[
        kind
    ]
    assert float((values - x).abs().max()) <= bound * 1.3


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(FettleError, match="groups of 16 are no multiple of 32"):
        fitting(affine_of(quantize(torch.randn(4, 64), Grid(bits=4, group=16))))
    with pytest.raises(FettleError, match="have 5 bits, symmetric, which Q4_0 holds as they are"):
        fitting(affine_of(quantize(torch.randn(4, 64), Grid(bits=5))), "Q4_0")
    with pytest.raises(FettleError, match="rows of 48 are no multiple of 32, the block of Q8_0; use --type F16"):
        rounded(torch.randn(4, 48), "Q8_0")
    with pytest.raises(FettleError, match="beyond the range of F16; use --type BF16 or F32"):
        rounded(torch.full((2, 32), 1e6), "F16")


# Files.


def test_what_stands_in_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    export(forest, [], tmp_path / "out", "gguf", type="Q4_0")
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.name == f"{tiny_llama.name}-Q4_0.gguf"
    held = read(tmp_path / "out")
    kinds = {t.name: t.tensor_type.name for t in held.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0" and kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_norm.weight"] == "F32" and len(kinds) == 3 + 2 * 9
    value = {name: field.contents() for name, field in held.fields.items()}
    assert value["general.architecture"] == "llama" and value["llama.attention.head_count_kv"] == 2
    assert value["llama.context_length"] == 512 and value["llama.rope.freq_base"] == 10000.0
    assert value["tokenizer.ggml.eos_token_id"] == value["tokenizer.ggml.eot_token_id"] == forest.tokenizer.eos_token_id
    assert value["tokenizer.chat_template"] == plain(forest.tokenizer.chat_template)
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert sum(manifest["types"].values()) == sum(p.numel() for p in forest.model.parameters())
    assert manifest["tokenizer"] == {"rule": "gpt-2", "other_tokens_for": []}


def test_a_tuned_model_is_merged_and_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    edit = LoRA(rank=4)
    forest = opened(tiny_llama, edit)
    with torch.no_grad():
        for parameter in forest.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    parity = export(forest, [edit], tmp_path / "out", "gguf", type="Q8_0")
    assert parity.effect_kept == pytest.approx(1, abs=0.05) and parity.dtype == "Q8_0"


def test_biases_that_were_not_there_are_read_back(tiny_llama: Path, tmp_path: Path) -> None:
    """The merged model's configuration counts: the base's has no biases."""
    edit = BitFit()
    forest = opened(tiny_llama, edit)
    for tensor in edit.tensors(forest.model).values():
        tensor.normal_(std=0.2)
    assert export(forest, [edit], tmp_path / "out", "gguf").written_difference < 1e-5
    assert "blk.0.ffn_up.bias" in {t.name for t in read(tmp_path / "out").tensors}


def test_a_sum_is_rounded_once_and_by_the_type_that_was_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    """Where a LoRA lies around packed weights: to the layer's grid, or with a type by that type's own rule, much finer here."""
    edits = [RTN(grid=Grid(bits=4, group=32, scale="float16")), LoRA(rank=4)]
    forest = opened(tiny_llama, *edits)
    with torch.no_grad():
        for parameter in forest.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    coarse = export(forest, edits, tmp_path / "grid", "gguf")
    fine = export(forest, edits, tmp_path / "type", "gguf", type="Q8_0")
    assert coarse.dtype == "Q4_0" and fine.dtype == "Q8_0" and 5 * fine.mean_difference < coarse.mean_difference
    assert "requantizing" in read_json(tmp_path / "grid" / "manifest.json")
    assert "requantizing" not in read_json(tmp_path / "type" / "manifest.json")


def test_packed_layers_that_have_another_type_are_rounded_only_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FettleError, match="its weights are NF4, not integers; give --type .* or quantize with {kind: rtn"
    ):
        export(opened(tiny_llama, NF4()), [NF4()], tmp_path / "out", "gguf")
    assert export(opened(tiny_llama, NF4()), [NF4()], tmp_path / "f", "gguf", type="F32").largest_difference < 1e-5
    export(opened(tiny_llama, NF4()), [NF4()], tmp_path / "q", "gguf", type="Q4_0")
    mixed = [RTN(grid=Grid(bits=4, group=32, scale="float16"), targets="q_proj"), NF4(targets="o_proj")]
    forest = opened(tiny_llama, *mixed)
    export(forest, mixed, tmp_path / "m", "gguf", type="Q4_0")
    held = {t.name: t for t in read(tmp_path / "m").tensors}
    found = gguf.dequantize(held["blk.0.attn_v.weight"].data, held["blk.0.attn_v.weight"].tensor_type)
    assert held["blk.0.attn_q.weight"].tensor_type.name == "Q4_0" and found.shape == (32, 64)


def test_a_type_that_there_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="GGUF has no type 'Q4_K': did you mean 'Q4_"):
        export(opened(tiny_llama), [], tmp_path / "out", "gguf", type="Q4_K")
    with pytest.raises(FettleError, match="a GGUF file has types of its own; use --type"):
        export(opened(tiny_llama), [], tmp_path / "out", "gguf", "float32")
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "opt": ("opt", {}, "GGUF can be written for llama, mistral, qwen2, qwen3, gpt2; this model is 'opt'; use --to hf"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the activation is 'gelu', which llama.cpp's llama does not compute"),
    "windows": ("mistral", {"sliding_window": 8}, "attention is in windows"),
    "qwen's windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "attention is in windows"),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "positions are scaled by 'yarn'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_llama_cpp_would_compute_otherwise(case: str) -> None:
    kind, settings, sentence = REFUSED[case]
    config = AutoConfig.for_model(kind, **settings)
    with pytest.raises(FettleError, match=sentence):
        architecture(config), sizes(config)


def test_llama_3_divides_its_slow_frequencies() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = rope_factors(AutoConfig.for_model("llama", rope_parameters=rope, head_dim=128))
    assert factors is not None and factors[0] == 1 and factors[-1] == 8 and bool((factors.diff() >= 0).all())
    assert rope_factors(AutoConfig.for_model("llama")) is None


def test_gpt2_has_its_own_names(tokenizer: Any, tmp_path: Path) -> None:
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=64, **ids)
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    edit = RTN(grid=Grid(bits=8, scale="float16"))
    parity = export(opened(tmp_path / "base", edit), [edit], tmp_path / "out", "gguf")
    names = {t.name for t in read(tmp_path / "out").tensors}
    assert {"position_embd.weight", "blk.0.attn_qkv.bias", "output_norm.bias"} <= names and "output.weight" not in names
    assert parity.largest_difference < 1e-4


# Tokenizers.


def test_the_embedded_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of(EMBEDDED))
    found = vocabulary(tokenizer, 4100)
    assert found.pre == "qwen2" and len(found.differs) <= 1 and not found.adds_start
    assert found.ids == {"bos": 0, "eos": 0, "padding": 1, "eot": 3}
    assert found.kinds[:5] == [CONTROL] * 4 + [NORMAL] and found.kinds[4096:] == [UNUSED] * 4
    assert found.tokens[2] == "<|im_start|>" and found.tokens[4099] == "[PAD4099]"
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-2", "gpt-4o"])
def test_a_rule_is_found_by_what_it_does(tokenizer: Any, name: str) -> None:
    """With a vocabulary that merges across every cut, only the rule itself gives the same tokens everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    greedy = Tokenizer(models.BPE())
    greedy.pre_tokenizer = with_rule(tokenizer.backend_tokenizer, name).pre_tokenizer
    greedy.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    greedy.train_from_iterator(TEXTS, trainer)
    greedy.model.ignore_merges = name == "llama-bpe"
    assert rule(greedy) == (name, [])


def test_a_rule_that_llama_cpp_does_not_have() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    odd = Tokenizer(models.BPE())
    odd.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # whole texts
    odd.train_from_iterator(
        [text for text in TEXTS for _ in range(3)],
        trainers.BpeTrainer(vocab_size=4000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    with pytest.raises(FettleError, match="no rule that cuts texts as this tokenizer does; the nearest, "):
        rule(odd)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_tokenizers_of_other_kinds(tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make(kind, tmp_path / kind))
    with pytest.raises(
        FettleError, match="the tokenizer is '(WordPiece|Unigram)', and GGUF is written here with byte-level BPE"
    ):
        vocabulary(tokenizer, 10)


@pytest.mark.parametrize("template", [CHATML, PLAIN, "{%generation%}x{% endgeneration -%}  y"])
def test_a_template_without_its_marks_says_the_same(template: str) -> None:
    talk = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    made = plain(template)
    assert "generation" not in made.replace("add_generation_prompt", "")
    said = {"messages": talk, "add_generation_prompt": True, "eos_token": "</s>", "bos_token": "<s>", "tools": None}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    wanted, _ = render_jinja_template(
        [talk], chat_template=template, add_generation_prompt=True, eos_token="</s>", bos_token="<s>"
    )
    assert environment.from_string(made).render(**said) == wanted[0]
