"""A reward model as a reward: its scores are those of each text alone, and the text is what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fettle.core.batch import pack
from fettle.core.errors import FettleError
from fettle.data.formats import to_sample
from fettle.data.preference import Preference
from fettle.data.template import Encoder
from fettle.feedback import model as module
from fettle.feedback.model import ModelReward, model_scores
from fettle.feedback.reward import Means
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec

TALK = [{"role": "user", "content": "Which bread is best?"}]
OTHER = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Count the stones."}]


@pytest.fixture(scope="module")
def forest(tiny_llama: Path) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), task="classify", labels=("reward",), dtype="float32"))


def alone(forest: Forest, tokens: list[int]) -> float:
    """The head's number for one text, by transformers itself."""
    with torch.no_grad():
        return float(
            forest.model.eval()(input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens))).logits[
                0, 0
            ]
        )


def test_scores_are_those_of_each_text_alone(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [TALK, TALK, TALK, OTHER, "The baker sells", "The baker sells", TALK]
    answers = ["The morning one.", "Cakes", "", "One, two", " bread", "", "Cakes"]
    plain = load(
        ModelSpec(path=forest.spec.path, task="classify", labels=("reward",), dtype="float32", attention="paths")
    )
    wanted = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(prompt, str):
            tokens = forest.tokenizer(prompt + answer)["input_ids"] + [forest.tokenizer.eos_token_id]
        else:
            text = forest.tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": answer}], tokenize=False
            )
            tokens = forest.tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        wanted.append(alone(plain, tokens))
    found = ModelReward(path="rm").score(prompts, answers, Means(forests={"rm": forest}))
    np.testing.assert_allclose(found, wanted, atol=2e-6)  # float32, another order of sums
    assert found[1] == pytest.approx(found[6], abs=2e-6) and len({round(f, 4) for f in found}) == 6
    monkeypatch.setattr(module, "ROW", 40)  # several rows
    np.testing.assert_allclose(model_scores(forest, prompts, answers), wanted, atol=2e-6)


TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {}}}]


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_the_text_is_that_of_training(tools: list[dict[str, Any]], forest: Forest) -> None:
    """What the form of preferences makes of a pair gives the same two scores."""
    row = {"messages": OTHER, "tools": tools, "chosen": "One, two", "rejected": "A short answer"}
    form = Preference()
    (encoded,) = form.encode(Encoder(forest.tokenizer, form=form), [to_sample(row, "preference")])
    assert not isinstance(encoded, str)
    example = form.example(encoded[0], len(encoded[0].tokens))
    with torch.no_grad():
        scores = forest.scores(pack([example], len(example), 0))[:, 0].tolist()
    prompts, answers, means = [OTHER] * 2, ["One, two", "A short answer"], Means({"rm": forest}, offered=[tools, tools])
    found = ModelReward(path="rm").score(prompts, answers, means)
    assert found == pytest.approx(scores, abs=2e-6)
    assert (found == pytest.approx(model_scores(forest, prompts, answers), abs=2e-6)) == (not tools)


def test_what_cannot_be_scored_is_told(forest: Forest, tiny_llama: Path) -> None:
    with pytest.raises(FettleError, match="reward 'rm': the reward model is not open"):
        ModelReward(path="rm").score([TALK], ["a"])
    causal = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    with pytest.raises(FettleError, match="reward 'rm': LlamaForCausalLM has no head of one number"):
        ModelReward(path="rm").score([TALK], ["a"], Means(forests={"rm": causal}))
    two = load(ModelSpec(path=str(tiny_llama), task="classify", labels=("no", "yes"), dtype="float32"))
    with pytest.raises(FettleError, match="has no head of one number"):
        model_scores(two, [TALK], ["a"])
    with pytest.raises(
        FettleError,
        match=r"the answer 'word word.*' to 'Which bread is best\?' has \d+ tokens with its prompt.* sees 512",
    ):
        model_scores(forest, [TALK], ["word " * 600])


def test_a_model_in_training_goes_on_training(forest: Forest) -> None:
    forest.model.train()
    model_scores(forest, [TALK], ["a"])
    assert forest.model.training
    forest.model.eval()
