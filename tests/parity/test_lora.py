"""LoRA and its relatives against `peft`: the same weights give the same logits, gradients and choices of rank."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fettle.core.families import Edit
from fettle.peft import AdaLoRA, LoRA
from fettle.peft.adalora import AdaLoRALinear
from fettle.peft.lora import LoRALinear

peft: Any = pytest.importorskip("peft")

LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=64
)  # fmt: skip
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
)
TOKENS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
THEIRS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector", "values": "lora_E"}


def build(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def their_name(ours: str, embeddings: tuple[str, ...] = ()) -> list[str]:
    """What `peft` may call one of our parameters."""
    stem, key = ours.rsplit(".", 1)
    inner = f"lora_embedding_{key.upper()}" if stem.endswith(embeddings) and key in "ab" else THEIRS[key]
    return [f"base_model.model.{stem}.{inner}.default{end}" for end in ("", ".weight")]


def paired(
    base: nn.Module, edit: Edit, config: Any, embeddings: tuple[str, ...] = ("?",)
) -> tuple[nn.Module, Any, list]:
    """The same model with our edit and with theirs, both with the same random weights, and the pairs of parameters."""
    ours = copy.deepcopy(base).requires_grad_(False)
    edit.apply(ours)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double()
    every, pairs = dict(theirs.named_parameters()), []
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = next(every[n] for n in their_name(name, embeddings) if n in every)
            with torch.no_grad():
                if name.endswith("magnitude"):
                    assert torch.allclose(parameter, other.view(-1), atol=1e-5)  # theirs was made in float32
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                else:
                    parameter.normal_(std=0.3)
                other.copy_(parameter.view_as(other))
            pairs.append((name, parameter, other))
    left = {n: p for n, p in every.items() if p.requires_grad and not any(p is o for _, _, o in pairs)}
    theirs_left = [n for n in left if ".ranknum." not in n]  # a constant of AdaLoRA that peft forgets to freeze
    assert pairs and not theirs_left
    return ours, theirs.eval(), pairs


def assert_equal_logits_and_gradients(ours: nn.Module, theirs: nn.Module, pairs: list) -> None:
    one, two = ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits
    assert torch.allclose(one, two, atol=1e-11, rtol=1e-11)
    one.square().sum().backward()
    two.square().sum().backward()
    for name, parameter, other in pairs:
        assert torch.allclose(parameter.grad, other.grad.view_as(parameter), rtol=1e-9, atol=1e-9), name


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "lora": (LLAMA, {"alpha": 8.0}, {"lora_alpha": 8}),
    "rslora": (LLAMA, {"alpha": 6.0, "rslora": True}, {"lora_alpha": 6, "use_rslora": True}),
    "dora": (LLAMA, {"alpha": 8.0, "dora": True}, {"lora_alpha": 8, "use_dora": True}),
    "dora and rslora": (
        LLAMA, {"alpha": 5.0, "dora": True, "rslora": True}, {"lora_alpha": 5, "use_dora": True, "use_rslora": True},
    ),
    "dora on Conv1D with a bias": (
        GPT2, {"alpha": 8.0, "dora": True, "targets": ("c_attn", "mlp.c_proj")},
        {"lora_alpha": 8, "use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    ),
    "ranks by layer": (
        LLAMA, {"alpha": 8.0, "ranks": {"q_proj": 2, r".*\.1\.mlp\.down_proj": 6}, "alphas": {"q_proj": 3.0}},
        {"lora_alpha": 8, "rank_pattern": {"q_proj": 2, r"1\.mlp\.down_proj": 6}, "alpha_pattern": {"q_proj": 3.0}},
    ),
    "embedding and head": (
        LLAMA, {"alpha": 8.0, "targets": ("embed_tokens", "lm_head", "q_proj")},
        {"lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "dora on embedding and head": (
        LLAMA, {"alpha": 8.0, "dora": True, "targets": ("embed_tokens", "lm_head")},
        {"lora_alpha": 8, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_pefts(name: str) -> None:
    config, mine, their = CASES[name]
    targets = {"q_proj", "down_proj"}
    edit = LoRA(rank=4, **{"targets": tuple(sorted(targets)), **mine})
    settings = peft.LoraConfig(r=4, **{"target_modules": sorted(targets), **their})
    assert_equal_logits_and_gradients(*paired(build(config), edit, settings, ("embed_tokens", "wte")))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_pissa_starts_where_pefts_does(config: Any, rslora: bool) -> None:
    """Up to the sign of each singular vector; peft's base has lost the principal part, ours takes it off beside the base."""
    targets = ("q_proj", "down_proj") if config is LLAMA else ("c_attn",)
    base = build(config).float()
    ours = copy.deepcopy(base).requires_grad_(False)
    LoRA(rank=4, alpha=6.0, targets=targets, init="pissa", rslora=rslora).apply(ours)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights="pissa", use_rslora=rslora, fan_in_fan_out=config is GPT2
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            other = theirs.get_submodule(f"base_model.model.{name}")
            a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
            sign = torch.sign((module.a * a).sum(1))
            assert torch.allclose(module.a, sign[:, None] * a, atol=1e-4)
            assert torch.allclose(module.b, sign * b, atol=1e-4)
            residual = other.get_base_layer().weight
            residual = residual.T if config is GPT2 else residual
            weight = module.base.weight.T if config is GPT2 else module.base.weight
            assert torch.allclose(weight - module.scale * module.b0 @ module.a0, residual, atol=1e-5)
    assert torch.allclose(ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits, atol=1e-4)


def adalora(steps: int) -> tuple[AdaLoRA, Any]:
    rank, alpha = 4, 8.0  # peft divides by rank + 1e-5
    mine = AdaLoRA(
        rank=rank, target_rank=2, alpha=alpha * rank / (rank + 1e-5), targets=("q_proj", "v_proj", "down_proj"), warmup=2,
        final=3, every=2, betas=(0.7, 0.6), orthogonality=0.3,
    )  # fmt: skip
    theirs = peft.AdaLoraConfig(
        init_r=rank, target_r=2, lora_alpha=alpha, target_modules=list(mine.targets), tinit=2, tfinal=3, deltaT=2, beta1=0.7,
        beta2=0.6, orth_reg_weight=0.3, total_step=steps, task_type="CAUSAL_LM",
    )  # fmt: skip
    return mine, theirs


def test_adalora_is_pefts_to_the_choice_of_ranks() -> None:
    """Logits, gradients with the penalty, importance and masks, through all phases of a run."""
    steps = 16
    edit, config = adalora(steps)
    ours, theirs, pairs = paired(build(LLAMA), edit, config)
    generator = torch.Generator().manual_seed(5)
    chosen: list[int] = []
    for step in range(steps):
        tokens = torch.randint(0, 64, (2, 7), generator=generator)
        outputs = [model(input_ids=tokens, labels=tokens) for model in (ours, theirs)]
        assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-10)
        penalty = edit.penalty(ours)
        assert penalty is not None
        (outputs[0].loss + penalty).backward()
        outputs[1].loss.backward()  # has the penalty in it
        with torch.no_grad():
            for name, mine, other in pairs:
                assert torch.allclose(mine.grad, other.grad.view_as(mine), atol=1e-10), (step, name)
                for p in (mine, other):
                    p -= 0.5 * p.grad
        edit.after_step(ours, step, steps)
        theirs.base_model.update_and_allocate(step + 1)
        for _, mine, other in pairs:
            assert torch.allclose(mine, other.view_as(mine), atol=1e-10)
            mine.grad = other.grad = None
        if step + 1 < steps - 3:  # then peft forgets it
            assert_equal_importance(ours, theirs)
        chosen.append(sum(int((m.values != 0).sum()) for m in ours.modules() if isinstance(m, AdaLoRALinear)))
    layers = 2 * 3
    assert chosen[0] == layers * 4 and chosen[-1] == layers * 2 and len(set(chosen)) > 3


def assert_equal_importance(ours: nn.Module, theirs: Any) -> None:
    allocator = theirs.base_model.rankallocator
    for name, module in ours.named_modules():
        if isinstance(module, AdaLoRALinear):
            for key, inner in (("a", "lora_A"), ("b", "lora_B"), ("values", "lora_E")):
                wanted: Tensor = allocator._element_score(f"{name}.{inner}.default")
                found = getattr(module, f"{key}_sensitivity") * getattr(module, f"{key}_uncertainty")
                assert torch.allclose(found, wanted.view_as(found), rtol=1e-9, atol=1e-18), (name, key)


def test_lora_plus_gives_b_its_ratio_as_pefts_optimizer_does() -> None:
    edit = LoRA(rank=4, lr_ratio=16.0, targets=("q_proj",))
    ours, theirs, _ = paired(build(LLAMA), edit, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    wanted = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    scales = edit.lr_scales(ours)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            mine = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".a")
            mine = mine.replace(".lora_B.default.weight", ".b")
            assert math.isclose(1e-3 * scales.get(mine, 1.0), wanted[id(parameter)])
