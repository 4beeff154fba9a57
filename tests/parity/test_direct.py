"""Objectives over preferences against TRL: its trainers' own losses and gradients, of the same file, model and LoRA.

The rows are prompts and completions, which both sides render by themselves. Float64; transformers computes softmax and rotary
tables in float32 whatever the model, hence 1e-5.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.core.batch import Batch
from fettle.data import DataSpec, prepare
from fettle.data.preference import Preference
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.objectives import CDPO, DPO, IPO, KTO, Hinge, Reward, Robust
from fettle.objectives.orpo import log_odds
from fettle.objectives.reward import reward_loss
from fettle.objectives.simpo import simpo_loss
from fettle.peft import LoRA
from fettle.stages.artifact import apply_edits

trl = pytest.importorskip("trl")
TARGETS = ("q_proj", "v_proj", "down_proj")
PROMPTS = ["What is the capital?\n", "Count the red stones:\n", "Good morning.\n", "A short answer, please:\n"]
CHOSEN = ["The island.", "1 2 3 4 5", "Yes, no, maybe; a long answer in the afternoon", "cakes"]
REJECTED = ["bread bread bread", "stones", "No.", "A long one is better than a short one."]


@pytest.fixture(scope="module")
def ours(tiny_llama: Path) -> Forest:
    """The model in float64 with a LoRA that has begun to learn."""
    forest = load(ModelSpec(path=str(tiny_llama), dtype="float32", device="cpu"))
    apply_edits(forest, (LoRA(rank=4, alpha=8, targets=TARGETS),), 0)
    torch.manual_seed(3)
    for name, p in forest.model.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(std=0.1)
    forest.model.double()
    return forest


def theirs(tiny_llama: Path, ours: Forest) -> Any:
    """The same as a PEFT model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    weights = dict(ours.model.named_parameters())
    with torch.no_grad():
        model.double()
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(weights[our_name(name)])
    return model


def our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for factor in "AB":
        name = name.replace(f"lora_{factor}.default.weight", factor.lower())
    return name


def batch_of(
    rows: list[dict[str, Any]], folder: Path, tokenizer: Any, compared: bool
) -> tuple[Batch, list[dict[str, Any]]]:
    """All rows in one batch, and the rows in its order."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = prepare([DataSpec(path=str(file))], tokenizer, 512, form=Preference(compared))
    batch = corpus.batch(0)
    names = list(dict.fromkeys(n for n in batch.names if n))
    assert len(names) == len(rows)
    return batch, [rows[int(name.rpartition(":")[2]) - 1] for name in names]


def check(ours: Forest, found: Any, loss: Tensor, model: Any) -> None:
    """The same loss, and the same gradient of each LoRA factor."""
    mean = found.sum / found.count
    torch.testing.assert_close(mean.double(), loss.double(), rtol=1e-5, atol=1e-7)
    named = {n: p for n, p in ours.model.named_parameters() if p.requires_grad}
    mine = dict(zip(named, torch.autograd.grad(mean, list(named.values())), strict=True))
    other = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(other.values()))
    assert {our_name(n) for n in other} == set(mine)
    assert max(g.abs().max() for g in grads) > 1e-4, "gradients of nothing prove nothing"
    for name, grad in zip(other, grads, strict=True):
        torch.testing.assert_close(mine[our_name(name)], grad, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path, ours: Forest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A DPOTrainer, and its batch of the rows below."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("dpo")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    batch, ordered = batch_of(rows, folder, ours.tokenizer, compared=True)
    args = trl.DPOConfig(
        output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        per_device_train_batch_size=4,
    )  # fmt: skip
    model = theirs(tiny_llama, ours)
    made = trl.DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(ordered), processing_class=copy.deepcopy(tokenizer)
    )
    # A PEFT model that comes with an adapter makes TRL keep a copy of it as the reference; ours is the base.
    made.model.delete_adapter("ref")
    given = made.data_collator([made.train_dataset[i] for i in range(4)])
    return made, given, batch


CASES = {
    "sigmoid": (DPO(beta=0.3), {}),
    "hinge": (Hinge(beta=0.3), {}),
    "ipo": (IPO(beta=0.3), {}),
    "robust": (Robust(beta=0.3, noise=0.2), {"label_smoothing": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dpo_and_its_kin(name: str, trainer: Any, ours: Forest) -> None:
    objective, settings = CASES[name]
    made, given, batch = trainer
    made.loss_types, made.loss_weights, made.beta = [name], [1.0], 0.3
    made.label_smoothing = settings.get("label_smoothing", 0.0)
    check(ours, objective(ours, batch), made.compute_loss(made.model, given), made.model)


def test_cdpo_is_the_noisy_mean_of_dpo(trainer: Any, ours: Forest) -> None:
    """TRL dropped cDPO with its label smoothing of 'sigmoid'; it is that loss of the pair and of its mirror image."""
    made, given, batch = trainer
    made.loss_types, made.loss_weights, made.beta, made.label_smoothing = ["sigmoid"], [1.0], 0.3, 0.0
    half = len(given["input_ids"]) // 2
    mirrored = {key: torch.cat([value[half:], value[:half]]) for key, value in given.items()}
    loss = 0.8 * made.compute_loss(made.model, given) + 0.2 * made.compute_loss(made.model, mirrored)
    check(ours, CDPO(beta=0.3, noise=0.2)(ours, batch), loss, made.model)


def test_kto(tiny_llama: Path, ours: Forest, tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [
        {"prompt": p, "completion": c, "label": bool(i % 2)}
        for i, (p, c) in enumerate(zip(PROMPTS, CHOSEN, strict=True))
    ]
    batch, ordered = batch_of(rows, tmp_path, ours.tokenizer, compared=False)
    args = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_length=None, per_device_train_batch_size=4, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    made = trl.KTOTrainer(
        model=theirs(tiny_llama, ours), args=args, train_dataset=Dataset.from_list(ordered),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    if "ref" in made.model.peft_config:
        made.model.delete_adapter("ref")
    given = made.data_collator([made.train_dataset[i] for i in range(4)])
    loss = made.compute_loss(made.model, given)
    found = KTO(beta=0.3, desired=1.5, undesired=0.5)(ours, batch)
    assert made._metrics["train"]["kl"][-1] > 0, "the estimate is clamped on both sides, which says nothing"
    assert float(found.metrics["kl"] / found.count) == pytest.approx(made._metrics["train"]["kl"][-1], rel=1e-4)
    check(ours, found, loss, made.model)


def test_simpo() -> None:
    from trl.experimental.cpo import CPOTrainer

    blank = object.__new__(CPOTrainer)
    blank.alpha, blank.loss_type, blank.beta, blank.simpo_gamma, blank.label_smoothing = 0.0, "simpo", 2.0, 0.7, 0.0
    blank.accelerator = type("Here", (), {"device": torch.device("cpu")})()
    torch.manual_seed(0)
    better, worse = (-3 * torch.rand(50, dtype=torch.float64) for _ in range(2))
    theirs, *_ = blank.cpo_loss(better, worse)
    torch.testing.assert_close(simpo_loss(better, worse, 2.0, 0.7), theirs)


def test_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    blank = object.__new__(ORPOTrainer)
    blank.beta, blank.accelerator = 1.0, type("Here", (), {"device": torch.device("cpu")})()
    torch.manual_seed(0)
    better, worse = (-0.05 - 3 * torch.rand(50) for _ in range(2))
    theirs, *_ = blank.odds_ratio_loss(better, worse)  # the sign that it is subtracted with
    ours = torch.nn.functional.logsigmoid(log_odds(better.double()) - log_odds(worse.double()))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centre", [0.0, 0.01])
def test_reward(centre: float) -> None:
    from trl import RewardTrainer

    torch.manual_seed(0)
    rewards, margin = torch.randn(12, 1, dtype=torch.float64, requires_grad=True), torch.rand(6)
    blank = object.__new__(RewardTrainer)
    blank.args = type("Asked", (), {"center_rewards_coefficient": centre or None})()
    blank._metrics = {"train": {k: [] for k in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}}
    blank._total_train_tokens, blank._tp_size = 0, 1
    blank.accelerator = type("Here", (), {"gather": lambda _, x: x, "gather_for_metrics": lambda _, x: x})()

    class Given(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return type("Out", (), {"logits": rewards})()

    blank.model = Given()
    theirs = blank.compute_loss(blank.model, {"margin": margin, "attention_mask": torch.ones(1)})
    ours = reward_loss(rewards[:6, 0], rewards[6:, 0], margin, centre).mean()
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, rewards), torch.autograd.grad(theirs, rewards), strict=True):
        torch.testing.assert_close(mine, other)
    assert Reward().centre == 0
