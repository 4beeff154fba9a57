"""Soft prompts against `peft`: equal weights give equal logits and gradients, and what one writes the other reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    T5Config,
)  # fmt: skip

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.export import export, load_peft
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import HybridPrompt, LoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2
from fettle.stages.artifact import add_edit

peft: Any = pytest.importorskip("peft")

P = 3
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**WIDE, num_key_value_heads=2, intermediate_size=48),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
    ),
    "opt": OPTConfig(**WIDE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0),
    "bert": BertConfig(**WIDE, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "t5": T5Config(
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
}
AUTO = {"bert": (AutoModelForTokenClassification, "TOKEN_CLS"), "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM")}
MLP = {"embedding.weight": "encoder.inputs", "0.weight": "encoder.up", "0.bias": "encoder.up_shift",
       "2.weight": "encoder.down", "2.bias": "encoder.down_shift"}  # fmt: skip
CASES: dict[str, tuple[Edit, Any, dict[str, Any]]] = {
    "prompt": (PromptTuning(tokens=P), peft.PromptTuningConfig, {}),
    "p_tuning": (
        PTuning(tokens=P, hidden=8, layers=2), peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 2, "encoder_dropout": 0.0},
    ),
    "p_tuning_v2": (PTuningV2(tokens=P), peft.PrefixTuningConfig, {"prefix_projection": False}),
    "prefix": (
        PrefixTuning(tokens=P, hidden=8), peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8},
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def ours_of(theirs: str) -> str:
    """Our name of a parameter of one of PEFT's encoders that has a network in it."""
    if theirs.startswith("lstm_head."):
        return theirs.replace("lstm_head.", "encoder.lstm.")
    return MLP[theirs.removeprefix("mlp_head.").removeprefix("transform.")]


def paired(kind: str, case: str) -> tuple[nn.Module, Any, list[tuple[nn.Parameter, nn.Parameter]]]:
    """The same model with our edit and with theirs, both with the same random weights, and the pairs of parameters."""
    auto, task = AUTO.get(kind, (AutoModelForCausalLM, "CAUSAL_LM"))
    torch.manual_seed(0)
    base = auto.from_config(CONFIGS[kind]).double().eval()
    edit, config, settings = CASES[case]
    ours = copy.deepcopy(base).requires_grad_(False)
    edit.apply(ours)
    extra = {"num_transformer_submodules": 1} if kind == "t5" else {}
    theirs = (
        peft.get_peft_model(base, config(task_type=task, num_virtual_tokens=P, **settings, **extra)).double().eval()
    )
    encoder = theirs.prompt_encoder["default"]
    mine = dict(ours.fettle_prompt.named_parameters())
    pairs = [(mine["plain" if len(mine) == 1 else ours_of(name)], p) for name, p in encoder.named_parameters()]
    assert len(pairs) == len(mine)
    with torch.no_grad():
        for one, two in pairs:
            assert one.shape == two.shape
            one.normal_(std=0.3)
            two.copy_(one)
    return ours, theirs, pairs


def inputs(kind: str) -> dict[str, Tensor]:
    mask = torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    given = {"input_ids": TOKENS, "attention_mask": mask}
    if kind == "t5":
        given["decoder_input_ids"] = TOKENS[:, :4]
    if kind == "bert":
        given["token_type_ids"] = (TOKENS > 30).long()
    return given


@pytest.mark.parametrize(
    ("kind", "case"),
    # PEFT's projected prefix begins from vectors as wide as the keys, ours as wide as the model: not the same on Llama here.
    [
        (k, c)
        for k in CONFIGS
        for c in CASES
        if (k, c) not in (("t5", "prefix"), ("t5", "p_tuning_v2"), ("llama", "prefix"))
    ],
)
def test_equal_weights_give_equal_logits_and_gradients(kind: str, case: str) -> None:
    ours, theirs, pairs = paired(kind, case)
    given = inputs(kind)
    found, expected = ours(**given).logits, theirs(**given).logits
    expected = expected[:, expected.shape[1] - found.shape[1] :]  # PEFT leaves its rows in
    seen = given["attention_mask"].bool() if kind != "t5" else torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-10)
    up = torch.randn(found[seen].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found[seen] * up).sum().backward()
    (expected[seen] * up).sum().backward()
    for one, two in pairs:
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-10)


def opened(folder: Path) -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    forest.model.requires_grad_(False)
    return forest


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits[:, -TOKENS.shape[1] :]


@pytest.mark.parametrize(
    "edit",
    [*(edit for edit, _, _ in CASES.values()), HybridPrompt(template="<soft:2> the stones <soft>")],
    ids=lambda e: e.kind,
)
def test_peft_reads_what_is_exported_and_it_comes_back(edit: Edit, tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    add_edit(forest, edit, 0, 0)
    with torch.no_grad():
        for p in forest.model.fettle_prompt.parameters():
            p.add_(0.2 * torch.randn_like(p))
    found = export(forest, [edit], tmp_path / "out", "peft")
    assert found.checked_with == "peft" and found.largest_difference < 1e-4 and abs(found.effect_kept - 1) < 1e-3
    theirs = peft.PeftModel.from_pretrained(opened(tiny_llama).model, tmp_path / "out")
    torch.testing.assert_close(logits(theirs), logits(forest.model), rtol=0, atol=1e-5)
    again = opened(tiny_llama)
    (read,) = load_peft(again, tmp_path / "out")
    torch.testing.assert_close(logits(again.model), logits(forest.model), rtol=0, atol=1e-6)
    assert read.tensors(again.model)["fettle_prompt.plain"].requires_grad is False


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_read(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    edit, config, settings = CASES[case]
    theirs = peft.get_peft_model(
        opened(tiny_llama).model, config(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    ).eval()
    with torch.no_grad():
        for p in theirs.prompt_encoder.parameters():
            p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    forest = opened(tiny_llama)
    assert load_peft(forest, tmp_path / "theirs")[0].kind == edit.kind
    torch.testing.assert_close(logits(forest.model), logits(theirs), rtol=0, atol=1e-5)


def test_bad_folders_are_sentences(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    add_edit(forest, PromptTuning(tokens=P), 0, 0)
    add_edit(forest, LoRA(rank=2), 0, 1)
    with pytest.raises(FettleError, match="nothing else, the edits here are: PromptTuning, LoRA"):
        export(forest, [PromptTuning(tokens=P), LoRA(rank=2)], tmp_path / "out", "peft")
    with pytest.raises(FettleError, match="prompt_tuning: a soft prompt is more input"):
        export(forest, [PromptTuning(tokens=P), LoRA(rank=2)], tmp_path / "out", "hf")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "adapter_config.json").write_text('{"peft_type": "CPT", "num_virtual_tokens": 3}')
    with pytest.raises(FettleError, match="holds a CPT adapter"):
        load_peft(opened(tiny_llama), tmp_path / "in")
    (tmp_path / "in" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}')
    with pytest.raises(FettleError, match="adapter_model.safetensors: no such file"):
        load_peft(opened(tiny_llama), tmp_path / "in")
    from safetensors.torch import save_file

    save_file({"prompt_embeddings": torch.zeros(3, 5)}, tmp_path / "in" / "adapter_model.safetensors")
    with pytest.raises(FettleError, match="belongs to another base"):
        load_peft(opened(tiny_llama), tmp_path / "in")
