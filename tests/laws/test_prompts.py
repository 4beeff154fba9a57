"""Laws of soft prompts: one mechanism in a forest, in an ordinary call, in generation, and on every kind of model.

All in float64; transformers computes softmax and rotary tables in float32 whatever the model, hence 1e-5.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache
from transformers import AutoModelForSeq2SeqLM as Pairs
from transformers import AutoModelForSequenceClassification as Classify
from transformers import AutoModelForTokenClassification as Tag

from fettle.core.batch import IGNORE, Batch, Example, Node, pack, with_prefix
from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.generate import Sampling, generate
from fettle.models import prompt
from fettle.models.forest import Forest
from fettle.models.load import checkpoint_layers, load
from fettle.models.memory import predict, worst_batch
from fettle.models.spec import ModelSpec
from fettle.models.words import lend
from fettle.peft import Full, HybridPrompt, LoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2
from laws.test_forest import CONFIGS, LENGTH, VOCABULARY, backends, check, forest_batch, tiny
from small import make

P = 3
PLAIN = [
    PromptTuning(tokens=P),
    PromptTuning(tokens=P, init="random"),
    PromptTuning(tokens=P, init="text", text="red stone"),
    HybridPrompt(template="<soft:2> stone <soft>"),
    PTuningV2(tokens=P),
    PTuningV2(tokens=P, init="random"),
    PTuningV2(tokens=P, init="text", text="red stone"),
]
ENCODED = [PTuning(tokens=P, hidden=5, layers=1), PTuning(tokens=P), PrefixTuning(tokens=P, hidden=7)]
PROMPTS = [*PLAIN, *ENCODED]
SHALLOW = [e for e in PROMPTS if not isinstance(e, PTuningV2 | PrefixTuning)]
WORDS = {"red stone": [11, 12], "stone": [12]}


def name(edit: Edit) -> str:
    return "-".join(str(v) for v in edit.model_dump(exclude_defaults=True).values()) or edit.kind


class Words(SimpleNamespace):
    """A tokenizer of two words."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": WORDS[text]}


def apply(edit: Edit, model: nn.Module) -> nn.Module:
    """The model with the edit on it, which was moved as training would."""
    lend(model, Words())
    model.requires_grad_(False)
    torch.manual_seed(3)
    edit.apply(model)
    with torch.no_grad():
        for p in model.fettle_prompt.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def build(kind: str = "llama", edit: Edit = PLAIN[0]) -> nn.Module:
    return apply(edit, tiny(kind))


TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**({"input_ids": TOKENS} | inputs)).logits


def by_hand(model: nn.Module, base: nn.Module, ids: Tensor) -> Tensor:
    """What the papers say, with nothing but transformers: vectors before the embeddings, or a cache that is full at start."""
    front = prompt.find(model)
    rows = len(ids)
    if front.heads is None:
        vectors = front.rows(model.get_input_embeddings())
        embeds = torch.cat([vectors.expand(rows, -1, -1), base.get_input_embeddings()(ids)], 1)
        return base(inputs_embeds=embeds).logits[:, front.length :]
    layers, heads, size = front.heads
    cache = DynamicCache(config=base.config)
    table = front().view(front.length, layers, 2, heads, size)
    for layer in range(layers):
        key, value = (table[:, layer, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in (0, 1))
        cache.update(key, value, layer)
    return base(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "bloom"])
def test_an_ordinary_call_is_what_the_paper_says(kind: str, edit: Edit) -> None:
    model, base = build(kind, edit), tiny(kind).requires_grad_(False)
    found, expected = logits(model), by_hand(model, base, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (found - logits(base)).abs().max() > 1e-2
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = list(model.fettle_prompt.parameters())
    for one, two in zip(
        torch.autograd.grad(found, weights, up), torch.autograd.grad(expected, weights, up), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("edit", [PLAIN[0], PLAIN[4]], ids=name)
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_forest_is_each_path_alone(kind: str, edit: Edit) -> None:
    if kind == "mamba" and edit.kind == "p_tuning_v2":
        with pytest.raises(FettleError, match="keep no keys and values"):
            build(kind, edit)
        return
    reference = build(kind, edit)
    for backend in backends(kind):
        reference.zero_grad()
        check(Forest(copy.deepcopy(reference), backend=backend), reference, forest_batch())


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_a_forest_is_each_path_alone_for_every_prompt(edit: Edit) -> None:
    reference = build("qwen3", edit)
    for backend in backends("qwen3"):
        reference.zero_grad()
        check(Forest(copy.deepcopy(reference), backend=backend), reference, forest_batch())


@pytest.mark.parametrize("edit", [PLAIN[2], PLAIN[6]], ids=name)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "opt", "falcon"])
def test_a_prompt_that_begins_from_words_is_these_words(kind: str, edit: Edit) -> None:
    model, base = tiny(kind), tiny(kind)
    lend(model, Words())
    edit.apply(model)
    words = torch.tensor([11, 12, 11]).expand(len(TOKENS), -1)
    torch.testing.assert_close(
        logits(model), logits(base, input_ids=torch.cat([words, TOKENS], 1))[:, P:], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("edit", PLAIN, ids=name)
def test_exactly_the_vectors_train(edit: Edit) -> None:
    model = build(edit=edit)
    assert (
        {n for n, p in model.named_parameters() if p.requires_grad}
        == {"fettle_prompt.plain"}
        == set(edit.tensors(model))
    )
    logits(model).square().sum().backward()
    assert model.fettle_prompt.plain.grad.abs().sum(1).min() > 0
    assert len(edit.tensors(model)["fettle_prompt.plain"]) == 3  # of the template, too, whose fixed word is not kept


@pytest.mark.parametrize("edit", ENCODED, ids=name)
def test_an_encoder_trains_and_plain_vectors_are_kept(edit: Edit) -> None:
    model = build(edit=edit)
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training and all(n.startswith("fettle_prompt.encoder.") for n in training)
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert set(edit.tensors(model)) == {"fettle_prompt.plain"}
    tuned = logits(model)
    edit.settle(model)
    assert [n for n, _ in model.named_parameters() if "fettle" in n] == ["fettle_prompt.plain"]
    assert torch.equal(logits(model), tuned)


def test_the_encoders_dropout_is_off_in_what_is_kept() -> None:
    edit = PTuning(tokens=P, hidden=5, dropout=0.5)
    model = build(edit=edit).train()
    kept = edit.tensors(model)["fettle_prompt.plain"]
    assert torch.equal(kept, edit.tensors(model)["fettle_prompt.plain"]) and model.fettle_prompt.encoder.training
    assert not torch.equal(model.fettle_prompt(), model.fettle_prompt())


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_tensors_replayed_on_the_base_give_the_same_model(edit: Edit) -> None:
    model, other = build(edit=edit), build(edit=edit)
    with torch.no_grad():
        for p in other.fettle_prompt.parameters():
            p.zero_()
    kept = edit.tensors(model)
    edit.settle(other)
    for key, tensor in edit.tensors(other).items():
        tensor.copy_(kept[key])
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_disabled_is_the_base(edit: Edit) -> None:
    model, base = build(edit=edit), tiny("llama")
    batch = forest_batch()
    expected = logits(base), Forest(base, backend="dense").logits(batch, torch.arange(LENGTH))
    model.fettle_prompt.enabled = False
    assert torch.equal(logits(model), expected[0])
    assert torch.equal(Forest(model, backend="dense").logits(batch, torch.arange(LENGTH)), expected[1])


def test_a_copy_has_a_prompt_of_its_own() -> None:
    model = build()
    before, other = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        other.fettle_prompt.plain.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(other), before)


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_gradient_checkpointing_changes_no_gradient_in_a_forest(edit: Edit) -> None:
    plain, batch = build("qwen3", edit).train(), forest_batch()
    again = copy.deepcopy(plain)
    checkpoint_layers(again)
    for model in (plain, again):
        Forest(model, backend="segments").hidden(batch).square().sum().backward()
    for one, two in zip(plain.fettle_prompt.parameters(), again.fettle_prompt.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) and one.grad.abs().sum() > 0


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_masters_are_float32_under_bf16(edit: Edit) -> None:
    model = apply(edit, tiny("llama").to(torch.bfloat16))
    assert {p.dtype for p in model.fettle_prompt.parameters()} == {torch.float32}
    for backend in ("segments", "paths"):
        forest = Forest(model, backend=backend)
        hidden = forest.hidden(forest_batch())
        assert hidden.dtype == torch.bfloat16
        hidden.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.fettle_prompt.parameters())


class Speller(Words):
    """What `generate` asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = chat_template = None

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(map(str, tokens))

    def get_vocab(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma3_text"])
def test_generation_is_greedy_by_full_recomputation(kind: str, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    from fettle.generate import request

    monkeypatch.setattr(request, "end_tokens", lambda forest: frozenset())
    model = build(kind, edit)
    forest = Forest(model, Speller(), backend="dense")
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [30, 31, 32, 33, 34]]
    found = generate(forest, prompts, Sampling(max_tokens=9))
    for start, completion in zip(prompts, found, strict=True):
        row = list(start)
        for token, logp in zip(completion.tokens, completion.logps, strict=True):
            last = logits(model, input_ids=torch.tensor([row]), use_cache=False)[0, -1]
            assert token == int(last.argmax())
            assert abs(logp - last.log_softmax(-1)[token].item()) < 1e-4
            row.append(token)


@pytest.mark.parametrize("edit", [PLAIN[0], PLAIN[4]], ids=name)
def test_transformers_generates_with_the_prompt_too(edit: Edit) -> None:
    model = build("llama", edit)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    out = model.generate(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for row, real in zip(out, [2, 0], strict=True):
        for at in range(5, 11):
            assert row[at] == logits(model, input_ids=row[None, real:at])[0, -1].argmax()


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_padding_and_positions_make_room(edit: Edit) -> None:
    model = build("opt", edit)
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), TOKENS], 1)
    mask = (torch.arange(13) >= 4).long().expand(2, -1)
    at = (mask.cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(
        logits(model, input_ids=ids, attention_mask=mask, position_ids=at)[:, 4:], logits(model), rtol=0, atol=1e-5
    )


ENCODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "vocab_size": VOCABULARY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1,
}  # fmt: skip


def encoder(kind: str, auto: Any) -> nn.Module:
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **ENCODER)).double().eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_encoders_read_the_prompt_and_pool_their_own_first_token(kind: str, edit: Edit) -> None:
    model = apply(edit, encoder(kind, Classify))
    mask = torch.ones_like(TOKENS)
    ids = torch.nn.functional.pad(TOKENS, (0, 3), value=1)
    padded = torch.nn.functional.pad(mask, (0, 3))
    found = logits(model)
    torch.testing.assert_close(logits(model, input_ids=ids, attention_mask=padded), found, rtol=0, atol=1e-10)
    front = prompt.find(model)
    base, body = encoder(kind, Classify), None
    assert (logits(base) - found).abs().max() > 1e-4
    if front.heads is None:  # with transformers alone: the first token of the text stands behind the prompt
        body = base.base_model
        embeds = torch.cat(
            [front.rows(body.get_input_embeddings()).expand(2, -1, -1), body.get_input_embeddings()(TOKENS)], 1
        )
        states = body(inputs_embeds=embeds).last_hidden_state[:, front.length :]
        pooled = body.pooler(states) if getattr(body, "pooler", None) is not None else states
        torch.testing.assert_close(found, base.classifier(pooled), rtol=0, atol=1e-10)


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
@pytest.mark.parametrize("backend", ["dense", "segments", "paths"])
def test_a_forest_of_texts_is_each_alone_in_an_encoder(backend: str, edit: Edit) -> None:
    from fettle.core.batch import Example, Node, pack

    model = apply(edit, encoder("roberta", Tag))
    texts = [TOKENS[0], TOKENS[1][:5], TOKENS[1][5:]]
    examples = [
        Example((Node(t.numpy().astype("int32"), torch.zeros(len(t)).numpy(), causal=False),), f"text {i}")
        for i, t in enumerate(texts)
    ]
    batch = pack(examples, 32, 1)
    forest = Forest(copy.deepcopy(model), backend=backend)
    hidden, at = forest.hidden(batch), 0
    for text in texts:
        expected = model.base_model(input_ids=text[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[at : at + len(text)], expected, rtol=0, atol=1e-6)
        at += len(text)


def pairs_model() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Pairs.from_config(config).double().eval()


@pytest.mark.parametrize("edit", SHALLOW, ids=name)
def test_an_encoder_decoder_reads_the_prompt_in_front_of_its_source(edit: Edit) -> None:
    model, base = apply(edit, pairs_model()), pairs_model()
    front = prompt.find(model)
    words = base.get_input_embeddings()
    embeds = torch.cat([front.rows(words).expand(2, -1, -1), words(TOKENS)], 1)
    mask = torch.ones_like(TOKENS)
    mask[1, 6:] = 0
    longer = torch.cat([mask.new_ones(2, front.length), mask], 1)
    target = TOKENS[:, :4]
    expected = base(inputs_embeds=embeds, attention_mask=longer, decoder_input_ids=target).logits
    found = model(input_ids=TOKENS, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    out = model.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for at in range(1, out.shape[1]):
        step = base(inputs_embeds=embeds, attention_mask=longer, decoder_input_ids=out[:, :at]).logits[:, -1].argmax(-1)
        assert torch.equal(torch.where((out[:, :at] == 1).any(1), out[:, at], step), out[:, at])


@pytest.mark.parametrize("edit", PROMPTS, ids=name)
def test_memory_is_rehearsed_with_the_prompt(edit: Edit) -> None:
    model = apply(edit, tiny("llama").float())
    forest = Forest(model, backend="segments")
    state = torch.get_rng_state()
    found = predict(forest, worst_batch(64), lambda f, b: -f.logps(b).sum())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.optimizer == 8 * trained and found.activations > 0
    assert torch.equal(torch.get_rng_state(), state) and not any(p.grad is not None for p in model.parameters())


def test_other_edits_do_not_take_the_prompts_own_weights_for_the_models() -> None:
    model = build(edit=PrefixTuning(tokens=P, hidden=7))
    before = {n for n, _ in model.fettle_prompt.named_parameters()}
    LoRA(rank=2).apply(model)
    Full().apply(model)
    assert {n for n, _ in model.fettle_prompt.named_parameters()} == before
    assert not [n for n in Full().tensors(model) if "fettle" in n]


def test_with_prefix_moves_everything_by_as_much() -> None:
    batch = forest_batch()
    longer = with_prefix(batch, P)
    assert longer.useful == batch.useful and longer.names == ("", *batch.names)
    for one, two, blank in (
        (longer.tokens, batch.tokens, 0), (longer.targets, batch.targets, IGNORE), (longer.weights, batch.weights, 0)
    ):  # fmt: skip
        assert torch.equal(one[P:], two) and (one[:P] == blank).all()
    assert torch.equal(longer.positions, torch.cat([torch.arange(P), batch.positions + P]))
    assert [(s.start - P, s.stop - P, s.parent - 1, s.causal) for s in longer.segments[1:]] == [
        (s.start, s.stop, s.parent, s.causal) for s in batch.segments
    ]
    assert (longer.segments[0].start, longer.segments[0].stop, longer.segments[0].parent) == (0, P, -1)


def test_bad_prompts_are_sentences(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(FettleError, match=r"has a soft prompt already \(prompt_tuning\)"):
        PTuningV2().apply(model)
    for edit in PROMPTS:
        with pytest.raises(FettleError, match="cannot be merged; keep the artifact"):
            edit.merge(model)
    with pytest.raises(FettleError, match="hybrid_prompt.template: the text needs a tokenizer"):
        HybridPrompt(template="a <soft>").apply(tiny("llama"))
    with pytest.raises(FettleError, match="cannot be used with T5ForConditionalGeneration: it is an encoder-decoder"):
        PrefixTuning().apply(pairs_model())
    with pytest.raises(FettleError, match=r"needs an attention_mask \[batch, tokens\]"):
        logits(model, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    deep = build("llama", PTuningV2(tokens=P)).train()
    checkpoint_layers(deep)
    with pytest.raises(FettleError, match="drops its cache under gradient checkpointing"):
        logits(deep)
    left = torch.ones_like(TOKENS)
    left[0, :2] = 0
    with pytest.raises(FettleError, match="sees through a window"):
        logits(build("mistral"), attention_mask=left)
    for template in ("no mark", "<soft:0> words"):
        with pytest.raises(ValueError, match="trains nothing"):
            HybridPrompt(template=template)
    for wrong in ({"init": "text"}, {"text": "words"}):
        with pytest.raises(ValueError, match="belong together"):
            PromptTuning(**wrong)


def test_a_text_that_does_not_fit_behind_the_prompt_is_refused_with_the_numbers() -> None:
    model = build("gpt2", PromptTuning(tokens=40))
    forest = Forest(model, backend="segments")
    assert forest.context == 128 - 40
    batch: Batch = worst_batch(96)
    with pytest.raises(FettleError, match=r"96 tokens behind a soft prompt of 40 is longer than the 128"):
        forest.hidden(batch)
    model.fettle_prompt.enabled = False
    assert forest.context == 128 and forest.hidden(batch).shape[0] == 96


def test_a_model_whose_head_passes_the_body_by_is_refused() -> None:
    model = tiny("llama")
    model.forward = lambda input_ids: None  # as an architecture that calls its layers one by one
    with pytest.raises(FettleError, match="does not call LlamaModel as a whole"):
        PLAIN[0].apply(model)


@pytest.mark.parametrize(("kind", "size"), [("bert", 64), ("bert", 66), ("roberta", 70)])
def test_texts_as_long_as_an_encoder_with_a_prompt_can_see(kind: str, size: int, tmp_path: Path) -> None:
    forest = load(
        ModelSpec(path=str(make(kind, tmp_path, max_position_embeddings=size)), task="tag", labels=("a", "b"))
    )
    PromptTuning(tokens=3).apply(forest.model)
    longest = forest.context
    assert longest is not None and longest % 32
    ids = torch.randint(5, 40, (longest,), generator=torch.Generator().manual_seed(1))
    batch = pack([Example((Node(ids.int().numpy(), np.zeros(longest, np.float32), causal=False),), "x")], longest, 0)
    forest.model.eval()
    with torch.no_grad():
        alone = forest.model.base_model(input_ids=ids[None]).last_hidden_state[0]
        assert torch.allclose(forest.hidden(batch), alone, atol=1e-5)
