"""Quantized layers in models: what they compute, hold, refuse, and how edits compose over them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.export import export_hf
from fettle.models.blocks import blocks
from fettle.models.load import load
from fettle.models.memory import predict, weight_bytes, worst_batch
from fettle.models.spec import ModelSpec
from fettle.models.weight import count_weights, in_out, is_linear, is_quantized, read_weight, write_weight
from fettle.objectives import SFT
from fettle.peft import LoRA
from fettle.peft.lora import LoRALinear
from fettle.quantize import NF4, RTN, Grid, LoftQ
from fettle.quantize.linear import QuantizedLinear, describe, quantized, requantizing
from fettle.stages.adapters import open_adapters
from fettle.stages.artifact import apply_edits, open_artifact, open_model, save_artifact

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 64,
    },
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
        "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0,
    },
    "qwen3_moe": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64,
    },
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
}  # fmt: skip
EDITS = [
    NF4(),
    NF4(double=False, block=32),
    RTN(),
    RTN(grid=Grid(bits=4, group=16, symmetric=False)),
    RTN(grid=Grid(bits=3)),
]
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        dtype = torch.float32  # torch's grouped products of experts know nothing wider
    if kind == "t5":
        model: nn.Module = T5ForConditionalGeneration(T5Config(**CONFIGS[kind]))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
    return model.to(dtype).eval().requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, **({"labels": TOKENS} if hasattr(model, "encoder") else {})).logits


def disturb(model: nn.Module, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def same(x: Tensor, y: Tensor, kind: str) -> bool:
    """Bit for bit; of a Conv1D, which lies transposed and is summed in another order, but for the last bits."""
    close = 1e-5 if x.dtype == torch.float32 else 1e-12
    return torch.allclose(x, y, rtol=close, atol=close * float(y.abs().max())) if kind == "gpt2" else torch.equal(x, y)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_every_architecture_computes_as_its_dense_twin(kind: str, edit: NF4 | RTN) -> None:
    model = build(kind)
    plain = {n: type(m) for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    before, names = logits(model), [n for n, _ in model.named_parameters()]
    edit.apply(model)
    layers = quantized(model, edit)
    assert layers and not any(p.requires_grad for p in model.parameters())
    assert all(is_linear(m) and is_quantized(m) and in_out(m) == m.dequantized().shape[::-1] for m in layers.values())
    found = logits(model)
    assert 0 < (found - before).abs().max()
    twin = copy.deepcopy(model)
    edit.merge(twin)
    assert not quantized(twin) and sorted(n for n, _ in twin.named_parameters()) == sorted(names)
    assert {n: type(m) for n, m in twin.named_modules() if type(m) in (nn.Linear, Conv1D)} == plain
    assert same(logits(twin), found, kind)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_lora_over_it_are_those_over_its_dense_twin(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype)
    NF4().apply(model)
    twin = copy.deepcopy(model)
    NF4().merge(twin)
    gradients = []
    for one in (model, twin):
        torch.manual_seed(3)
        LoRA(rank=4).apply(one)
        disturb(one)
        logits(one).square().sum().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, grad in gradients[0].items():
        assert grad is not None and same(grad, gradients[1][name], kind), name


@pytest.mark.parametrize("shape", [(1, 3, 48), (5, 48), (48,)])
@pytest.mark.parametrize("base", [nn.Linear(48, 32), nn.Linear(48, 32, bias=False), Conv1D(32, 48)], ids=["linear", "bare", "conv1d"])  # fmt: skip
def test_a_layer_alone(base: nn.Module, shape: tuple[int, ...]) -> None:
    base = copy.deepcopy(base).double()
    edit = NF4()
    layer = QuantizedLinear(base, edit.quantize(read_weight(base)), edit)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = layer.dequantized()
    assert weight.dtype == torch.float64 and layer.weight.shape == base.weight.shape
    wanted = nn.functional.linear(x, weight, base.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-13)
    up = torch.randn_like(wanted)
    inputs = (x,) if base.bias is None else (x, base.bias)
    for one, two in zip(
        torch.autograd.grad(wanted, inputs, up), torch.autograd.grad(layer(x), inputs, up), strict=True
    ):
        assert torch.allclose(one, two, atol=1e-13)


def test_the_backward_pass_keeps_no_dense_weight() -> None:
    base = nn.Linear(256, 256, bias=False).requires_grad_(False)
    layer = QuantizedLinear(base, NF4().quantize(base.weight), NF4())
    x = torch.randn(4, 256, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not saved


def test_scales_keep_their_type_when_the_model_changes_its_own() -> None:
    model = build("llama", torch.float32)
    NF4().apply(model)
    layer = next(iter(quantized(model).values()))
    before = layer.dequantized()
    model.to(torch.bfloat16)
    assert layer.dequantized().dtype == torch.bfloat16 and layer.packed.scale.scale.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(layer.dequantized(), before.bfloat16())
    assert logits(model).dtype == torch.bfloat16


def test_a_large_layer_takes_4_127_bits_a_weight_and_the_plan_counts_them() -> None:
    base = nn.Linear(1024, 1024, bias=False)
    layer = QuantizedLinear(base, NF4().quantize(base.weight), NF4())
    assert layer.packed.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20)
    assert weight_bytes(layer) * 8 == layer.packed.bits * 2**20


def test_what_is_left_alone_is_listed() -> None:
    model = build("qwen3_moe")
    weights = count_weights(model)
    NF4().apply(model)
    found = describe(model)
    assert set(found["left_dense"]) == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.#.mlp.gate.weight",
        "model.layers.#.mlp.experts.gate_up_proj", "model.layers.#.mlp.experts.down_proj",
    }  # fmt: skip
    assert found["layers"] == 8 and count_weights(model) == weights


@pytest.mark.parametrize("first", [NF4(), RTN(grid=Grid(bits=4, group=16))], ids=str)
def test_merging_in_the_order_of_the_list_is_exact_and_the_price_of_rounding_again_is_told(first: NF4 | RTN) -> None:
    model, edit = build("llama"), LoRA(rank=4)
    first.apply(model)
    edit.apply(model)
    disturb(model)
    tuned, merged = logits(model), copy.deepcopy(model)
    with pytest.raises(FettleError, match="takes no new weight"):
        edit.merge(copy.deepcopy(model))
    for one in (first, edit):
        one.merge(merged)
    assert not [m for m in merged.modules() if isinstance(m, (QuantizedLinear, LoRALinear))]
    assert torch.allclose(logits(merged), tuned, atol=1e-6)
    cost = requantizing(model, merged)
    assert cost["layers"] == 14 and 0.02 < cost["mean_error"] <= cost["worst_error"] < 0.3 and cost["mean_update"] > 0.1
    assert cost["worst_layer"] in dict(merged.named_modules())
    assert requantizing(merged, merged) == {}


def test_the_structure_of_the_blocks_is_still_seen() -> None:
    model, plain = build("llama"), build("llama")
    NF4().apply(model)
    assert blocks(model) == blocks(plain)


def test_refusals_are_sentences() -> None:
    model = build("llama")
    with pytest.raises(FettleError, match="rtn: model.layers.0.self_attn.q_proj: group: 7 does not divide rows of 32"):
        RTN(grid=Grid(group=7)).apply(model)
    NF4(targets="q_proj").apply(model)
    with pytest.raises(FettleError, match="q_proj quantized already"):
        RTN().apply(model)
    with pytest.raises(FettleError, match="takes no new weight"):
        write_weight(next(iter(quantized(model).values())), torch.zeros(32, 32))
    LoRA(rank=2, targets="v_proj").apply(model)
    with pytest.raises(FettleError, match="put nf4 before it"):
        NF4(targets="v_proj").apply(model)
    broken = build("llama")
    broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FettleError, match="up_proj: quantize: values that are not finite"):
        NF4().apply(broken)


def test_two_quantizers_share_a_model_by_targets() -> None:
    model = build("llama")
    RTN(targets="mlp.down_proj").apply(model)
    NF4(targets=("q_proj", "k_proj")).apply(model)
    assert (
        len(quantized(model, RTN(targets="mlp.down_proj"))) == 2
        and len(quantized(model, NF4(targets=("q_proj", "k_proj")))) == 4
    )


@pytest.mark.parametrize(
    "edits",
    [
        (NF4(), LoRA(rank=4)),
        (RTN(grid=Grid(bits=4, group=16)), LoRA(rank=4)),
        (NF4(loftq=LoftQ(rank=4, fast=False)), LoRA(rank=4, init="loftq")),
        (RTN(grid=Grid(bits=2, group=16), loftq=LoftQ(rank=4)), LoRA(rank=4, init="loftq")),
    ],
    ids=str,
)
def test_saved_and_opened_it_is_the_same_bit_for_bit(edits: Any, tiny_llama: Path, tmp_path: Path) -> None:
    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), edits)
    disturb(forest.model)
    save_artifact(tmp_path / "artifact", forest, edits, {})
    opened, _ = open_artifact(tmp_path / "artifact")
    assert torch.equal(logits(opened.model), logits(forest.model))
    for name, layer in quantized(forest.model).items():
        other = opened.model.get_submodule(name).packed.tensors()
        assert all(torch.equal(t, other[k]) for k, t in layer.packed.tensors().items())


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ((), "off model.layers.0.self_attn.q_proj and 13 more"),
        ((LoRA(rank=4),), "off model.layers.0.self_attn.q_proj and 13 more"),
        ((LoRA(rank=4, init="loftq", targets=("q_proj", "v_proj")),), "off model.layers.0.self_attn.k_proj and 9 more"),
    ],
    ids=["nothing after it", "another start", "some layers"],
)
def test_what_loftq_takes_off_must_go_to_a_lora(rest: Any, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    edits = (NF4(loftq=LoftQ(rank=4)), *rest)
    forest = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    sentence = rf"edits: loftq took an update of rank 4 {said}, .*; add {{kind: lora, rank: 4, init: loftq}}"
    with pytest.raises(FettleError, match=rf"^{sentence}"):
        apply_edits(forest, edits)
    save_artifact(tmp_path / "artifact", forest, edits, {})  # as a stage that quantizes leaves it to the next
    with pytest.raises(FettleError, match=rf"artifact: {sentence}"):
        open_model(str(tmp_path / "artifact"))


def test_two_loras_from_loftq_open_on_one_base(tiny_llama: Path, tmp_path: Path) -> None:
    edits = (NF4(loftq=LoftQ(rank=4)), LoRA(rank=4, init="loftq"))
    wanted: dict[str, Tensor] = {}
    for i, name in enumerate(("one", "two")):
        forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), edits)
        disturb(forest.model, seed=i)
        save_artifact(tmp_path / name, forest, edits, {})
        wanted[name] = logits(forest.model)
    shared, adapters = open_adapters({name: str(tmp_path / name) for name in wanted})
    for name, expected in wanted.items():
        adapters.use(name)
        assert torch.allclose(logits(shared.model), expected, atol=1e-5)
    assert not torch.allclose(wanted["one"], wanted["two"], atol=1e-2)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_lora_from_loftq_starts_nearer_to_the_dense_model(bits: int, tiny_llama: Path) -> None:
    @torch.no_grad()
    def start(loftq: bool) -> float:
        forest = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
        dense = {n: read_weight(m).clone() for n, m in forest.model.named_modules() if type(m) is nn.Linear}
        quantizer = RTN(grid=Grid(levels="normal", bits=bits, group=32), loftq=LoftQ(rank=8) if loftq else None)
        edits = (quantizer, LoRA(rank=8, alpha=4, init="loftq" if loftq else "uniform"))
        apply_edits(forest, edits)
        assert all(layer.residual is None for layer in quantized(forest.model).values()), "handed over"
        layers = {n: m for n, m in forest.model.named_modules() if isinstance(m, LoRALinear)}
        return sum(float((read_weight(m.base) + m.delta() - dense[n]).square().sum()) for n, m in layers.items())

    assert start(True) < 0.9 * start(False)


def test_export_gives_a_dense_folder_and_names_the_cost(tiny_llama: Path, tmp_path: Path) -> None:
    edits = (NF4(), LoRA(rank=4))
    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), edits)
    disturb(forest.model)
    export_hf(forest, edits, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0.01 < manifest["requantizing"]["mean_error"] < 0.3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(again(input_ids=TOKENS).logits, logits(forest.model), atol=1e-4)


def test_a_forest_batch_is_each_path_alone(tiny_llama: Path) -> None:
    from fettle.models.proof import difference

    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), (NF4(), LoRA(rank=4)))
    disturb(forest.model)
    assert difference(forest) < 1e-5


def test_the_plan_of_a_step_counts_packed_weights(tiny_llama: Path) -> None:
    forest = apply_edits(load(ModelSpec(path=str(tiny_llama), dtype="float32")), (NF4(), LoRA(rank=4)))
    from fettle.quantize import packed

    packed._table.cache_clear()  # a table that is first made in a rehearsal must be a real one
    plan = predict(forest, worst_batch(32), lambda m, b: SFT()(m, b).sum)
    assert plan.weights == weight_bytes(forest.model)
    dense = sum(m.packed.count * 4 for m in quantized(forest.model).values())
    assert dense > 6 * sum(weight_bytes(m) for m in quantized(forest.model).values())
    assert torch.isfinite(logits(forest.model)).all()


MEASURE = """
import json, sys, torch
from pathlib import Path
from fettle.models import memory
from fettle.models.blocks import blocks
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA
from fettle.quantize import NF4
from fettle.stages.artifact import apply_edits

def own():
    return memory._field(Path("/proc/self/status"), "RssAnon")

torch.set_num_threads(1)
small, large = sys.argv[1:]
edits = [NF4(), LoRA(rank=4)]
apply_edits(load(ModelSpec(path=small, dtype="float32")), edits)  # what the libraries hold for good is there
memory.reset_peak()
start, before = memory.resident(), own()
forest = load(ModelSpec(path=large, dtype="float32"))
dense = memory.weight_bytes(forest.model)
apply_edits(forest, edits)
print(json.dumps({
    "dense": dense, "peak": memory.measure_peak() - start, "after": own() - before, "packed": memory.weight_bytes(forest.model)
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a resettable peak is Linux's")
def test_loading_and_quantizing_needs_the_dense_model_once_and_lets_go_of_it(
    tmp_path: Path, tiny_llama: Path, tokenizer: Any
) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1536,
        vocab_size=len(tokenizer), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(0.01 * (i + 1))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny_llama), str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print({k: f"{v / 2**20:.0f} MiB" for k, v in found.items()})
    assert found["packed"] < found["dense"] / 6
    assert found["peak"] < found["dense"] + found["packed"] + (64 << 20)
    assert found["after"] < found["packed"] + (40 << 20)
