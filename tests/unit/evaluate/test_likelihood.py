"""Likelihoods and perplexity against one forward pass a path, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import orjson
import pytest
import torch

from fettle.core import FettleError
from fettle.evaluate import Perplexity
from fettle.evaluate.likelihood import from_tokens, likelihoods, question
from fettle.evaluate.perplexity import perplexity, tokenized, windows
from fettle.generate import prompter
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec

TEXT = "The baker sells bread in the morning. 你好 世界。 " * 6


@pytest.fixture
def forest(tiny_llama) -> Forest:
    made = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    made.model.double()
    return made


@torch.no_grad()
def naive(forest: Forest, context: list[int], rest: list[int]) -> tuple[float, bool]:
    logps = forest.model(input_ids=torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
    at = range(len(context) - 1, len(context) + len(rest) - 1)
    picked = [(logps[p, t].item(), int(logps[p].argmax()) == t) for p, t in zip(at, rest, strict=True)]
    return sum(p for p, _ in picked), all(top for _, top in picked)


def test_choices_share_their_prompt(forest: Forest) -> None:
    encode = prompter(forest.tokenizer).plain
    asked = [
        question(encode, "The baker sells", [" bread", " cakes in the morning", "s"], "f:1"),
        question(encode, "a", ["b", " c"], "f:2"),
        question(encode, "What is the capital of the island? " * 40, ["Yes", "No"], "f:3"),
    ]
    ticks: list[int] = []
    for q, found in zip(asked, likelihoods(forest, asked, ticks.append, top=True), strict=True):
        for path, scored, (logp, top) in zip(q.paths, q.scored, found, strict=True):
            whole = [*q.prompt, *path]
            wanted, wanted_top = naive(forest, whole[:-scored], whole[-scored:])
            assert logp == pytest.approx(wanted, abs=1e-9) and top == wanted_top
    assert sum(ticks) == 3


def test_a_choice_that_merges_with_the_prompt_is_scored_with_the_shared_token(forest: Forest) -> None:
    encode = prompter(forest.tokenizer).plain
    whole = encode("bread")
    assert len(whole) < len(encode("brea")) + 1  # 'd' merges
    q = question(encode, "The brea", ["d", "k"], "f:1")
    assert [*q.prompt, *q.paths[0]] == encode("The bread")
    assert forest.tokenizer.decode(q.paths[0][-q.scored[0] :]).endswith("d")


def test_the_likeliest_continuation_is_top(forest: Forest) -> None:
    context = forest.tokenizer.encode("The baker")
    with torch.no_grad():
        best = int(forest.model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    other = (best + 1) % 300
    found = likelihoods(forest, [from_tokens([(context, [best]), (context, [other])], "x")], top=True)[0]
    assert [top for _, top in found] == [True, False] and found[0][0] > found[1][0]


def test_questions_that_cannot_be_scored(forest: Forest) -> None:
    with pytest.raises(FettleError, match="f:9: nothing stands before"):
        from_tokens([([], [1])], "f:9")
    with pytest.raises(FettleError, match="f:9: a choice has no tokens"):
        from_tokens([([1], [])], "f:9")
    with pytest.raises(FettleError, match="f:9: 513 tokens before the last, and the model sees 512"):
        likelihoods(forest, [from_tokens([([5] * 513, [5])], "f:9")])


def test_the_last_token_is_not_read(forest: Forest) -> None:
    """So that it fits behind a full context."""
    pairs = [([5] * 512, [6]), ([5] * 511, [6, 7])]
    (found,) = likelihoods(forest, [from_tokens(pairs, "f:9")])
    assert [logp for logp, _ in found] == [pytest.approx(naive(forest, *pair)[0], abs=1e-9) for pair in pairs]


@pytest.mark.parametrize(
    ("size", "context", "stride"), [(50, 16, 15), (50, 16, 4), (50, 16, 1), (10, 16, 3), (2, 16, 15), (17, 16, 15)]
)
def test_windows_score_each_token_once_with_most_context(size: int, context: int, stride: int) -> None:
    tokens = list(range(size))
    scored = [t for w in windows(tokens, context, stride) for t in w.tokens[-w.scored :]]
    assert scored == tokens[1:]
    for w in windows(tokens, context, stride):
        assert 1 <= w.scored < len(w.tokens) <= context
        if w.tokens[0]:
            assert len(w.tokens) - w.scored >= context - stride
    assert windows([3], context, stride) == []


@pytest.mark.parametrize(("context", "stride", "join"), [(32, None, "stream"), (32, 8, "stream"), (32, 8, "documents")])
def test_perplexity_is_the_naive_one(
    forest: Forest, tmp_path: Path, context: int, stride: int | None, join: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b"\n".join(orjson.dumps({"text": t}) for t in (TEXT, "Count the red stones.")))
    spec = Perplexity(path=str(file), context=context, stride=stride, join=join)
    score, about = perplexity(forest, spec)
    nats, count = 0.0, 0
    for tokens in tokenized(forest, spec.examples(), join):
        for i in range(1, len(tokens)):  # the first window that reaches token i
            start = next(s for s in range(0, len(tokens), stride or context - 1) if s + context > i)
            nats -= naive(forest, tokens[start:i], [tokens[i]])[0]
            count += 1
    assert score.mean == pytest.approx(math.exp(nats / count), rel=1e-9)
    assert score.low <= score.mean <= score.high
    assert about["tokens"] == count and about["nats"] == pytest.approx(nats)
    assert (about["context"], about["stride"], about["join"], about["documents"]) == (
        context,
        stride or context - 1,
        join,
        2,
    )
    size = sum(len(d.encode()) for d in spec.examples())
    assert about["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_perplexity_refusals(forest: Forest, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("")
    with pytest.raises(FettleError, match="no text in it"):
        perplexity(forest, Perplexity(path=str(text)))
    with pytest.raises(FettleError, match="no such text file"):
        perplexity(forest, Perplexity(path=str(tmp_path / "none.txt")))
    text.write_text(TEXT)
    assert perplexity(forest, Perplexity(path=str(text)))[1]["context"] == 512
    with pytest.raises(FettleError, match="context 600, but the model sees 512"):
        perplexity(forest, Perplexity(path=str(text), context=600))
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(FettleError, match=r"b\.jsonl:2: expected an object with a text 'text'"):
        perplexity(forest, Perplexity(path=str(rows)))
