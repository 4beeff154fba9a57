"""Exports against the libraries that read them, and PEFT adapters read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fettle.core.errors import FettleError
from fettle.core.files import read_json
from fettle.export import export, load_peft
from fettle.export.parity import plain_logits, probes
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import IA3, AdaLoRA, Full, LoRA, PTuningV2, TaskHead
from fettle.peft.adalora import AdaLoRALinear
from fettle.peft.lora import LoRALinear
from fettle.quantize import NF4
from fettle.stages.artifact import apply_edits
from small import make

peft: Any = pytest.importorskip("peft")
TOKENS = torch.randint(0, 300, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, **ids)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def opened(folder: Path) -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    forest.model.requires_grad_(False)
    return forest


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def liven(tensors) -> None:
    torch.manual_seed(1)
    for tensor in tensors:
        tensor.data.normal_(std=0.2)


CONFIGS = {
    "list": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7},
    "regex": {
        "target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.down_proj)",
        "r": 3,
        "lora_alpha": 8,
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "r": 4, "lora_alpha": 4},
    "gaussian": {"target_modules": ["o_proj"], "r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "q_proj": 6},
        "alpha_pattern": {"up_proj": 5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4, "lora_alpha": 4},
    "dora on an embedding": {"target_modules": ["embed_tokens"], "r": 4, "lora_alpha": 4, "use_dora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_adapters_load_here(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[name])
    )
    liven(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "adapter")
    forest = opened(tiny_llama)
    base = logits(forest.model)
    (edit,) = load_peft(forest, tmp_path / "adapter")
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)
    assert not torch.allclose(base, logits(theirs), atol=1e-2)
    export(forest, [edit], tmp_path / "again", "peft")  # and out again
    assert edit.dropout == CONFIGS[name].get("lora_dropout", 0.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True, "alpha": 5.0},
        {"targets": ("q_proj", "down_proj")},
        {"targets": r".*layers\.0\..*"},
        {"dora": True, "rslora": True},
        {"ranks": {"q_proj": 2, r".*layers\.1\.mlp.*": 6}, "alphas": {"k_proj": 3.0}},
        {"targets": ("embed_tokens", "lm_head", "o_proj")},
        {"targets": ("embed_tokens", "lm_head", "o_proj"), "dora": True},
        {"init": "pissa", "alpha": 8.0},
        {"init": "pissa", "rslora": True, "dora": True, "targets": ("q_proj",)},
    ],
    ids=str,
)
def test_our_adapters_load_in_peft(tiny_llama: Path, tmp_path: Path, settings: dict) -> None:
    forest = opened(tiny_llama)
    edit = LoRA(rank=4, **settings)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    parity = export(forest, [edit], tmp_path / "out", "peft")
    assert parity.checked_with == "peft"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("targets", [("wte",), ("lm_head",), ("wte", "lm_head", "c_attn")])
def test_tied_weights_come_apart_as_in_peft(tiny_gpt2: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Only the side that was adapted changes, in the adapter, in peft and in the merged folder, which is not tied."""
    forest = opened(tiny_gpt2)
    assert forest.model.lm_head.weight is forest.model.transformer.wte.weight
    edit = LoRA(rank=4, targets=targets)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    export(forest, [edit], tmp_path / "adapter", "peft")
    export(forest, [edit], tmp_path / "merged", "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert torch.allclose(logits(merged), logits(forest.model), atol=1e-4)
    back = opened(tiny_gpt2)
    load_peft(back, tmp_path / "adapter")
    assert torch.equal(logits(back.model), logits(forest.model))


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_weights_tied_four_times_come_apart_as_in_peft(kind: str, targets: str, tmp_path: Path) -> None:
    """A head and the embeddings of an encoder and a decoder, which share one weight."""
    forest, edit = opened(make(kind, tmp_path / "base")), LoRA(rank=2, targets=targets)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    adapter, merged = (export(forest, [edit], tmp_path / to, to) for to in ("peft", "hf"))
    assert adapter.checked_with == "peft" and adapter.largest_difference < 1e-5
    assert merged.checked_with == "transformers" and merged.largest_difference < 1e-5
    assert merged.effect_kept == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "target"), [("gpt2", "wte"), ("gpt2", "lm_head"), ("t5", "shared"), ("bart", "lm_head")]
)
def test_a_tied_weight_that_trains_goes_to_every_module_that_has_it(
    kind: str, target: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    folder = tiny_gpt2 if kind == "gpt2" else make(kind, tmp_path / "base")
    edits = [Full(targets=target), LoRA(rank=2)]
    forest = apply_edits(opened(folder), edits)
    liven(t for e in edits for t in e.tensors(forest.model).values())
    parity = export(forest, edits, tmp_path / "out", "peft")
    assert parity.checked_with == "peft" and parity.written_difference <= parity.tolerance
    again = opened(folder)
    load_peft(again, tmp_path / "out")
    rows = probes(40, 30)
    assert torch.equal(plain_logits(again.model, rows), plain_logits(forest.model, rows))


def test_what_trains_inside_of_an_adapter_is_no_module_for_peft(tiny_gpt2: Path, tmp_path: Path) -> None:
    edits = [Full(targets="wte"), LoRA(rank=2, targets="lm_head")]  # one weight
    forest = apply_edits(opened(tiny_gpt2), edits)
    with pytest.raises(FettleError, match="besides only whole modules that train, .* the edits here are: LoRA, Full"):
        export(forest, edits, tmp_path / "out", "peft")


def test_adalora_goes_out_as_a_lora_of_the_ranks_it_kept(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    edit = AdaLoRA(rank=4, target_rank=2, targets=("q_proj", "up_proj"))
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    layers = [m for m in forest.model.modules() if isinstance(m, AdaLoRALinear)]
    layers[0].values.data[1:3] = 0
    layers[1].values.data[:] = 0
    export(forest, [edit], tmp_path / "out", "peft")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out")
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)
    assert sorted(m.r["default"] for m in theirs.modules() if isinstance(getattr(m, "r", None), dict)) == [2, 4, 4]


def test_pefts_adalora_loads_as_a_lora(tiny_llama: Path, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=6, deltaT=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )  # fmt: skip
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    liven(p for n, p in theirs.named_parameters() if "lora_" in n)
    for step in range(1, 7):
        theirs(input_ids=TOKENS, labels=TOKENS).loss.backward()
        theirs.base_model.update_and_allocate(step)
        theirs.zero_grad()
    theirs.save_pretrained(tmp_path / "adapter")
    forest = opened(tiny_llama)
    (edit,) = load_peft(forest, tmp_path / "adapter")
    assert sum(len(m.a) for m in forest.model.modules() if isinstance(m, LoRALinear)) == 2 * 4
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)
    assert edit.kind == "lora"


def test_without_peft_the_adapter_is_read_back_by_our_own_reader(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    forest = opened(tiny_llama)
    edit = LoRA(rank=4)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    assert export(forest, [edit], tmp_path / "out", "peft").checked_with == "fettle"


def test_conv1d_both_ways(tiny_gpt2: Path, tmp_path: Path) -> None:
    forest = opened(tiny_gpt2)
    edit = LoRA(rank=4, targets=("c_attn", "c_proj"))
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    export(forest, [edit], tmp_path / "out", "peft")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path / "out")
    assert theirs.peft_config["default"].fan_in_fan_out
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    again = opened(tiny_gpt2)
    load_peft(again, tmp_path / "back")
    assert torch.equal(logits(again.model), logits(forest.model))
    export(forest, [edit], tmp_path / "merged", "hf")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs), atol=1e-5)


def test_merged_folder_is_pefts_merge(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    edit = LoRA(rank=4)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    export(forest, [edit], tmp_path / "adapter", "peft")
    export(forest, [edit], tmp_path / "merged", "hf")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter"
    ).merge_and_unload()
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.allclose(mine[name], weight, atol=1e-6), name


@pytest.mark.parametrize("tied", [False, True])
def test_llama_file_converts_back_to_the_merged_model(tmp_path: Path, tokenizer, tied: bool) -> None:
    """Back by the permutation that transformers' converter applies, on a model with every size different."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, rms_norm_eps=1e-5,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    forest = load(ModelSpec(path=str(tmp_path / "base"), dtype="bfloat16"))
    edit = LoRA(rank=4)
    edit.apply(forest.model)
    liven(edit.tensors(forest.model).values())
    export(forest, [edit], tmp_path / "out", "llama")
    stored = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    edit.merge(forest.model)

    def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        rows, width = weight.shape
        return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)

    wanted = dict(forest.model.named_parameters(remove_duplicate=False))
    for i in range(3):
        block, meta = f"model.layers.{i}.", f"layers.{i}."
        assert torch.equal(halves(stored[f"{meta}attention.wq.weight"], 6), wanted[f"{block}self_attn.q_proj.weight"])
        assert torch.equal(halves(stored[f"{meta}attention.wk.weight"], 2), wanted[f"{block}self_attn.k_proj.weight"])
        for theirs, ours in [
            ("attention.wv", "self_attn.v_proj"), ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w2", "mlp.down_proj"), ("feed_forward.w3", "mlp.up_proj"), ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ]:  # fmt: skip
            assert torch.equal(stored[f"{meta}{theirs}.weight"], wanted[f"{block}{ours}.weight"])
    assert torch.equal(stored["output.weight"], wanted["lm_head.weight"])
    assert torch.equal(stored["tok_embeddings.weight"], wanted["model.embed_tokens.weight"])


@pytest.mark.parametrize("edit", [LoRA(rank=2), IA3()], ids=lambda e: e.kind)
@pytest.mark.parametrize(
    ("kind", "task", "said"),
    [
        ("bert", "classify", "SEQ_CLS"), ("roberta", "classify", "SEQ_CLS"), ("roberta", "tag", "TOKEN_CLS"),
        ("t5", "causal", "SEQ_2_SEQ_LM"),
    ],
)  # fmt: skip
def test_other_kinds_of_models_are_read_by_peft(
    kind: str, task: str, said: str, edit: LoRA | IA3, tmp_path: Path
) -> None:
    from peft import PeftModel

    labels = {"labels": ("no", "maybe", "yes")} if task != "causal" else {}
    spec = ModelSpec(path=str(make(kind, tmp_path / "base")), dtype="float32", task=task, **labels)
    forest = load(spec)
    edits = [edit, TaskHead()] if labels else [edit]
    apply_edits(forest, edits)
    with torch.no_grad():
        for tensor in (t for e in edits for t in e.tensors(forest.model).values()):
            tensor.add_(0.1 * torch.randn_like(tensor))
    parity = export(forest, edits, tmp_path / "out", "peft")
    assert parity.checked_with == "peft" and parity.largest_difference < 1e-5
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["task_type"] == said and bool(config["modules_to_save"]) == bool(labels)
    rows = probes(40, 30)
    theirs = PeftModel.from_pretrained(load(spec.model_copy(update={"seed": 5})).model, tmp_path / "out")
    ours = load(spec.model_copy(update={"seed": 5}))
    assert len(load_peft(ours, tmp_path / "out")) == len(edits)
    expected = plain_logits(forest.model, rows)
    for found in (plain_logits(theirs, rows), plain_logits(ours.model, rows)):
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_prompt_on_four_bits_is_written_and_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = load(ModelSpec(path=str(tiny_llama), dtype="float32")), [NF4(), PTuningV2(tokens=3)]
    apply_edits(forest, edits)
    parity = export(forest, edits, tmp_path / "out", "peft")
    assert parity.checked_with == "fettle" and parity.largest_difference < 1e-5
