"""Generation: the same greedy text alone, in a batch, and by transformers; ends, stops, seeds, filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fettle.core import FettleError
from fettle.core.batch import Example, Node, pack
from fettle.generate import Sampling, end_tokens, generate, prompter
from fettle.generate.choose import filtered, repeated
from fettle.generate.padded import PaddedCache
from fettle.generate.sample import context_length
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import PromptTuning

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
KINDS = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": False, "alibi": False},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def random_forest(kind: str, tokenizer, **more) -> Forest:
    torch.manual_seed(1)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 256, **ids, **KINDS[kind], **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    # transformers multiplies experts in 32 bits at most, and BLOOM's softmax overflows on a float64 mask of padding
    model.to(torch.float32 if kind in ("qwen3_moe", "bloom") else torch.float64)
    for parameter in model.parameters():  # livelier than the usual start, so that texts vary
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return Forest(model, tokenizer)


def prompts(vocabulary: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, vocabulary, n).tolist() for n in lengths]


@pytest.fixture
def forest(tiny_llama) -> Forest:
    made = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    made.model.double()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_same_alone_in_a_batch_and_by_transformers(kind: str, tokenizer) -> None:
    forest = random_forest(kind, tokenizer)
    asked = prompts(len(tokenizer), 3, 17, 9, 1, 9)
    together = generate(forest, asked, Sampling(max_tokens=12))
    alone = [generate(forest, [p], Sampling(max_tokens=12))[0] for p in asked]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    forest.model.set_attn_implementation("eager" if kind in ("bloom", "falcon") else "sdpa")
    for prompt, mine in zip(asked, together, strict=True):
        out = forest.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            do_sample=False, eos_token_id=sorted(end_tokens(forest)), pad_token_id=tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert list(mine.tokens) == out
        assert mine.text == tokenizer.decode(out, skip_special_tokens=True)


def test_small_batches_change_nothing(forest: Forest, tokenizer) -> None:
    asked = prompts(len(tokenizer), 5, 30, 2, 11)
    ticks: list[int] = []
    whole = generate(forest, asked, Sampling(max_tokens=6))
    split = generate(forest, asked, Sampling(max_tokens=6), batch_tokens=40, progress=ticks.append)
    assert whole == split
    assert sum(ticks) == 4


def test_logps_are_the_models_own(forest: Forest, tokenizer) -> None:
    (prompt,) = prompts(len(tokenizer), 7)
    (done,) = generate(forest, [prompt], Sampling(max_tokens=9, temperature=1.3, top_k=20, repetition_penalty=1.2))
    tokens = np.array([*prompt, *done.tokens], np.int32)
    weights = np.r_[np.zeros(7), np.ones(len(done.tokens))].astype(np.float32)
    batch = pack([Example((Node(tokens, weights),), "x")], 64, 0)
    with torch.no_grad():
        again = forest.logps(batch)
    assert torch.allclose(again.double(), torch.tensor(done.logps, dtype=torch.double), atol=1e-5)


def test_stops_at_every_end_token(forest: Forest, tokenizer) -> None:
    asked = prompts(len(tokenizer), 6)
    free = generate(forest, asked, Sampling(max_tokens=10))[0]
    assert free.reason == "length"
    at = next(i for i in range(2, 10) if free.tokens[i] not in free.tokens[:i])
    forest.model.generation_config.eos_token_id = [1, free.tokens[at]]
    done = generate(forest, asked, Sampling(max_tokens=10))[0]
    assert (done.reason, done.tokens) == ("end", free.tokens[: at + 1])
    assert done.text == tokenizer.decode(free.tokens[:at], skip_special_tokens=True)


def test_the_templates_end_of_turn_is_an_end_token(forest: Forest, tokenizer) -> None:
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompter(tokenizer).end_of_turn == im_end
    forest.model.generation_config.eos_token_id = forest.config.eos_token_id = None
    assert im_end in end_tokens(forest)


def test_stop_text(forest: Forest, tokenizer) -> None:
    asked = prompts(len(tokenizer), 6)
    free = generate(forest, asked, Sampling(max_tokens=20))[0]
    stop = free.text[4:6]
    done = generate(forest, asked, Sampling(max_tokens=20, stop=(stop, "never to be seen")))[0]
    assert done.reason == "stop"
    assert done.text == free.text[: free.text.index(stop)]
    assert len(done.tokens) < 20


def test_samples_depend_on_the_seed_and_the_request_alone(forest: Forest, tokenizer) -> None:
    asked = prompts(len(tokenizer), 4, 12, 8)
    warm = Sampling(max_tokens=8, temperature=1.0, seed=3)
    together = generate(forest, asked, warm)
    alone = [generate(forest, [p], warm, seeds=[i])[0] for i, p in enumerate(asked)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert generate(forest, asked, warm.model_copy(update={"seed": 4})) != together
    same = generate(forest, [asked[0]] * 3, warm)
    assert len({c.tokens for c in same}) == 3


def test_sampling_follows_the_distribution(tokenizer) -> None:
    forest = random_forest("llama", tokenizer)
    (prompt,) = prompts(len(tokenizer), 4)
    for parameter in forest.model.lm_head.parameters():
        parameter.data.mul_(0.05)
    drawn = generate(forest, [prompt] * 4000, Sampling(max_tokens=1, temperature=0.5, top_k=4, seed=1))
    batch = pack([Example((Node(np.array(prompt, np.int32), np.zeros(4, np.float32)),), "x")], 4, 0)
    with torch.no_grad():
        top = (forest.logits(batch, torch.tensor([3]))[0] / 0.5).topk(4)
    wanted = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    for token, share in wanted.items():
        assert abs(np.mean([c.tokens[0] == token for c in drawn]) - share) < 4 * (share / 4000) ** 0.5
    assert {c.tokens[0] for c in drawn} <= wanted.keys()


def test_filters_are_transformers() -> None:
    torch.manual_seed(0)
    scores, seen = torch.randn(3, 50) * 3, [[1, 2, 2], [7], [49, 0]]
    for settings, theirs in [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ]:
        mine = filtered(scores, Sampling(**settings))
        assert torch.equal(mine, LogitsProcessorList(theirs)(torch.zeros(3, 1, dtype=torch.long), scores.clone()))
    marks = torch.zeros(3, 50, dtype=torch.bool)
    for row, tokens in enumerate(seen):
        marks[row, tokens] = True
    for row, tokens in enumerate(seen):
        theirs_row = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), scores[row : row + 1].clone())
        assert torch.equal(repeated(scores, marks, 1.3)[row], theirs_row[0])


def test_context(forest: Forest, tokenizer) -> None:
    bound = context_length(forest.config)
    assert bound == 512
    asked = prompts(len(tokenizer), bound - 3)
    assert generate(forest, asked, Sampling(max_tokens=10))[0].reason == "context"
    with pytest.raises(FettleError, match="prompt 1 has 512 tokens .* sees 512 at most"):
        generate(forest, [[5], [5] * bound])
    with pytest.raises(FettleError, match="prompt 0 is empty"):
        generate(forest, [[]])
    with pytest.raises(FettleError, match="2 seeds for 1 prompts and n 1"):
        generate(forest, [[5]], seeds=[1, 2])


def test_leaves_the_model_as_it_was(forest: Forest) -> None:
    forest.model.train()
    generate(forest, [[5, 6]], Sampling(max_tokens=2))
    assert forest.model.training
    assert generate(forest, []) == []


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_with_a_state_writes_what_transformers_writes(kind: str, tokenizer) -> None:
    sizes = {"mamba": {"state_size": 4}, "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1}}
    config = AutoConfig.for_model(
        kind, hidden_size=64, num_hidden_layers=2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **sizes[kind],
    )  # fmt: skip
    torch.manual_seed(1)
    forest = Forest(AutoModelForCausalLM.from_config(config).double().eval(), tokenizer)
    for parameter in forest.model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    asked = prompts(len(tokenizer), 3, 17, 9)
    budgets = Sampling(max_tokens=12)
    for prompt, mine in zip(asked, generate(forest, asked, budgets), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] not in end_tokens(forest)):
            with torch.no_grad():
                ids.append(int(forest.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(mine.tokens) == ids[len(prompt) :] and len(set(mine.tokens)) > 1
    cache = PaddedCache(forest, asked)
    first = cache.next_logits().argmax(-1)
    cache.push(first, [0, 2])  # a row leaves
    for row, i in enumerate((0, 2)):
        with torch.no_grad():
            expected = forest.model(input_ids=torch.tensor([[*asked[i], int(first[i])]])).logits[0, -1]
        if not row:
            found = cache.next_logits()
        assert torch.allclose(found[row], expected, atol=1e-4)  # states are in float32
    PromptTuning(tokens=2).apply(forest.model)
    with pytest.raises(FettleError, match="carries a state that does not tell whether it has read a soft prompt"):
        generate(forest, asked, budgets)
