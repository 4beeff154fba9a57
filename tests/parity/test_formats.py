"""Quantized files against what reads them: transformers with compressed-tensors, bitsandbytes, llama.cpp, and second
dequantizers of GPTQ's and AWQ's layouts, written from their descriptions on bit strings rather than words."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.files import read_json
from fettle.export import export
from fettle.export.gguf_tokenizer import RULES, TEXTS, with_rule
from fettle.export.parity import plain_logits, probes, widened
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import EMBEDDED, ModelSpec
from fettle.peft import BitFit, NewTokens
from fettle.peft.new_tokens import rows_of
from fettle.quantize import NF4, RTN, Activations, Grid, LLMInt8
from fettle.quantize.activations import rounded
from fettle.quantize.layouts import affine_of, compressed, gptq
from fettle.quantize.linear import quantized
from fettle.quantize.packed import quantize
from fettle.stages.artifact import apply_edits

Row = np.ndarray[Any, Any]


def opened(folder: Path | str, *edits: Any, dtype: str = "float32") -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype=dtype))  # type: ignore[arg-type]
    return apply_edits(forest, edits)


def written(forest: Forest, edits: list[Any], folder: Path, to: str, **settings: Any) -> dict[str, Tensor]:
    export(forest, edits, folder, to, **settings)
    return load_file(folder / "model.safetensors")


# GPTQ and AWQ: second dequantizers.


def bit_string(words: Row, bits: int) -> Row:
    """int32 [R, W] -> the numbers of `bits` bits that stand in each row, one after the other from the lowest bit on."""
    every = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    every = every[:, : every.shape[1] // bits * bits].reshape(len(words), -1, bits)
    return (every * (1 << np.arange(bits))).sum(-1)


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int, version: int) -> Row:
    """[N, K] in float64, as GPTQ's format says."""
    part = {end: tensors[f"{name}.{end}"].numpy() for end in ("qweight", "qzeros", "scales", "g_idx")}
    codes = bit_string(part["qweight"].T, bits)
    zeros = bit_string(part["qzeros"], bits)[:, : part["scales"].shape[1]] + (1 if version == 1 else 0)
    return np.stack([  # a column of inputs at a time, each with the group that g_idx gives it
        part["scales"][g].astype(np.float64) * (codes[:, k] - zeros[g]) for k, g in enumerate(part["g_idx"])
    ], 1)  # fmt: skip


def awq_weight(tensors: dict[str, Tensor], name: str) -> Row:
    """[N, K] in float64: nibble i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight."""
    part = {end: tensors[f"{name}.{end}"].numpy() for end in ("qweight", "qzeros", "scales")}

    def columns(words: Row) -> Row:
        out = np.zeros((len(words), 8 * words.shape[1]), np.int64)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, column::8] = (words.astype(np.int64) >> (4 * i)) & 15
        return out

    codes, zeros, scales = columns(part["qweight"]), columns(part["qzeros"]), part["scales"].astype(np.float64)
    group = np.arange(len(codes)) // (len(codes) // len(scales))
    return (scales[group] * (codes - zeros[group])).T


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq(tiny_llama: Path, tmp_path: Path, bits: int, symmetric: bool, version: int) -> None:
    edit = RTN(grid=Grid(bits=bits, group=32, symmetric=symmetric, scale="float16"))
    forest = opened(tiny_llama, edit)
    tensors = written(forest, [edit], tmp_path / "out", "gptq" if version == 1 else "gptq-v2")
    for name, layer in quantized(forest.model).items():
        wanted = layer.packed.values().double().numpy()
        assert np.allclose(gptq_weight(tensors, name, bits, version), wanted, rtol=1e-6, atol=0)
        assert not np.allclose(gptq_weight(tensors, name, bits, 3 - version), wanted, rtol=1e-2, atol=0)
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (said["bits"], said["group_size"], said["sym"], said["desc_act"]) == (bits, 32, symmetric, False)
    assert said["checkpoint_format"] == ("gptq" if version == 1 else "gptq_v2")


@pytest.mark.parametrize("group", [32, "row"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(tiny_llama: Path, tmp_path: Path, symmetric: bool, group: int | str) -> None:
    edit = RTN(grid=Grid(bits=4, group=group, symmetric=symmetric, scale="float16"))
    forest = opened(tiny_llama, edit)
    tensors = written(forest, [edit], tmp_path / "out", "awq")
    for name, layer in quantized(forest.model).items():
        assert np.allclose(awq_weight(tensors, name), layer.packed.values().double().numpy(), rtol=1e-6, atol=0)
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert said["group_size"] == (32 if group == 32 else -1) and said["modules_to_not_convert"] == ["lm_head"]


def test_a_word_of_gptq_by_hand() -> None:
    """Codes 1..8 of one output: 0x87654321; zeros 8 of eight outputs: 0x77777777 in version 1, 0x88888888 in version 2."""
    weight = quantize(torch.arange(-7.0, 1).expand(8, 8) + 0.0, Grid(bits=4))
    codes = torch.arange(1, 9, dtype=torch.uint8).expand(8, 8).contiguous()
    affine = affine_of(weight)
    tensors = {v: gptq(type(affine)(codes, affine.scale, None, 4), v) for v in (1, 2)}
    assert tensors[1]["qweight"][0, 0].item() & 0xFFFFFFFF == 0x87654321
    assert [tensors[v]["qzeros"][0, 0].item() & 0xFFFFFFFF for v in (1, 2)] == [0x77777777, 0x88888888]


# compressed-tensors.


@contextmanager
def silent() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def read_compressed(folder: Path, **settings: Any) -> nn.Module:
    pytest.importorskip("compressed_tensors")
    with silent():
        return AutoModelForCausalLM.from_pretrained(folder, **settings)


CASES = {
    "4 bits": [RTN(grid=Grid(bits=4, group=32))],
    "8 bits a row": [RTN(grid=Grid(bits=8))],
    "W8A8 by token": [RTN(grid=Grid(bits=8), activations=Activations())],
    "W4A8 by tensor": [RTN(grid=Grid(bits=4, group=32), activations=Activations(group="tensor"))],
    "two grids": [RTN(grid=Grid(bits=4, group=32), targets=("q_proj", "o_proj")), RTN(targets=("up_proj",))],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_what_was_written(tiny_llama: Path, tmp_path: Path, case: str, dtype: str) -> None:
    edits = CASES[case]
    forest = opened(tiny_llama, *edits, dtype=dtype)
    export(forest, edits, tmp_path / "out", "compressed-tensors")
    assert read_json(tmp_path / "out" / "manifest.json")["parity"]["checked_with"].startswith("transformers")
    theirs = read_compressed(tmp_path / "out", dtype=torch.float32)
    ours = load(ModelSpec(path=str(tmp_path / "out"), dtype="float32"))
    rows = probes(len(forest.tokenizer), 48)
    for layer in quantized(ours.model).values():
        layer.fits = frozenset()  # theirs has no integer kernel
    assert far(plain_logits(theirs, rows), plain_logits(ours.model, rows)) < 1e-5
    if dtype == "float32":
        with widened(forest.model):
            for layer in quantized(forest.model).values():
                layer.fits = frozenset()
            assert far(plain_logits(theirs, rows), plain_logits(forest.model, rows)) < 1e-5


def test_uneven_inputs_are_rounded_as_their_library_rounds_them() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    args = quantization.QuantizationArgs(num_bits=8, symmetric=False, strategy="token", dynamic=True)
    scale, zero = forward.compute_dynamic_scales_and_zp(x, args, nn.Module())[:2]
    assert torch.equal(forward.fake_quantize(x, scale, zero, args), rounded(x, Activations(symmetric=False)))


def test_zero_points_are_where_their_library_looks_for_them(tiny_llama: Path, tmp_path: Path) -> None:
    edit = RTN(grid=Grid(bits=4, group=32, symmetric=False))
    forest = opened(tiny_llama, edit)
    tensors = written(forest, [edit], tmp_path / "out", "compressed-tensors")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    said = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**said["weights"])
    )
    theirs = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for name, layer in quantized(forest.model).items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert torch.equal(theirs.decompress(own, scheme)["weight"], layer.packed.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_are_packed_as_their_library_packs_them(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = affine_of(
        quantize(torch.randn(16, 80, generator=torch.Generator().manual_seed(bits)), Grid(bits=bits, group=16))
    )
    theirs = helpers.pack_to_int32((weight.codes.short() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(compressed(weight)["weight_packed"], theirs)


# bitsandbytes.


@pytest.fixture(scope="module")
def bnb() -> Any:
    with silent():
        return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("edit", [NF4(), NF4(double=False), RTN(grid=Grid(bits=8, narrow=True)), RTN(), LLMInt8()])
def test_bitsandbytes_holds_the_same_weights(bnb: Any, tiny_llama: Path, tmp_path: Path, edit: Any) -> None:
    forest = opened(tiny_llama, edit)
    parity = export(forest, [edit], tmp_path / "out", "bitsandbytes")
    assert parity.checked_with == "bitsandbytes" and parity.largest_difference < 1e-4
    with silent():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    for name, layer in quantized(forest.model).items():
        held = theirs.get_submodule(name)
        if isinstance(held, bnb.nn.Linear4bit):
            found = bnb.functional.dequantize_4bit(held.weight.data, held.weight.quant_state)
            assert torch.equal(held.weight.data.view(-1), layer.packed.codes)
        else:
            found = held.weight.data.float() * held.weight.SCB[:, None] / 127
        assert torch.allclose(found, layer.packed.values(), rtol=1e-5, atol=1e-9)
    if isinstance(edit, LLMInt8):
        rows = probes(len(forest.tokenizer), 48)
        effect = far(plain_logits(theirs, rows), plain_logits(opened(tiny_llama).model, rows))
        assert far(plain_logits(theirs, rows), plain_logits(forest.model, rows)) < effect


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_dense_model_is_rounded_as_bitsandbytes_rounds_it(
    bnb: Any, tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    forest = opened(tiny_llama)
    tensors = written(forest, [], tmp_path / "out", "bitsandbytes", type=kind)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = forest.model.get_submodule(name).weight.detach()
        if kind == "nf4":
            theirs = bnb.functional.quantize_4bit(weight, quant_type="nf4")[0].view(-1)
            assert torch.equal(tensors[f"{name}.weight"].view(-1), theirs)
        else:
            codes = (weight * 127 / weight.abs().amax(1, keepdim=True)).round().to(torch.int8)
            assert (tensors[f"{name}.weight"].short() - codes.short()).abs().max() <= 1  # a tie
            assert torch.allclose(tensors[f"{name}.SCB"], weight.abs().amax(1))


# GGUF, by llama.cpp.

TEXT = [int(i) for i in np.random.default_rng(3).integers(4, 300, 40)]
STEPS = 12


def server(folder: Path) -> Any:
    """llama.cpp over the file in a folder, in float32 where it has the choice."""
    cpp = pytest.importorskip("xllamacpp")
    params = cpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return cpp.Server(params)


def theirs(folder: Path, vocabulary: int) -> Tensor:
    """llama.cpp's log-probabilities [n, V] of what follows each of the last n tokens of TEXT.

    It is told to write an 'a', as it keeps back what is no whole letter yet; the log-probabilities are those before that.
    """
    cpp = server(folder)
    logps = torch.full((STEPS, vocabulary), torch.nan)
    for i in range(STEPS):
        asked = {
            "prompt": TEXT[: len(TEXT) - STEPS + i + 1], "max_tokens": 1, "temperature": 0, "n_probs": vocabulary,
            "post_sampling_probs": False, "logit_bias": [["a", 1000.0]],
        }  # fmt: skip
        (step,) = cpp.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        for entry in step["top_logprobs"]:
            logps[i, entry["id"]] = entry["logprob"]
    return logps


@torch.no_grad()
def ours(model: nn.Module, inputs: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The same of a model in float32, whose linear layers see `inputs(x)` in place of x."""
    hooks = []
    if inputs is not None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(lambda _, given: (inputs(given[0]),)))
    try:
        logits = model(input_ids=torch.tensor([TEXT])).logits[0, -STEPS:]
    finally:
        for hook in hooks:
            hook.remove()
    return logits.float().log_softmax(-1)


def q8(x: Tensor) -> Tensor:
    """x rounded as llama.cpp rounds it before a product with quantized weights: 8 bits, blocks of 32, scales in float16."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-38)
    return ((blocks / scale).round() * scale.half().float()).reshape(x.shape)


def random_model(folder: Path, kind: str, tokenizer: Any, **settings: Any) -> Path:
    """A folder with a random model whose answers are decided: its weights are large."""
    usual = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "gpt2":
        usual = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **(usual | ids | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms that are no identity
            if parameter.ndim == 1:
                parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied, wide heads, biases": ("llama", {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True}),
    "llama 3's positions": ("llama", {"rope_parameters": LLAMA3}),
    "linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gpt2": ("gpt2", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(tokenizer: Any, tmp_path: Path, name: str) -> None:
    kind, settings = MODELS[name]
    folder = random_model(tmp_path / "model", kind, tokenizer, **settings)
    forest = opened(folder)
    export(forest, [], tmp_path / "out", "gguf")
    logps, wanted = theirs(tmp_path / "out", len(tokenizer)), ours(forest.model)
    assert torch.equal(logps.argmax(-1), wanted.argmax(-1)) and len(set(wanted.argmax(-1).tolist())) > 1
    allowed = 1e-3 if kind == "gpt2" else 1e-4  # llama.cpp looks GELU up in a table of float16
    assert far(logps, wanted) < allowed * float(wanted.abs().max())


@pytest.mark.parametrize("edit", [NewTokens(tokens=tuple(f"<{i}>" for i in range(40))), BitFit()], ids=lambda e: e.kind)
def test_llama_cpp_computes_what_was_added_to_a_model(tokenizer: Any, tmp_path: Path, edit: Any) -> None:
    """More words than the base has rows for, and biases where it has none."""
    forest = opened(random_model(tmp_path / "model", "llama", tokenizer, tie_word_embeddings=True), edit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for tensor in edit.tensors(forest.model).values():
            tensor.normal_(std=0.2)
    export(forest, [edit], tmp_path / "out", "gguf")
    logps, wanted = theirs(tmp_path / "out", rows_of(forest.model.get_input_embeddings())), ours(forest.model)
    assert torch.equal(logps.argmax(-1), wanted.argmax(-1))
    assert far(logps, wanted) < 1e-4 * float(wanted.abs().max())


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "F16": lambda x: x.half().float(), "BF16": lambda x: x.bfloat16().float(), "Q8_0": q8, "Q4_0": q8, "Q5_0": q8, "Q4_1": q8, "Q5_1": q8,
}  # fmt: skip


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_every_type(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Its logits are those of the file's weights but for the rounding of inputs, which it does too: with that they are nearer."""
    folder = random_model(tmp_path / "model", "llama", tokenizer, tie_word_embeddings=False)
    forest = opened(folder)
    export(forest, [], tmp_path / "out", "gguf", type=kind)
    logps, read = theirs(tmp_path / "out", len(tokenizer)), from_gguf(tmp_path / "out")
    exact, near = ours(read), ours(read, KINDS[kind])
    nearer(logps, exact, near, kind)
    if kind.startswith(("Q4", "Q5")):
        assert rms(logps - exact) < 0.5 * rms(exact - ours(forest.model))


def nearer(logps: Tensor, exact: Tensor, near: Tensor, kind: str) -> None:
    """With the rounding of its inputs; types with a least value keep the sums of inputs in float16 besides."""
    assert rms(logps - near) < (1.0 if kind.endswith("_1") else 0.6) * rms(exact - near)
    assert rms(logps - exact) < 1.5 * rms(exact - near)


def from_gguf(folder: Path) -> nn.Module:
    from transformers import GgufConfig

    with silent():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=next(folder.glob("*.gguf")).name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )


PACKED = {
    "Q4_0": Grid(bits=4, group=32, scale="float16"), "Q4_1": Grid(bits=4, group=32, symmetric=False, scale="float16"),
    "Q5_0": Grid(bits=5, group=32, scale="float16"), "Q5_1": Grid(bits=5, group=32, symmetric=False, scale="float16"),
    "Q8_0": Grid(bits=8, scale="float16"), "Q4_0 of 3 bits": Grid(bits=3, group=32, scale="float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_llama_cpp_reads_packed_weights_as_they_are(tokenizer: Any, tmp_path: Path, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    folder = random_model(tmp_path / "model", "llama", tokenizer, tie_word_embeddings=False)
    edit = RTN(grid=PACKED[name])
    forest = opened(folder, edit)
    parity = export(forest, [edit], tmp_path / "out", "gguf")
    kind = name.split()[0]
    assert parity.dtype == kind and (not PACKED[name].symmetric or parity.largest_difference < 1e-3)
    held = {t.name: t for t in gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors}
    layer = quantized(forest.model)["model.layers.1.mlp.down_proj"].packed
    found = gguf.dequantize(held["blk.1.ffn_down.weight"].data, held["blk.1.ffn_down.weight"].tensor_type)
    assert held["blk.1.ffn_down.weight"].tensor_type.name == kind
    step = float(layer.scale.float().max()) if isinstance(layer.scale, Tensor) else 0.0
    assert far(torch.from_numpy(np.array(found)), layer.values()) <= (0 if layer.grid.symmetric else 2**-7 * step)
    logps, dense = theirs(tmp_path / "out", len(tokenizer)), as_dense(forest)
    exact, near = ours(dense), ours(dense, q8)
    nearer(logps, exact, near, kind)


def as_dense(forest: Forest) -> nn.Module:
    """The model with plain layers, in place."""
    for name, layer in quantized(forest.model).items():
        parent, _, last = name.rpartition(".")
        setattr(forest.model.get_submodule(parent), last, layer.dense())
    return forest.model


def test_the_embedded_model_talks_in_llama_cpp(tmp_path: Path) -> None:
    """The same greedy text in float16, through the chat template inside the file; tokens as here; weights packed as they were."""
    forest = opened(EMBEDDED)
    export(forest, [], tmp_path / "out", "gguf", type="F16")
    talk = [{"role": "user", "content": "Where does Ada live?"}]
    cpp = server(tmp_path / "out")
    said = cpp.handle_chat_completions({"messages": talk, "max_tokens": 20, "temperature": 0})
    prompt = forest.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert said["usage"]["prompt_tokens"] == len(prompt)
    wanted = forest.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=1)
    text = forest.tokenizer.decode(wanted[0, len(prompt) :], skip_special_tokens=True)
    assert said["choices"][0]["message"]["content"] == text and len(text) > 20
    for content in ("Ada's house isn't 12,345 km away; é, 你好!", '  two\n\nlines\tand "quotes"'):
        found = post(cpp.listening_address + "/tokenize", {"content": content, "add_special": False})["tokens"]
        assert found == forest.tokenizer(content, add_special_tokens=False).input_ids


def post(address: str, body: dict[str, Any]) -> Any:
    import json
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with opener.open(request) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_cuts_as_llama_cpp_cuts(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """The patterns that stand here for a rule of llama.cpp's, against its own code, on the texts that tell rules apart."""
    made = copy.deepcopy(tokenizer)
    made._tokenizer = with_rule(tokenizer.backend_tokenizer, name)
    folder = random_model(tmp_path / "model", "llama", made)
    forest = opened(folder)
    export(forest, [], tmp_path / "out", "gguf")
    said = read_json(tmp_path / "out" / "manifest.json")["tokenizer"]
    assert said["other_tokens_for"] == []
    cpp = server(tmp_path / "out")
    for text in TEXTS:
        found = post(cpp.listening_address + "/tokenize", {"content": text, "add_special": False})["tokens"]
        assert found == made(text, add_special_tokens=False).input_ids, text
