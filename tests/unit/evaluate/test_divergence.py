"""The divergence of a policy from its start: each answer's log-probabilities are those of its text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.evaluate import divergence as module
from fettle.evaluate.divergence import divergences, log_probabilities
from fettle.generate import Sampling, generate
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA
from fettle.stages.artifact import apply_edits

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ANSWERS = [[[12, 13], [14]], [[15, 16, 17], [18, 19]], [[20], []]]


def opened(folder: Path) -> Forest:
    return load(ModelSpec(path=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def start(tiny_llama: Path) -> Forest:
    return opened(tiny_llama)


@pytest.fixture(scope="module")
def policy(tiny_llama: Path) -> Forest:
    forest = apply_edits(opened(tiny_llama), [LoRA(rank=4)])
    torch.manual_seed(1)
    for name, parameter in forest.model.named_parameters():
        if parameter.requires_grad and "lora_b" in name.lower() or name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.2)
    return forest


@torch.no_grad()
def alone(forest: Forest, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt), a row of its own."""
    logits = forest.model.eval()(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))


def test_log_probabilities_are_those_of_each_text_alone(
    tiny_llama: Path, start: Forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(ModelSpec(path=str(tiny_llama), dtype="float32", attention="paths"))
    wanted = [alone(plain, p, a) for p, some in zip(PROMPTS, ANSWERS, strict=True) for a in some]
    whole = log_probabilities(start, PROMPTS, ANSWERS)
    monkeypatch.setattr(module, "ROW", 6)  # a prompt a row
    assert whole == pytest.approx(wanted, abs=2e-5) and wanted[-1] == 0.0
    assert log_probabilities(start, PROMPTS, ANSWERS) == pytest.approx(wanted, abs=2e-5)


def test_a_policy_is_no_way_from_itself_and_some_way_from_another(start: Forest, policy: Forest) -> None:
    assert divergences(start, start, PROMPTS, ANSWERS) == [0.0] * 6
    written = generate(policy, PROMPTS, Sampling(max_tokens=6, temperature=1.0, seed=3), n=40)
    answers = [[list(c.tokens) for c in written[i : i + 40]] for i in range(0, 120, 40)]
    found = divergences(policy, start, PROMPTS, answers)
    assert sum(found) / len(found) > 0.05 and min(found) < 0  # its mean is a divergence, each term is not
    own = log_probabilities(policy, PROMPTS, answers)
    assert own == pytest.approx([sum(c.logps) for c in written], abs=1e-4)  # as the sampler drew them
    assert not policy.model.training


def test_another_tokenizer_has_no_divergence(start: Forest, tiny_llama: Path) -> None:
    other = opened(tiny_llama)
    other.tokenizer.add_tokens(["<another>"])
    with pytest.raises(FettleError, match="different tokenizers"):
        divergences(start, other, PROMPTS, ANSWERS)
