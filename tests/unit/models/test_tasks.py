from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.generate.sample import generate
from fettle.models.load import load
from fettle.models.select import linears
from fettle.models.spec import ModelSpec
from fettle.models.tasks import head_note
from fettle.peft import LoRA, TaskHead
from fettle.stages.artifact import apply_edits, open_artifact, save_artifact
from small import make

PLAIN = {"dtype": "float32", "device": "cpu"}


def spec(folder: Path, **more: object) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(folder), **PLAIN, **more})


def test_a_new_head_is_seeded_said_and_trained(tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "m")
    one, two, other = (load(spec(folder, task="classify", labels=("no", "yes"), seed=s)) for s in (0, 0, 1))
    weight = "classifier.weight"
    assert torch.equal(one.model.state_dict()[weight], two.model.state_dict()[weight])
    assert not torch.equal(one.model.state_dict()[weight], other.model.state_dict()[weight])
    note = head_note(one.model, one.spec)
    assert (
        note is not None and "bert.pooler.dense.weight" in note and weight in note
    )  # a masked language model has no pooler
    apply_edits(one, [LoRA(rank=2), TaskHead()])
    trained = {n for n, p in one.model.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.endswith((".a", ".b"))} == set(one.model.fettle_new)
    assert not any("pooler" in name or "classifier" in name for name in linears(two.model))


def test_a_checkpoint_with_a_head_says_what_it_is(tmp_path: Path) -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    folder = make("bert", tmp_path / "m", "AutoModelForSequenceClassification", **names)
    found = load(spec(folder))
    assert (
        found.task == "classify" and found.spec.labels == ("no", "yes") and head_note(found.model, found.spec) is None
    )
    with pytest.raises(FettleError, match="in another order"):
        load(spec(folder, task="classify", labels=("yes", "no")))
    more = load(spec(folder, task="classify", labels=("no", "yes", "maybe")))
    assert more.model.fettle_new == {"classifier.weight", "classifier.bias"}
    assert torch.equal(more.model.bert.pooler.dense.weight, found.model.bert.pooler.dense.weight)
    assert load(spec(folder, task="tag", labels=("O", "X"))).task == "tag"


def test_an_artifact_keeps_the_head(tmp_path: Path) -> None:
    forest = load(spec(make("bert", tmp_path / "m"), task="classify", labels=("no", "yes")))
    edits = (LoRA(rank=2), TaskHead())
    apply_edits(forest, edits)
    with torch.no_grad():
        for edit in edits:
            for tensor in edit.tensors(forest.model).values():
                tensor.add_(0.1)
    save_artifact(tmp_path / "a", forest, edits, {})
    again, _ = open_artifact(tmp_path / "a")
    ids = torch.tensor([[2, 7, 8, 3]])
    assert torch.equal(again.model(input_ids=ids).logits, forest.model(input_ids=ids).logits)


@pytest.mark.parametrize(("more", "said"), [
    ({"task": "classify"}, "name its labels"),
    ({"task": "causal"}, "lacks"),
])  # fmt: skip
def test_bad_models_are_sentences(more: dict[str, object], said: str, tmp_path: Path) -> None:
    folder = make("bert", tmp_path / "m", "AutoModel")
    with pytest.raises(FettleError, match=said):
        load(spec(folder, **more))


def test_encoder_decoders_have_no_task_head(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="let it write the label instead"):
        load(spec(make("t5", tmp_path / "m"), task="classify", labels=("a", "b")))


def test_a_classifier_writes_nothing_and_a_language_model_has_no_scores(tmp_path: Path, tiny_llama: Path) -> None:
    from fettle.core.batch import Example, Node, pack

    forest = load(spec(make("bert", tmp_path / "m"), task="classify", labels=("a", "b")))
    with pytest.raises(FettleError, match="gives labels and writes no text"):
        generate(forest, [[5, 6]])
    causal = load(spec(tiny_llama))
    import numpy as np

    with pytest.raises(FettleError, match="set model.task: classify"):
        causal.scores(pack([Example((Node(np.arange(3), np.zeros(3)),), "x")], 8, 0))
    with pytest.raises(FettleError, match="no head for a task"):
        TaskHead().apply(causal.model)


def test_a_decoder_with_a_head(tiny_llama: Path) -> None:
    forest = load(spec(tiny_llama, task="classify", labels=("reward",)))
    assert type(forest.model).__name__ == "LlamaForSequenceClassification" and forest.model.fettle_new == {
        "score.weight"
    }
    assert forest.config.problem_type == "regression" and not forest.sees_ahead
    assert copy.deepcopy(forest.model).fettle_new == {"score.weight"}
