"""The engine beside the laws of laws/test_generate.py: what ends it, what it costs, what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fettle.core import FettleError
from fettle.generate import Local, Sampling, engine, generate, prompter
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA, PromptTuning
from unit.generate.test_sample import prompts


@pytest.fixture
def forest(tiny_llama) -> Forest:
    made = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    made.model.double()
    return made


def test_answers_of_uneven_lengths_share_the_rows(forest: Forest, tokenizer) -> None:
    """With stop texts, answers end anywhere; each is what it is alone."""
    asked = prompts(len(tokenizer), 5, 30, 2, 11, 7, 19)
    warm = Sampling(max_tokens=24, temperature=1.0, stop=("e", "7", "a"))
    alone = [generate(forest, [p], warm, seeds=[i])[0] for i, p in enumerate(asked)]
    assert len({len(c.tokens) for c in alone}) > 2 and {c.reason for c in alone} >= {"stop"}
    for rows in (1, 2, 3, 6):
        assert [c.text for c in generate(forest, asked, warm, rows=rows)] == [c.text for c in alone]


def test_weights_that_change_between_two_calls_are_seen(forest: Forest, tokenizer) -> None:
    asked = prompts(len(tokenizer), 6, 9)
    short = Sampling(max_tokens=16)
    base = generate(forest, asked, short)
    edit = LoRA(rank=4)
    edit.apply(forest.model)
    assert [c.tokens for c in generate(forest, asked, short)] == [c.tokens for c in base]
    for parameter in forest.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    tuned = generate(forest, asked, short)
    assert [c.tokens for c in tuned] != [c.tokens for c in base]
    edit.merge(forest.model)
    assert [c.tokens for c in generate(forest, asked, short)] == [c.tokens for c in tuned]


def test_a_soft_prompt_is_on_again_whatever_happens(forest: Forest, tokenizer) -> None:
    PromptTuning(tokens=3).apply(forest.model)
    asked = prompts(len(tokenizer), 6, 1)
    front = forest.model.fettle_prompt
    together = generate(forest, asked, Sampling(max_tokens=3))
    assert front.enabled
    assert generate(forest, asked[1:], Sampling(max_tokens=3))[0].tokens == together[1].tokens  # nothing else is read

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    forest.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(forest, asked[1:], Sampling(max_tokens=3))
    assert front.enabled


def test_a_model_that_gives_no_numbers_says_so(forest: Forest) -> None:
    forest.model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(FettleError, match="after 2 tokens of request 0 the model gives no numbers"):
        generate(forest, [[5, 6]])


def test_one_place_decides_who_serves(forest: Forest) -> None:
    assert engine.obstacle(forest) is None
    assert engine.obstacle(forest.with_backend("paths")) is not None


@pytest.mark.parametrize("faulty", [False, True])
def test_an_architecture_nobody_tried_is_tried_first(
    forest: Forest, tokenizer, monkeypatch: pytest.MonkeyPatch, faulty: bool
) -> None:
    asked = prompts(len(tokenizer), 6, 9)
    expected = generate(forest, asked, Sampling(max_tokens=6))
    monkeypatch.setattr(engine, "PROVEN", frozenset())
    body = forest.model.model
    forward = body.forward

    def by_itself(**given: Any) -> Any:
        """Counts positions from 0 in every call, as a model may that asks a cache of transformers how far it is."""
        if given["input_ids"].shape[1] == 1:
            given["position_ids"] = torch.zeros_like(given["position_ids"])
        return forward(**given)

    if faulty:
        body.forward = by_itself
    assert (engine.obstacle(forest) is None) == (not faulty)
    if not faulty:
        assert generate(forest, asked, Sampling(max_tokens=6)) == expected


def test_a_local_engine_renders_by_the_models_own_template(forest: Forest, tokenizer) -> None:
    talk, text = [{"role": "user", "content": "Count the red stones."}], "The baker"
    ticks: list[int] = []
    found = Local(forest).generate([talk, text], Sampling(max_tokens=5, temperature=1.0), n=2, progress=ticks.append)
    render = prompter(tokenizer)
    asked = [render.chat(talk), render.plain(text)]
    assert found == generate(forest, asked, Sampling(max_tokens=5, temperature=1.0), n=2) and sum(ticks) == 4
    assert found[0].tokens != found[1].tokens
    with pytest.raises(FettleError, match="3 seeds for 2 prompts and n 2"):
        Local(forest).generate([talk, text], n=2, seeds=[1, 2, 3])
