"""The harness's own evaluator on local tasks, against the same numbers computed plainly."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import torch
import transformers

from fettle.core import FettleError
from fettle.generate import Sampling, generate
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec

Instance = pytest.importorskip("lm_eval.api.instance").Instance

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{more}
"""
CHOICE = 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: c\ndoc_to_target: a\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
ANSWER = (
    'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{t}}"\ngeneration_kwargs: {until: ["\\n\\n"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]"
)
ROLLING = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\nmetric_list: [{metric: byte_perplexity}]'


def test_local_tasks(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    from fettle.evaluate.lm_eval import scores

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    forest = load(ModelSpec(path=str(tiny_llama), dtype="float32"))
    encode, rows = forest.tokenizer.encode, []
    right = nats = size = 0.0
    for i, q in enumerate(["The baker sells", "Count the red", "What is the capital of the"]):
        choices, prompt = ["bread", "stones", "island"], encode(q)
        with torch.no_grad():
            logps = []
            for choice in choices:
                whole = encode(f"{q} {choice}")
                out = forest.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                logps.append(sum(out[p - 1, whole[p]].item() for p in range(len(prompt), len(whole))))
            tokens = [forest.tokenizer.eos_token_id, *prompt]
            out = forest.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        nats -= sum(out[p - 1, tokens[p]].item() for p in range(1, len(tokens)))
        size += len(q.encode())
        right += max(range(3), key=logps.__getitem__) == i
        rows.append(
            {
                "q": q,
                "c": choices,
                "a": i,
                "t": generate(forest, [prompt], Sampling(max_tokens=6))[0].text if i else "never this",
            }
        )
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    for name, more in (("pick", CHOICE), ("say", ANSWER), ("roll", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, more=more))
    found = scores(forest, ["pick", "say", "roll"], tmp_path, shots=0)
    assert found["pick"]["acc,none"] == pytest.approx(right / 3) and "acc_stderr,none" in found["pick"]
    assert found["say"]["exact_match,none"] == pytest.approx(2 / 3)
    assert found["roll"]["byte_perplexity,none"] == pytest.approx(torch.tensor(nats / size).exp().item(), rel=1e-5)
    assert found["settings"]["shots"] == {"pick": 0, "say": 0, "roll": 0}
    chat = scores(forest, ["say"], tmp_path, chat=True, limit=1)
    assert len(chat["settings"]["template_hash"]) == 64
    with pytest.raises(FettleError, match="knows no task 'none'"):
        scores(forest, ["none"], tmp_path)


@pytest.fixture(
    params=["llama", "gpt2"]
)  # rotary positions, and learned ones, of which there are no more than the context
def folder(request, tokenizer, tmp_path: Path) -> Path:
    """A random model that sees 64 tokens, its embeddings wide apart."""
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def asked(*arguments: object) -> list[Instance]:
    return [Instance("", {}, (text,) if isinstance(text, str) else text, i) for i, text in enumerate(arguments)]


def test_figures_are_those_of_the_harness_own_model(folder: Path) -> None:
    """At lengths about a window's, two windows', and a context's; in float64, so that only rounding is between the two."""
    from lm_eval.models.huggingface import HFLM

    from fettle.evaluate.lm_eval import ForestLM

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    forest = load(ModelSpec(path=str(folder), dtype="float32"))
    forest.model.double()
    theirs, ours = HFLM(plain, tokenizer=forest.tokenizer, softmax_dtype="float64"), ForestLM(forest)
    assert theirs.max_length == ours.bound == 64
    long = forest.tokenizer.decode([5 + 7 * i % 90 for i in range(300)])
    texts = ["", *(cut(forest, long, n) for n in (1, 63, 64, 65, 127, 128, 129, 200))]
    whole = asked(*texts)
    assert ours.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-9)
    pairs = asked(*((text, " bread") for text in texts), ("a", texts[3]))
    found, wanted = ours.loglikelihood(pairs), theirs.loglikelihood(pairs)
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in wanted], abs=1e-9)
    assert [top for _, top in found] == [top for _, top in wanted]
    said = asked(*((text, {"until": ["."], "max_gen_toks": 8}) for text in texts[1:]))
    assert ours.generate_until(said) == theirs.generate_until(said)


def cut(forest: Forest, text: str, tokens: int) -> str:
    """As many tokens of a text."""
    found = forest.tokenizer.decode(forest.tokenizer.encode(text)[:tokens])
    assert len(forest.tokenizer.encode(found)) == tokens
    return str(found)


@pytest.mark.parametrize("most", [64, 65])
def test_an_answer_that_leaves_no_room_for_its_prompt_is_refused(folder: Path, most: int) -> None:
    from fettle.evaluate.lm_eval import ForestLM

    model = ForestLM(load(ModelSpec(path=str(folder), dtype="float32")))
    with pytest.raises(FettleError, match=f"max_gen_toks {most} leaves no room for a prompt, the model sees 64 tokens"):
        model.generate_until(asked(("The baker", {"max_gen_toks": most})))


def test_missing_extra_is_a_sentence(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "fettle.evaluate.lm_eval", raising=False)
    with pytest.raises(FettleError, match=r"pip install 'fettle\[eval\]'"):
        import fettle.evaluate.lm_eval  # noqa: F401
