"""Laws of generation: what is written is what the model says of it, token by token, whoever stands in the cache beside it.

All in float64; the reference is transformers' own forward pass over each finished text, without a cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fettle.core.batch import Example, Node, pack
from fettle.generate import Completion, Sampling, engine
from fettle.generate.request import Request, limits
from fettle.generate.sample import answered
from fettle.models.forest import Forest
from laws.test_edits import Row, build, disturb, pairs
from laws.test_forest import CONFIGS, VOCABULARY, WITHOUT_INTERFACE, tiny

LENGTHS = (3, 17, 9, 1, 9, 12)  # prompts shorter and longer than a window of 6, and one that nothing is read of
BOUND = 1e-6  # transformers computes norms and softmax in float32


class Speller:
    """What generation asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = chat_template = None

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(map(str, tokens))

    def get_vocab(self) -> dict[str, int]:
        return {}


def prompts(*lengths: int) -> list[list[int]]:
    made = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (n,), generator=made).tolist() for n in lengths]


def write(forest: Forest, sampling: Sampling, **how: Any) -> list[Completion]:
    """Completions of the prompts, none of which an end token ends."""
    bounds = limits(forest, sampling, ends=frozenset())
    n = how.pop("n", 1)
    asked = [p for p in prompts(*LENGTHS) for _ in range(n)]
    which = how.pop("which", range(len(asked)))
    requests = [Request(i, list(asked[i]), i, sampling.max_tokens) for i in which]
    done = {r.index: bounds.completion(r) for r in answered(forest, requests, bounds, **how)}
    return [done[i] for i in which]


@torch.no_grad()
def said(model: nn.Module, prompt: list[int], done: Completion) -> Tensor:
    """[n, V]: the model's log-probabilities at each token of an answer, from one pass over the finished text."""
    ids = torch.tensor([[*prompt, *done.tokens]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def check(model: nn.Module, found: list[Completion], n: int = 1, bound: float = BOUND) -> None:
    """That every text is greedy, and every log-probability the model's."""
    for i, done in enumerate(found):
        logps = said(model, prompts(*LENGTHS)[i // n], done)
        assert list(done.tokens) == logps.argmax(-1).tolist()
        own = logps.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
        assert (own - torch.tensor(done.logps, dtype=torch.float64)).abs().max() < bound


@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - {"mamba"}))
def test_greedy_by_full_recomputation(kind: str) -> None:
    # BLOOM's own softmax overflows on a float64 mask of padding
    model, alone = (tiny(kind).float() if kind == "bloom" else tiny(kind) for _ in range(2))
    forest = Forest(model, Speller())
    assert (engine.obstacle(forest) is None) == (kind not in WITHOUT_INTERFACE)
    check(alone, write(forest, Sampling(max_tokens=9), rows=2), bound=1e-4 if kind == "bloom" else BOUND)


@pytest.mark.parametrize(("row", "kind"), pairs(on=("llama", "gpt2", "qwen3_moe")))
def test_with_every_edit(row: Row, kind: str) -> None:
    model = build(kind)
    row.edit.apply(model)
    disturb(model)
    found = write(Forest(model, Speller()), Sampling(max_tokens=6), rows=4)
    model.set_attn_implementation("eager")
    check(model, found)


@pytest.mark.parametrize("backend", ["segments", "dense"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_n_answers_share_their_prompt(kind: str, backend: str) -> None:
    model = tiny(kind)
    forest, read = Forest(model, Speller(), backend=backend), []
    model.register_forward_pre_hook(
        lambda *_: read.append("whole")
    )  # nothing goes through the model's own loss and head
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = write(forest, Sampling(max_tokens=9), n=3, rows=5)
    check(tiny(kind), found, n=3)
    assert all(found[i].tokens == found[i - i % 3].tokens for i in range(len(found)))
    packed = [shape for shape in read if shape[0] == 1 and shape[1] > 1]
    assert (
        len(packed) == 1 and sum(LENGTHS) - len(LENGTHS) <= packed[0][1] <= 64
    )  # each prompt once, and all of them in one row
    # 18 answers of 9 tokens in 5 rows: a row that is free goes to the next at once
    assert [shape[0] for shape in read if shape[1] == 1] == [5] * 36


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_samples_depend_on_their_seed_alone(kind: str) -> None:
    forest = Forest(tiny(kind), Speller())
    warm = Sampling(
        max_tokens=8, temperature=1.2, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.3
    )
    found = write(forest, warm, n=2)
    assert len({done.tokens for done in found}) == len(found)
    for rows in (1, 3):
        again = write(forest, warm, n=2, rows=rows)
        assert [d.tokens for d in again] == [d.tokens for d in found]
        for one, two in zip(again, found, strict=True):
            assert one.logps == pytest.approx(two.logps, abs=1e-9)
    assert [d.tokens for d in write(forest, warm, n=2, which=[9, 0, 4])] == [found[i].tokens for i in (9, 0, 4)]
    assert not {d.tokens for d in write(forest, warm.model_copy(update={"seed": 1}), n=2)} & {d.tokens for d in found}


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_trainer_sees_the_same_log_probabilities(backend: str) -> None:
    forest = Forest(tiny("gemma2"), Speller(), backend=backend)
    asked = prompts(*LENGTHS)
    for prompt, done in zip(asked, write(forest, Sampling(max_tokens=7, temperature=1.0), rows=3), strict=True):
        tokens = np.array([*prompt, *done.tokens], np.int32)
        weights = np.r_[np.zeros(len(prompt)), np.ones(len(done.tokens))].astype(np.float32)
        batch = pack([Example((Node(tokens, weights),), "x")], 32, 0)
        with torch.no_grad():
            assert forest.logps(batch).tolist() == pytest.approx(done.logps, abs=BOUND)
