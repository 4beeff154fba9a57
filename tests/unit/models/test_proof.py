"""An architecture that nobody tried is tried as it loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fettle.core.errors import FettleError
from fettle.models import proof
from fettle.models.forest import Forest, pick
from fettle.models.spec import ModelSpec


def model(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **more)).eval()
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return made


@pytest.fixture(autouse=True)
def _unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PROVEN", frozenset())


def leak(made: Any) -> None:
    """A layer that carries a state along the row, as a recurrent one does."""
    made.model.layers[0].mlp.register_forward_hook(lambda m, i, out: out + 0.3 * out.cumsum(1))


def test_a_true_model_passes() -> None:
    assert proof.prove(Forest(model())).backend == "segments"
    assert proof.prove(Forest(model().bfloat16())).backend == "segments"


def test_a_model_that_leaks_falls_back_to_paths() -> None:
    made = model()
    leak(made)
    forest = proof.prove(Forest(made))
    assert forest.backend == "paths" and proof.difference(forest) < 1e-3


def test_a_leak_that_was_asked_for_is_refused() -> None:
    made = model().bfloat16()
    leak(made)
    with pytest.raises(FettleError, match="differ from those of each document alone"):
        proof.prove(Forest(made, spec=ModelSpec(attention="segments")))


def test_a_factor_at_the_head_that_fettle_does_not_know_is_refused() -> None:
    made = model()
    call = made.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    made.forward = scaled
    with pytest.raises(FettleError, match="train something else"):
        proof.prove(Forest(made))


def test_layers_that_no_mask_can_stop_run_by_paths() -> None:
    made = model()
    made.config.layer_types = ["full_attention", "linear_attention"]
    assert pick(made) == "paths"
    with pytest.raises(FettleError, match="layers of another kind"):
        pick(made, "segments")
