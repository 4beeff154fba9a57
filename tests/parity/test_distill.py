"""Divergences against TRL's generalised Jensen-Shannon loss, values and gradients."""

from __future__ import annotations

import warnings

import pytest
import torch

from fettle.objectives.distill import Target, distance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("temperature", [1.0, 0.9, 3.0])
def test_divergences_are_those_of_trl(kind: str, beta: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, u = (3 * torch.randn(13, 101, generator=generator, dtype=torch.float64) for _ in range(2))
    found = z.clone().requires_grad_()
    mine = distance(found, Target.of(u, temperature, None), kind, temperature, beta).mean()  # type: ignore[arg-type]
    mine.backward()
    other = z.clone().requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        other[None], u[None], beta=beta, temperature=temperature, reduction="none"
    )
    theirs = theirs.sum(-1).mean()
    theirs.backward()
    rounding = 1e-6 if kind == "jsd" else 1e-12  # beta is a float32 tensor there
    assert torch.allclose(mine, theirs, rtol=rounding)
    assert found.grad is not None and torch.allclose(found.grad, other.grad, rtol=rounding, atol=rounding * 1e-2)
