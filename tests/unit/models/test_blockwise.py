"""A model run block by block is the model, and says where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fettle.core.batch import Batch, Example, Node, pack
from fettle.models.blockwise import Blockwise
from fettle.models.forest import Forest

WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64},
    "gemma3_text": {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64},  # run path by path
}  # fmt: skip


def build(kind: str) -> Forest:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval().requires_grad_(False)
    return Forest(model)


def batches(count: int = 3, length: int = 32) -> list[Batch]:
    """Two texts a row, and padding."""
    rng = np.random.default_rng(0)

    def text(n: int) -> Example:
        return Example((Node(rng.integers(3, 60, n).astype(np.int32), np.ones(n, np.float32)),), "x")

    return [pack([text(9 + i), text(12)], length, 0) for i in range(count)]


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_is_the_whole(kind: str, on_disk: bool, tmp_path: Path) -> None:
    forest, rows = build(kind), batches()
    run = Blockwise(forest, rows, tmp_path / "states" if on_disk else None)
    assert run.obstacle() is None
    last: list[torch.Tensor] = []
    handle = forest.model.get_submodule(run.names[-1]).register_forward_hook(
        lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    for batch in rows:
        forest.hidden(batch)
    handle.remove()
    run.start()
    assert (tmp_path / "states").exists() == on_disk
    size = run.bytes()
    for _ in run.names[:-1]:
        run.advance()
    found = [out for j in range(len(rows)) for out in run.run(j)]
    assert len(found) == len(last)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, last, strict=True))
    assert size == len(rows) * sum(s.numel() * 4 for s in run.entering(0))
    assert not any("forward" in m.__dict__ for m in forest.model.modules()), "nothing is left in the model"


def test_it_computes_one_block_at_a_time() -> None:
    forest = build("llama")
    run = Blockwise(forest, batches())
    run.start()
    run.advance()
    called: list[str] = []
    for name, module in forest.model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(lambda _, __, ___, name=name: called.append(name))
    run.run(0)
    assert called == ["model.layers.1.mlp"]


def test_gradients_reach_the_block_at_work() -> None:
    forest = build("llama")
    run = Blockwise(forest, batches())
    run.start()
    weight = forest.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    sum(out.square().sum() for out in run.run(0)).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_a_model_that_is_not_its_blocks_in_a_row_says_so() -> None:
    config = AutoConfig.for_model("t5", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    assert "two stacks" in (
        Blockwise(Forest(AutoModelForSeq2SeqLM.from_config(config).eval()), batches()).obstacle() or ""
    )
    forest = build("llama")
    first, second = forest.model.model.layers[:2]
    plain, other = first.forward, second.forward
    beside: list[Any] = []

    def write(x: Any, *args: Any, **kwargs: Any) -> Any:
        beside[:] = [x]
        return plain(x, *args, **kwargs)

    first.forward = write
    second.forward = lambda x, *args, **kwargs: other(x, *args, **kwargs) + beside[0]
    assert "hand on more than their states" in (Blockwise(forest, batches()).obstacle() or "")
    forest.model.get_input_embeddings().register_forward_hook(lambda *_: beside.clear())
    assert "do not run alone" in (Blockwise(forest, batches()).obstacle() or "")
