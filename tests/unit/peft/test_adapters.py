"""Several LoRAs on one base: blends, merges, and a batch in which each path has its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.peft import AdaLoRA, LoRA, PromptTuning, PTuningV2
from fettle.peft.adapters import TILE, Adapters, Tiles, routed
from fettle.peft.combine import Update, Updates, compressed, dare, dare_ties, install, summed, ties, unwrap, updates_of

EDITS = {
    "french": LoRA(rank=4, targets=("q_proj", "down_proj")),
    "german": LoRA(rank=2, alpha=3.0, rslora=True),
    "maths": AdaLoRA(rank=3, target_rank=2, targets=("q_proj", "up_proj")),
    "facts": LoRA(rank=2, init="pissa", targets=("v_proj",)),
}


def built() -> Forest:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=64
    )  # fmt: skip
    return Forest(AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def trained() -> dict[str, Updates]:
    """What each edit adds, after something like training."""
    found = {}
    for i, (name, edit) in enumerate(EDITS.items()):
        forest = built()
        edit.apply(forest.model)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in forest.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        found[name] = updates_of(forest.model)
        unwrap(forest.model, [edit])
        assert torch.equal(logits(forest), logits(built()))
    return found


TOKENS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(forest: Forest, tokens: Tensor = TOKENS) -> Tensor:
    return forest.model(input_ids=tokens).logits


def alone(updates: Updates, tokens: Tensor = TOKENS) -> Tensor:
    forest = built()
    install(forest.model, updates)
    return logits(forest, tokens)


def test_adapters_are_switched_blended_and_taken_off(trained: dict[str, Updates]) -> None:
    forest = built()
    base = logits(forest)
    adapters = Adapters(forest, trained)
    assert torch.equal(logits(forest), base)
    for name in trained:
        adapters.use(name)
        assert torch.allclose(logits(forest), alone(trained[name]), atol=1e-10)
        assert (logits(forest) - base).abs().max() > 1e-3
    adapters.use({"french": 0.5, "maths": -2.0})
    mixed = summed([trained["french"], trained["maths"]], [0.5, -2.0])
    assert torch.allclose(logits(forest), alone(mixed), atol=1e-10)
    adapters.use(None)
    assert torch.equal(logits(forest), base)
    adapters.use("french")
    adapters.close()
    assert torch.equal(logits(forest), base)
    with pytest.raises(FettleError, match="there is none called 'frensh'; did you mean 'french'"):
        adapters.use("frensh")


def forest_batch() -> tuple[Batch, list[list[int]]]:
    """Documents and prompts with children, and the segments of each path."""
    rng = np.random.default_rng(0)

    def node(size: int, parent: int = -1) -> Node:
        return Node(rng.integers(0, 64, size).astype(np.int32), np.zeros(size, np.float32), parent)

    examples = [Example((node(7),), "x"), Example((node(5), node(3, 0), node(6, 0)), "y"), Example((node(90),), "z")]
    batch = pack([*examples, Example((node(4),), "w")], 128, 0)
    return batch, [[0], [1, 2], [1, 3], [4], [5]]


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_batch_with_an_adapter_each_is_one_adapter_at_a_time(trained: dict[str, Updates], backend: str) -> None:
    forest = built().with_backend(backend)
    batch, paths = forest_batch()
    adapters = Adapters(forest, trained)
    names = ["german", "french", "french", "french", "maths", None, None]
    adapters.route(batch, names)
    with torch.no_grad():
        together = forest.logits(batch, torch.arange(128))
    for path in paths:
        index = torch.cat([torch.arange(batch.segments[i].start, batch.segments[i].stop) for i in path])
        name = names[path[-1]]
        expected = (
            logits(built(), batch.tokens[index][None])
            if name is None
            else alone(trained[name], batch.tokens[index][None])
        )
        assert torch.allclose(together[index], expected[0], atol=1e-6)  # transformers' norms are in float32


def test_rows_of_a_plain_batch_and_of_a_step_of_generation(trained: dict[str, Updates]) -> None:
    forest = built()
    base = logits(forest)
    adapters = Adapters(forest, trained)
    names = ["maths", None, "facts", "german"]
    adapters.route_rows(names)
    for tokens in (TOKENS, TOKENS[:, :1]):
        found = logits(forest, tokens)
        for i, name in enumerate(names):
            if name is not None:
                assert torch.allclose(found[i], alone(trained[name], tokens)[i], atol=1e-10)
    assert torch.allclose(logits(forest)[1], base[1], atol=1e-12)
    with pytest.raises(FettleError, match="not those of the batch that was routed"):
        logits(forest, TOKENS[:3])


def test_routed_has_the_gradient_of_one_product_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(-1, 3, (3 * TILE,), generator=generator)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    y, x, a, b = draw(len(owners), 6), draw(len(owners), 5), draw(3, 2, 5), draw(3, 6, 2)
    found = routed(y, x, a, b, Tiles.of(owners.numpy(), torch.device("cpu")))
    each = torch.stack([y[t] if g < 0 else y[t] + b[g] @ a[g] @ x[t] for t, g in enumerate(owners.tolist())])
    assert torch.allclose(found, each, atol=1e-12)
    up = torch.randn_like(each)
    for one, two in zip(
        torch.autograd.grad(found, (y, x, a, b), up), torch.autograd.grad(each, (y, x, a, b), up), strict=True
    ):
        assert torch.allclose(one, two, atol=1e-10)


def dense(updates: Updates) -> dict[str, Tensor]:
    return {name: update.dense() for name, update in updates.items()}


def test_merges_are_pefts(trained: dict[str, Updates]) -> None:
    """Against the functions on dense deltas that `peft` merges with; full rank here, so that nothing is cut off."""
    utils: Any = pytest.importorskip("peft.utils.merge_utils")
    both, weights = [trained["french"], trained["german"]], [0.7, 1.5]
    shared = set(trained["french"])
    tensor = torch.tensor(weights, dtype=torch.float64)
    found = dense(ties(both, weights, rank=99, density=0.4))
    for name in shared:
        assert torch.allclose(found[name], utils.ties([u[name].dense() for u in both], tensor, 0.4), atol=1e-10)
    for mine, theirs in ((dare, utils.dare_linear), (dare_ties, utils.dare_ties)):
        name = next(iter(trained["french"]))
        one = [{name: u[name]} for u in both]
        found = dense(mine(one, weights, rank=99, density=0.5, seed=11))
        torch.manual_seed(11)
        assert torch.allclose(found[name], theirs([u[name].dense() for u in both], tensor, 0.5), atol=1e-10)
    exact = dense(summed(both, weights))
    for name in shared:
        assert torch.allclose(exact[name], utils.task_arithmetic([u[name].dense() for u in both], tensor), atol=1e-12)
    assert set(exact) == set(trained["german"])


def test_compression_is_the_best_of_its_rank(trained: dict[str, Updates]) -> None:
    update = next(iter(summed([trained["french"], trained["german"]], [1.0, 1.0]).values()))
    assert update.rank == 6
    cut = compressed(update, 3)
    assert cut.rank == 3 and compressed(update, 6) is update
    values = torch.linalg.svdvals(update.dense())
    assert (update.dense() - cut.dense()).norm().item() == pytest.approx(values[3:].norm().item(), rel=1e-8)


def test_a_sum_becomes_a_lora_that_an_artifact_can_hold(trained: dict[str, Updates]) -> None:
    forest = built()
    mixed = summed([trained["french"], trained["german"]], [1.0, 0.5])
    edit = install(forest.model, mixed)
    again = updates_of(forest.model)
    assert all(torch.allclose(again[n].dense(), u.dense(), atol=1e-12) for n, u in mixed.items())
    other = built()
    edit.apply(other.model)
    for name, tensor in edit.tensors(other.model).items():
        tensor.copy_(edit.tensors(forest.model)[name])
    assert torch.allclose(logits(other), logits(forest), atol=1e-12)


def test_what_cannot_be_switched_says_so(trained: dict[str, Updates]) -> None:
    forest = built()
    LoRA(rank=2, dora=True).apply(forest.model)
    with pytest.raises(FettleError, match="is a DoRA, which rescales"):
        updates_of(forest.model)
    wrong = {"x": {"model.layers.9.q": Update(torch.zeros(1, 2), torch.zeros(2, 1))}}
    with pytest.raises(FettleError, match="'model.layers.9.q' is no linear layer of this model"):
        Adapters(built(), wrong)
    name = next(iter(trained["french"]))
    with pytest.raises(FettleError, match="it belongs to another base"):
        Adapters(built(), {"x": {name: Update(torch.zeros(1, 2), torch.zeros(2, 1))}})
    with pytest.raises(FettleError, match="belong to different bases"):
        summed([trained["french"], {name: Update(torch.zeros(1, 2), torch.zeros(2, 1))}], [1.0, 1.0])
    with pytest.raises(FettleError, match="2 names for 7 segments"):
        Adapters(built(), trained).route(forest_batch()[0], ["french", None])
    with pytest.raises(FettleError, match="path by path"):
        Adapters(built().with_backend("paths"), trained).route(forest_batch()[0], [None] * 7)


def test_a_batch_is_routed_behind_a_deep_prompt_and_not_behind_a_shallow_one(trained: dict[str, Updates]) -> None:
    torch.manual_seed(3)
    prompts = [PTuningV2(tokens=3, init="random"), PromptTuning(tokens=3, init="random")]
    batch, paths = forest_batch()
    names = ["german", "french", "french", "french", "maths", None, None]
    forest = built()
    prompts[0].apply(forest.model)
    adapters = Adapters(forest, trained)
    adapters.route(batch, names)
    with torch.no_grad():
        together = forest.logits(batch, torch.arange(128))
        for path in paths:
            index = torch.cat([torch.arange(batch.segments[i].start, batch.segments[i].stop) for i in path])
            adapters.use(names[path[-1]])
            assert torch.allclose(together[index], logits(forest, batch.tokens[index][None])[0], atol=1e-6)
    forest = built()
    prompts[1].apply(forest.model)
    adapters = Adapters(forest, trained)
    with pytest.raises(FettleError, match="the rows of a soft prompt stand once before all texts"):
        adapters.route(batch, names)
