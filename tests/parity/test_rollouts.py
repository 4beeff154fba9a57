"""GRPO and RLOO against TRL's own code: advantages and losses, and the gradient by the log-probabilities.

TRL's `_compute_loss` is called as it is, on a stand-in for the trainer that hands it our log-probabilities.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fettle.objectives.grpo import group_advantages, grpo_loss
from fettle.objectives.policy import Tokens, each_weight
from fettle.objectives.rloo import leave_one_out, sequence_loss

pytest.importorskip("trl")

LENGTHS = torch.tensor([5, 2, 7, 1, 3, 7])
MOST, GROUP = 7, 3


class Accelerator:
    """One process."""

    sync_gradients, num_processes, process_index, device = True, 1, 0, torch.device("cpu")

    def gather(self, x: Any) -> Any:
        return x

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        return x


def case(seed: int = 0) -> dict[str, Tensor]:
    """Padded log-probabilities [6, 7], in float64."""
    torch.manual_seed(seed)
    mask = torch.arange(MOST)[None] < LENGTHS[:, None]
    old = -3 * torch.rand(6, MOST, dtype=torch.float64)
    return {
        "mask": mask, "old": old, "now": old + 0.3 * torch.randn(6, MOST, dtype=torch.float64),
        "reference": old + 0.3 * torch.randn(6, MOST, dtype=torch.float64), "rewards": torch.randn(6, dtype=torch.float64),
    }  # fmt: skip


def trainer(logps: Tensor, **settings: Any) -> Any:
    from collections import defaultdict

    usual: dict[str, Any] = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": 0.0,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "max_completion_length": MOST, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "importance_sampling_level": "token", "loss_type": "grpo", "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True), "_metrics": {"train": defaultdict(list)},
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), "use_adaptive_entropy": False,
    }  # fmt: skip
    given = lambda *a, **k: (logps, torch.zeros_like(logps), None)  # noqa: E731
    return SimpleNamespace(**(usual | settings), _get_per_token_logps_and_entropies=given)


def inputs(c: dict[str, Tensor], advantages: Tensor) -> dict[str, Tensor]:
    ids = torch.zeros(6, MOST, dtype=torch.long)
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": c["mask"].long(),
        "advantages": advantages, "old_per_token_logps": c["old"], "ref_per_token_logps": c["reference"],
        "old_logps": (c["old"] * c["mask"]).sum(1), "num_items_in_batch": c["mask"].sum(),
    }  # fmt: skip


def ours(c: dict[str, Tensor], advantages: Tensor, per: Any, beta: float) -> tuple[Tensor, Tokens]:
    """The same answers one after the other."""
    owner = torch.repeat_interleave(torch.arange(6), LENGTHS)
    weights, counts = each_weight(LENGTHS, per, MOST)
    logps = c["now"][c["mask"]].clone().requires_grad_()
    tokens = Tokens(
        weights.double()[owner], counts.double().sum(), owner, advantages[owner], beta, c["old"][c["mask"]], c["reference"][c["mask"]]
    )  # fmt: skip
    return logps, tokens


VARIANTS = [
    ("grpo", "answer", "token", (0.2, 0.2), 0.0), ("grpo", "answer", "token", (0.2, 0.28), 0.04),
    ("dapo", "token", "token", (0.2, 0.28), 0.0), ("dapo", "token", "token", (0.1, 0.2), 0.1),
    ("dr_grpo", "constant", "token", (0.2, 0.2), 0.0), ("grpo", "answer", "sequence", (0.02, 0.03), 0.0),
    ("grpo", "answer", "sequence", (0.2, 0.2), 0.04),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "per", "level", "clip", "beta"), VARIANTS)
def test_grpo_is_trls(loss_type: str, per: str, level: str, clip: tuple[float, float], beta: float) -> None:
    from trl import GRPOTrainer

    c = case()
    advantages = group_advantages(c["rewards"], GROUP)
    theirs = c["now"].clone().requires_grad_()
    fake = trainer(
        theirs,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        beta=beta,
    )
    wanted = GRPOTrainer._compute_loss(fake, None, inputs(c, advantages))
    wanted.backward()
    logps, tokens = ours(c, advantages, per, beta)
    loss = grpo_loss(logps, tokens, clip, "answer" if level == "sequence" else "token")
    found = loss.sum / loss.count
    found.backward()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)  # the weights are float32
    assert theirs.grad is not None and logps.grad is not None and float(logps.grad.abs().sum()) > 0
    assert torch.allclose(logps.grad, theirs.grad[c["mask"]], rtol=1e-6, atol=1e-9)
    assert not theirs.grad[~c["mask"]].any()
    total, count = loss.metrics["clipped"]
    share = fake._metrics["train"]["clip_ratio/region_mean"][0]
    if level == "token":
        assert float(total / count) == pytest.approx(share, abs=1e-9) and share > 0


def test_rloo_is_trls() -> None:
    from trl import RLOOTrainer

    c = case(1)
    divergence = ((c["old"] - c["reference"]) * c["mask"]).sum(1)
    advantages = leave_one_out(c["rewards"] - 0.05 * divergence, GROUP)
    theirs = c["now"].clone().requires_grad_()
    wanted = RLOOTrainer._compute_loss(trainer(theirs), None, inputs(c, advantages))
    wanted.backward()
    logps, tokens = ours(c, advantages, "answer", 0.05)
    loss = sequence_loss(logps, tokens, (0.2, 0.2))
    found = loss.sum / loss.count
    found.backward()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)
    assert theirs.grad is not None and logps.grad is not None and float(logps.grad.abs().sum()) > 0
    assert torch.allclose(logps.grad, theirs.grad[c["mask"]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    """TRL's lines of `_generate_and_score_completions`, with its own `nanstd`."""
    from trl.trainer.utils import nanstd

    rewards = case(2)["rewards"]
    mean = torch.nanmean(rewards.view(-1, GROUP), dim=1).repeat_interleave(GROUP)
    std = {
        "group": nanstd(rewards.view(-1, GROUP), dim=1).repeat_interleave(GROUP), "batch": nanstd(rewards).expand_as(rewards)
    }.get(scale)  # fmt: skip
    wanted = rewards - mean if std is None else (rewards - mean) / (std + 1e-4)
    assert torch.allclose(group_advantages(rewards, GROUP, scale), wanted, atol=1e-12)  # type: ignore[arg-type]
