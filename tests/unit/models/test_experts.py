"""Experts as linear layers: the same model, by values and by gradients, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.batch import Example, Node, pack
from fettle.core.errors import FettleError
from fettle.export import export
from fettle.models.experts import Experts, restack, unstack
from fettle.models.feeds import feeds
from fettle.models.forest import Forest
from fettle.peft import IA3, LoRA
from fettle.quantize import AWQ, GPTQ, RTN, Grid
from fettle.quantize.calibrate import Calibration
from fettle.quantize.linear import describe, quantized
from fettle.stages import load_recipe, open_model, run

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None}, "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4}, "qwen2_moe": {"num_experts": 4, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16},
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))


def build(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | KINDS.get(kind, {}) | more)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, mean=0.1 if parameter.ndim == 1 else 0.0)
    return model.to(dtype).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers_and_the_same_gradients_as_the_stacks(kind: str) -> None:
    stacked = build(kind)
    apart = copy.deepcopy(stacked)
    unstack(apart)
    assert not any(p.ndim == 3 for p in apart.parameters()) and any(isinstance(m, Experts) for m in apart.modules())
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in stacked.parameters())
    losses = [model(input_ids=TOKENS, labels=TOKENS).loss for model in (stacked, apart)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    for loss in losses:
        loss.backward()
    wanted = stacked.get_submodule("model.layers.1.mlp.experts")
    found = apart.get_submodule("model.layers.1.mlp.experts")
    gate_up = torch.stack([torch.cat([e.gate_proj.weight.grad, e.up_proj.weight.grad]) for e in found])
    torch.testing.assert_close(gate_up, wanted.gate_up_proj.grad, rtol=1e-9, atol=1e-14)
    down = torch.stack([e.down_proj.weight.grad for e in found])
    torch.testing.assert_close(down, wanted.down_proj.grad, rtol=1e-9, atol=1e-14)
    assert wanted.down_proj.grad.norm() > 0


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    model = build("mixtral", num_local_experts=8)
    unstack(model)
    model(input_ids=TOKENS[:1, :2]).logits.sum().backward()
    norms = [float(p.grad.norm()) for n, p in model.named_parameters() if "experts" in n and p.grad is not None]
    assert len(norms) == 2 * 8 * 3 and 0 in norms and max(norms) > 0


def test_stacked_again_every_weight_is_as_it_was() -> None:
    stacked = build("qwen3_moe")
    apart = copy.deepcopy(stacked)
    unstack(apart)
    again = copy.deepcopy(apart)  # as exports do
    restack(again)
    wanted, found = stacked.state_dict(), again.state_dict()
    assert list(wanted) == list(found) and all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert torch.equal(again(input_ids=TOKENS).logits, stacked(input_ids=TOKENS).logits)
    RTN().apply(apart)
    with pytest.raises(FettleError, match="0.gate_proj is a QuantizedLinear, which no stack can hold"):
        restack(apart)


def test_edits_reach_them() -> None:
    model = build("qwen3_moe", torch.float32).requires_grad_(False)
    unstack(model)
    RTN(grid=Grid(bits=8)).apply(model)
    assert len(quantized(model)) == 2 * (4 + 4 * 3)
    assert set(describe(model)["left_dense"]) == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.#.mlp.gate.weight"
    }  # fmt: skip
    LoRA(rank=2, targets=("gate_proj", "down_proj")).apply(model)
    model(input_ids=TOKENS).logits.sum().backward()
    assert sum(p.grad is not None for n, p in model.named_parameters() if "experts" in n) == 2 * 4 * 2 * 2


def calibrated(edit: Any) -> tuple[Any, Calibration]:
    """Rows of 40 tokens and 24 of padding, which all go to the same experts."""
    model = build("qwen3_moe", torch.float32, num_experts=8).requires_grad_(False)
    unstack(model)
    rng = np.random.default_rng(0)
    texts = [Example((Node(rng.integers(3, 64, 40).astype(np.int32), np.ones(40, np.float32)),), "x") for _ in range(6)]
    calibration = Calibration(Forest(model), [pack([text], 64, 0) for text in texts], console=Console(quiet=True))
    edit.calibrate(model, calibration)
    return model, calibration


def test_calibration_counts_no_padding() -> None:
    _, calibration = calibrated(GPTQ(grid=Grid(bits=4, group=8), least=1))
    for kind in ("gate_proj", "up_proj", "down_proj"):
        for layer in range(2):
            seen = [calibration.outcomes[f"model.layers.{layer}.mlp.experts.{e}.{kind}"].tokens for e in range(8)]
            assert sum(seen) == 6 * 40 * 2, "every token goes to two experts"


def test_scales_move_through_every_expert_however_few_tokens_a_look_takes() -> None:
    model, calibration = calibrated(AWQ(grid=Grid(bits=4, group=8), least=1, samples=2, points=4, clip=False))
    found = {feed.readers[0]: feed.source for feed in feeds(build_apart()).found}
    downs = [f"model.layers.{layer}.mlp.experts.{e}.down_proj" for layer in range(2) for e in range(8)]
    assert all(found[down] == down.replace("down", "up") for down in downs)
    assert not any("down_proj" in left for left in calibration.left)
    assert all(f"experts.{e}.gate_proj" in " ".join(calibration.left) for e in range(8)), "what feeds them feeds more"


def build_apart() -> Any:
    model = build("qwen3_moe", torch.float32, num_experts=8).requires_grad_(False)
    unstack(model)
    return model


def test_ia3_scales_the_inside_of_every_expert() -> None:
    model = build_apart()
    IA3().apply(model)
    scaled = [name for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    assert len(scaled) == 2 * 8 and all("down_proj" in name for name in scaled)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("llama", "LlamaForCausalLM has no stacked experts"), ("gpt_oss", "GptOssExperts.*not understood")],
)
def test_what_is_no_such_stack_is_refused(kind: str, said: str) -> None:
    model = build(kind, torch.float32, **({"num_local_experts": 4} if kind == "gpt_oss" else {}))
    with pytest.raises(FettleError, match=said):
        unstack(model)


def test_from_a_recipe_to_a_merged_folder(tmp_path: Path, tokenizer: Any) -> None:
    base = tmp_path / "base"
    model = build("qwen3_moe", torch.float32, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Count the red stones", "completion": "one two three"}\n' * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stages:\n  - kind: quantize\n    model: {{path: {base}, experts: linear, dtype: float32}}\n    edits: [{{kind: gptq, grid: "
        f"{{bits: 8, group: 8}}}}]\n    calibration: {{data: [{{path: {data}}}], samples: 8, length: 64}}\n    output: {tmp_path}/packed\n"
        f"  - edits: [{{kind: lora, rank: 2}}]\n    data: [{{path: {data}}}]\n    batch: {{tokens: 64}}\n    optim: {{steps: 3}}\n"
        f"    output: {tmp_path}/tuned\n"
    )
    forest, edits = open_model(str(run(load_recipe(recipe))))
    assert isinstance(forest, Forest) and any("experts.3.up_proj" in name for name in quantized(forest.model))
    assert export(forest, edits, tmp_path / "merged", "hf").largest_difference < 1e-3
    plain, _ = open_model(str(tmp_path / "merged"))
    assert plain.model.get_submodule("model.layers.0.mlp.experts").gate_up_proj.shape == (4, 48, 32)
    for form in ("peft", "compressed-tensors", "bitsandbytes"):
        with pytest.raises(FettleError, match="its experts are layers of their own"):
            export(forest, edits, tmp_path / form, form)
    with pytest.raises(FettleError, match="no stacked experts"):
        run(load_recipe(recipe, ["stages.0.model.path=fettle/tiny", f"stages.0.output={tmp_path}/other"]))
