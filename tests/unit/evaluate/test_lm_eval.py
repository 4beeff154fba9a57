"""The harness's own evaluator on local tasks, against the same numbers computed plainly."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
import torch

from fettle.core import FettleError
from fettle.generate import Sampling, generate
from fettle.models.load import load
from fettle.models.spec import ModelSpec

pytest.importorskip("lm_eval")

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


def test_missing_extra_is_a_sentence(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "fettle.evaluate.lm_eval", raising=False)
    with pytest.raises(FettleError, match=r"pip install 'fettle\[eval\]'"):
        import fettle.evaluate.lm_eval  # noqa: F401
