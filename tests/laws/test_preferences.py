"""The law of preferences: a prompt with its answers as one tree = each prompt with an answer as a row of its own.

Every objective over preferences, its loss and the gradients of a LoRA whose reference is the same model with the LoRA off, in
float64, against log-probabilities that transformers computes of each row alone and the formulae of the papers. transformers
computes softmax and rotary tables in float32 whatever the model, hence 1e-5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fettle.core.batch import Batch, pack
from fettle.core.families import Objective
from fettle.data.preference import MOST, joined_at, tree
from fettle.data.template import Encoded
from fettle.models.forest import Forest
from fettle.models.roles import without
from fettle.objectives import CDPO, DPO, IPO, KTO, ORPO, Hinge, Reward, Robust, SimPO
from fettle.peft import LoRA, TaskHead
from fettle.stages.artifact import apply_edits

VOCABULARY, LENGTH = 61, 160
CONFIG = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def forest_of(auto: str = "AutoModelForCausalLM", **more: Any) -> Forest:
    import transformers

    config = transformers.AutoConfig.for_model(**(CONFIG | more))
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").double()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Forest(model)


def tuned(forest: Forest, *edits: Any, seed: int = 1) -> tuple[Forest, LoRA]:
    lora = LoRA(rank=3)
    apply_edits(forest, (*edits, lora), 0)
    torch.manual_seed(seed)
    for module in forest.model.modules():
        if getattr(module, "edit", None) is lora:
            module.b.data.normal_(std=0.1)  # type: ignore[union-attr, operator]
    return forest, lora


def paths(rng: np.random.Generator, prompt: int, answers: list[int]) -> list[Encoded]:
    """A prompt and answers of these lengths, each as the encoder would give it."""
    first = rng.integers(3, VOCABULARY, prompt)
    made = []
    for n in answers:
        tokens = np.concatenate([first, rng.integers(3, VOCABULARY, n)]).astype(np.int32)
        made.append(Encoded(tokens, ((prompt, prompt + n, 1.0),)))
    return made


def rows(single: bool) -> list[tuple[list[Encoded], tuple[float, ...]]]:
    """(paths, (weight, margin, *ranks)): pairs, a ranking with a tie, a prompt of one token; or judged answers."""
    rng = np.random.default_rng(3)
    if single:
        return [
            (paths(rng, 7, [5]), (1.0, 0.0, 1.0)),
            (paths(rng, 4, [9]), (2.0, 0.0, 2.0)),
            (paths(rng, 5, [3, 6]), (1.0, 0.0, 1.0, 2.0)),
        ]
    return [
        (paths(rng, 9, [6, 4]), (1.0, 0.5, 1.0, 2.0)),
        (paths(rng, 5, [3, 7, 5, 2]), (2.0, 0.0, 1.0, 2.0, 2.0, 4.0)),
        (paths(rng, 1, [4, 8]), (1.0, 1.5, 1.0, 2.0)),
    ]


def batch_of(found: list[tuple[list[Encoded], tuple[float, ...]]]) -> Batch:
    from dataclasses import replace

    examples = [
        replace(tree(replace(joined_at(p), labels=labels)), name=f"row {i}") for i, (p, labels) in enumerate(found)
    ]
    return pack(examples, LENGTH, 0)


def logp(model: Any, path: Encoded) -> Tensor:
    """log p(answer | prompt), by transformers, of a row alone."""
    tokens = torch.from_numpy(path.tokens).long()
    ((start, stop, _),) = path.spans
    logps = model(input_ids=tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
    return logps[torch.arange(start - 1, stop - 1), tokens[start:stop]].sum()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def log_odds(logp: Tensor) -> Tensor:
    p = logp.exp()
    return (p / (1 - p)).log()


BETA, NOISE = 0.3, 0.2
PAIRED: dict[str, tuple[Objective, Any]] = {
    # (objective, loss of a pair from log p and log p_ref of the better and the worse answer, and their lengths)
    "dpo": (DPO(beta=BETA), lambda b, w, rb, rw, nb, nw: -sigmoid(BETA * (b - rb - w + rw)).log()),
    "cdpo": (
        CDPO(beta=BETA, noise=NOISE),
        lambda b, w, rb, rw, nb, nw: -(1 - NOISE) * sigmoid(BETA * (b - rb - w + rw)).log() - NOISE * sigmoid(-BETA * (b - rb - w + rw)).log(),
    ),
    "robust": (
        Robust(beta=BETA, noise=NOISE),
        lambda b, w, rb, rw, nb, nw: (-(1 - NOISE) * sigmoid(BETA * (b - rb - w + rw)).log() + NOISE * sigmoid(-BETA * (b - rb - w + rw)).log())
        / (1 - 2 * NOISE),
    ),
    "hinge": (Hinge(beta=BETA), lambda b, w, rb, rw, nb, nw: torch.relu(1 - BETA * (b - rb - w + rw))),
    "ipo": (IPO(beta=BETA), lambda b, w, rb, rw, nb, nw: ((b - rb) / nb - (w - rw) / nw - 1 / (2 * BETA)) ** 2),
    "ipo, sums": (IPO(beta=BETA, average=False), lambda b, w, rb, rw, nb, nw: (b - rb - w + rw - 1 / (2 * BETA)) ** 2),
    "simpo": (SimPO(beta=BETA, gamma=0.4), lambda b, w, rb, rw, nb, nw: -sigmoid(BETA * (b / nb - w / nw) - 0.4).log()),
    "orpo": (ORPO(weight=0.7), lambda b, w, rb, rw, nb, nw: -b / nb - 0.7 * sigmoid(log_odds(b / nb) - log_odds(w / nw)).log()),
}  # fmt: skip


def gradients(forest: Forest, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in forest.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def agree(forest: Forest, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(forest, found), gradients(forest, expected)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", PAIRED)
def test_a_tree_is_its_rows(name: str) -> None:
    objective, formula = PAIRED[name]
    forest, lora = tuned(forest_of())
    found = rows(single=False)
    loss = objective(forest, batch_of(found))
    expected, count = torch.zeros((), dtype=torch.float64), 0.0
    for made, (weight, _, *ranks) in found:
        policy = [logp(forest.model, p) for p in made]
        with torch.no_grad(), without(forest.model, [lora]):
            reference = [logp(forest.model, p) for p in made]
        sizes = [p.spans[0][1] - p.spans[0][0] for p in made]
        some = [(i, j) for i in range(len(made)) for j in range(len(made)) if ranks[i] < ranks[j]]
        each = [formula(policy[i], policy[j], reference[i], reference[j], sizes[i], sizes[j]) for i, j in some]
        expected = expected + weight * torch.stack(each).mean()
        count += weight
    assert float(loss.count) == pytest.approx(count)
    agree(forest, loss.sum, expected)


@pytest.mark.parametrize("context", [128, 13], ids=["wide", "narrow"])
def test_kto_is_its_rows(context: int) -> None:
    """Where the context is narrow, a mismatched answer ends with it."""
    forest, lora = tuned(forest_of(max_position_embeddings=context), seed=2)
    found = rows(single=True)
    objective = KTO(beta=BETA, desired=1.5, undesired=0.5)
    loss = objective(forest, batch_of(found))
    firsts = [made[0] for made, _ in found]
    crossed = []
    for one, other in zip(firsts, [firsts[-1], *firsts[:-1]], strict=True):
        prompt, answer = one.tokens[: one.spans[0][0]], other.tokens[other.spans[0][0] :]
        answer = answer[: context - len(prompt)]
        crossed.append(Encoded(np.concatenate([prompt, answer]), ((len(prompt), len(prompt) + len(answer), 1.0),)))

    def ratio(path: Encoded) -> Tensor:
        with torch.no_grad(), without(forest.model, [lora]):
            before = logp(forest.model, path)
        return logp(forest.model, path) - before

    assert max(len(p.tokens) for p in crossed) == (14 if context > 13 else 13)
    z = torch.stack([ratio(p) for p in crossed]).mean().detach().clamp_min(0)
    expected = torch.zeros((), dtype=torch.float64)
    for made, (weight, _, *ranks) in found:
        for path, rank in zip(made, ranks, strict=True):
            good = rank == 1
            value = (
                1.5 * (1 - sigmoid(BETA * (ratio(path) - z))) if good else 0.5 * (1 - sigmoid(BETA * (z - ratio(path))))
            )
            expected = expected + weight * value
    assert z > 0, "the estimate is clamped, and the test says nothing about it"
    agree(forest, loss.sum, expected)


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_a_reward_is_that_of_each_row(centre: float) -> None:
    forest, _ = tuned(forest_of("AutoModelForSequenceClassification", num_labels=1, pad_token_id=0), TaskHead())
    found = rows(single=False)
    loss = Reward(centre=centre)(forest, batch_of(found))
    expected = torch.zeros((), dtype=torch.float64)
    for made, (weight, margin, *ranks) in found:
        score = [forest.model(input_ids=torch.from_numpy(p.tokens).long()[None]).logits[0, 0] for p in made]
        some = [(i, j) for i in range(len(made)) for j in range(len(made)) if ranks[i] < ranks[j]]
        each = [-sigmoid(score[i] - score[j] - margin).log() + centre * (score[i] + score[j]) ** 2 for i, j in some]
        expected = expected + weight * torch.stack(each).mean()
    agree(forest, loss.sum, expected)


def test_a_reference_that_the_batch_brings_is_taken() -> None:
    forest, lora = tuned(forest_of())
    batch = batch_of(rows(single=False))
    live = DPO()(forest, batch)
    kept = torch.full((3, MOST), math.nan, dtype=torch.float64)
    with torch.no_grad(), without(forest.model, [lora]):
        for i, (made, _) in enumerate(rows(single=False)):
            kept[i, : len(made)] = torch.stack([logp(forest.model, p) for p in made])
    batch.extra["reference"] = kept
    torch.testing.assert_close(DPO()(forest, batch).sum, live.sum, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "paths"])
def test_every_backend_gives_the_same(backend: str) -> None:
    forest, _ = tuned(forest_of())
    batch = batch_of(rows(single=False))
    wanted = DPO()(forest, batch).sum
    torch.testing.assert_close(DPO()(forest.with_backend(backend), batch).sum, wanted, rtol=1e-5, atol=1e-6)
