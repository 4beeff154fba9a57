from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.data.pairs import dress_of
from fettle.evaluate import TaskFile, evaluate
from fettle.evaluate.likelihood import from_tokens, likelihoods
from fettle.generate.sample import Sampling, generate
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from small import make, rows

PROMPTS = ["count the red stones", "Ada lives in Paris and works in the garden at night", "one"]


@pytest.fixture(params=["t5", "bart"])
def forest(request: pytest.FixtureRequest, tmp_path: Path) -> Forest:
    found = load(ModelSpec(path=str(make(request.param, tmp_path / "model")), dtype="float32", device="cpu"))
    found.model.double()
    for name, parameter in found.model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return found


def sources(forest: Forest) -> list[list[int]]:
    return [forest.tokenizer(text)["input_ids"] for text in PROMPTS]


def test_greedy_is_that_of_transformers(forest: Forest) -> None:
    found = generate(forest, sources(forest), Sampling(max_tokens=12))
    for prompt, done in zip(sources(forest), found, strict=True):
        wanted = forest.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, num_beams=1)[
            0, 1:
        ].tolist()
        assert list(done.tokens) == wanted[: len(done.tokens)] and len(done.tokens) in (12, len(wanted))
        labels = torch.tensor([list(done.tokens)])
        logits = forest.model(input_ids=torch.tensor([prompt]), labels=labels).logits[0]
        logps = logits.log_softmax(-1).gather(1, labels[0][:, None])[:, 0]
        assert torch.allclose(torch.tensor(done.logps, dtype=torch.float64), logps, atol=1e-5)


def test_a_penalty_counts_what_the_decoder_wrote(forest: Forest) -> None:
    (done,) = generate(forest, sources(forest)[:1], Sampling(max_tokens=12, repetition_penalty=1.5))
    wanted = forest.model.generate(
        torch.tensor(sources(forest)[:1]), max_new_tokens=12, do_sample=False, num_beams=1, repetition_penalty=1.5
    )[0, 1:].tolist()
    assert list(done.tokens) == wanted[: len(done.tokens)]


def test_samples_depend_on_the_seed_and_not_on_the_company(forest: Forest) -> None:
    warm = Sampling(max_tokens=8, temperature=1.0, seed=3)
    together = generate(forest, sources(forest), warm)
    for i, prompt in enumerate(sources(forest)):
        assert generate(forest, [prompt], warm, seeds=[i])[0].tokens == together[i].tokens
    assert [d.tokens for d in generate(forest, sources(forest), warm.model_copy(update={"seed": 4}))] != [
        d.tokens for d in together
    ]


def test_a_source_is_dressed_whoever_brings_it(forest: Forest) -> None:
    bare = [forest.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    assert bare != sources(forest) and [dress_of(forest.tokenizer).on(tokens) for tokens in bare] == sources(forest)
    assert generate(forest, bare, Sampling(max_tokens=6)) == generate(forest, sources(forest), Sampling(max_tokens=6))


def test_likelihoods_are_sums_of_those_of_transformers(forest: Forest) -> None:
    source, choices = sources(forest)[0], [[7, 8, 9], [10, 11]]
    (found,) = likelihoods(forest, [from_tokens([(source, c) for c in choices], "row")], top=True)
    before = list(dress_of(forest.tokenizer, target=True).before)
    for (sum_, _), choice in zip(found, choices, strict=True):
        labels = torch.tensor([[*before, *choice]])
        logps = forest.model(input_ids=torch.tensor([source]), labels=labels).logits[0].log_softmax(-1)
        assert sum_ == pytest.approx(logps.gather(1, labels[0][:, None])[len(before) :].sum().item(), abs=1e-5)


def test_tasks_and_conversations(forest: Forest, tmp_path: Path) -> None:
    file = rows(tmp_path / "tasks.jsonl", [
        {"messages": [{"role": "user", "content": "count"}], "answer": "one"},
        {"prompt": "count", "choices": ["one", "two"], "answer": 0},
    ])  # fmt: skip
    (result,) = evaluate(forest, [TaskFile(path=str(file), max_tokens=4)], progress=False).results
    assert result.about["template"] == "join" and len(result.rows) == 2


def test_plain_text_has_no_perplexity_here(forest: Forest, tmp_path: Path) -> None:
    from fettle.evaluate import Perplexity

    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(FettleError, match="reads a source"):
        evaluate(forest, [Perplexity(path=str(tmp_path / "a.txt"))], progress=False)
