"""New tokens: in the tokenizer, in the model, through an artifact, in what the model says, in what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from fettle.core.errors import FettleError
from fettle.export import export
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import LoRA, NewTokens
from fettle.peft.new_tokens import GrownEmbedding, GrownHead
from fettle.stages.artifact import apply_edits, open_artifact, save_artifact
from small import make

EDIT = NewTokens(tokens=("quokka", "zebu herd"))


def opened(folder: Path) -> Forest:
    return load(ModelSpec(path=str(folder), dtype="float32", device="cpu"))


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def stirred(forest: Forest, edit: NewTokens = EDIT) -> Forest:
    generator = torch.Generator().manual_seed(1)
    for tensor in edit.tensors(forest.model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator))
    return forest


def test_the_tokenizer_reads_a_new_word_whole_and_its_rows_start_from_its_pieces(tiny_llama: Path) -> None:
    forest = opened(tiny_llama)
    before = len(forest.tokenizer)
    pieces = forest.tokenizer.encode("quokka", add_special_tokens=False)
    table = forest.model.get_input_embeddings().weight.detach().clone()
    apply_edits(forest, [EDIT])
    assert len(pieces) > 1
    ids = forest.tokenizer.encode("a quokka and zebu herd", add_special_tokens=False)
    assert before in ids and before + 1 in ids
    assert forest.tokenizer.decode([before]) == "quokka"
    row = forest.model.get_input_embeddings()(torch.tensor([before]))[0]
    assert torch.allclose(row, table[pieces].mean(0), atol=1e-6)
    assert {name.rpartition(".")[2] for name in EDIT.tensors(forest.model)} == {"rows"}
    assert logits(forest.model, ids).shape[-1] == before + 2 == forest.config.vocab_size


def test_the_mean_of_all_rows(tiny_llama: Path) -> None:
    forest = opened(tiny_llama)
    table = forest.model.get_input_embeddings().weight.detach().clone()
    apply_edits(forest, [EDIT.model_copy(update={"init": "mean"})])
    found = forest.model.get_input_embeddings()(torch.tensor([len(table), len(table) + 1]))
    assert torch.allclose(found, table.mean(0).expand(2, -1), atol=1e-6)


def test_an_artifact_gives_tokens_and_rows_back(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    edits = (LoRA(rank=2), EDIT)
    apply_edits(forest, edits)
    stirred(forest)
    save_artifact(tmp_path / "artifact", forest, edits, {})
    again, back = open_artifact(tmp_path / "artifact")
    assert back == edits
    ids = forest.tokenizer.encode("The quokka sells a zebu herd", add_special_tokens=False)
    assert again.tokenizer.encode("The quokka sells a zebu herd", add_special_tokens=False) == ids
    assert torch.equal(logits(again.model, ids), logits(forest.model, ids))


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_is_a_plain_model_with_the_tokens(tiny_llama: Path, tmp_path: Path, tied: bool) -> None:
    if tied:
        config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "tied")
    forest = stirred(apply_edits(opened(tmp_path / "tied" if tied else tiny_llama), [EDIT]))
    assert len(EDIT.tensors(forest.model)) == (1 if tied else 2)
    export(forest, [EDIT], tmp_path / "out", "hf")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ids = tokenizer.encode("a quokka", add_special_tokens=False)
    assert ids == forest.tokenizer.encode("a quokka", add_special_tokens=False)
    assert torch.allclose(logits(model, ids), logits(forest.model, ids), atol=1e-5)
    assert model.config.vocab_size == len(tokenizer) and model.config.tie_word_embeddings == tied


def test_the_model_learns_to_say_a_new_word(tiny_llama: Path) -> None:
    forest = apply_edits(opened(tiny_llama), [EDIT])
    new = forest.tokenizer.convert_tokens_to_ids("quokka")
    prompt = torch.tensor([forest.tokenizer.encode("The baker sells", add_special_tokens=False)])
    rows = [p for p in forest.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(rows, lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forest.model(input_ids=prompt).logits[:, -1], torch.tensor([new])).backward()
        optimizer.step()
    said = forest.model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert int(said) == new and forest.tokenizer.decode([int(said)]) == "quokka"


@pytest.mark.parametrize("kind", ["llama", "phi", "bart"])  # phi's head has a bias, and BART adds one to all logits
def test_rows_that_a_model_has_to_spare_are_used(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    if kind == "phi":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
        config = AutoConfig.for_model(kind, vocab_size=len(AutoTokenizer.from_pretrained(tiny_llama)), **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / kind)
    elif kind == "bart":
        make(kind, tmp_path / kind)
    forest = opened(tiny_llama if kind == "llama" else tmp_path / kind)
    rows, base = len(forest.tokenizer) + 1, len(forest.tokenizer)
    forest.model.resize_token_embeddings(rows)
    generator = torch.Generator().manual_seed(2)
    for tensor in (getattr(forest.model, "final_logits_bias", None), forest.model.get_output_embeddings().bias):
        if tensor is not None:
            tensor.data.normal_(generator=generator)
    apply_edits(forest, [EDIT])
    stirred(forest)
    ids = [3, base, base + 1]
    tuned = logits(forest.model, ids)
    assert tuned.shape[-1] == rows + 1 == forest.config.vocab_size
    EDIT.merge(forest.model)
    assert not any(isinstance(m, GrownEmbedding | GrownHead) for m in forest.model.modules())
    assert torch.allclose(logits(forest.model, ids), tuned, atol=1e-6)


def test_a_known_token_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(FettleError, match="is in the tokenizer already"):
        apply_edits(opened(tiny_llama), [NewTokens(tokens=("<|im_end|>",))])


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("after", [False, True])
def test_each_embedding_of_an_encoder_decoder_keeps_edits_of_its_own(kind: str, after: bool, tmp_path: Path) -> None:
    forest = opened(make(kind, tmp_path / kind, "AutoModelForSeq2SeqLM"))
    lora = LoRA(rank=2, targets="embed_tokens")
    apply_edits(forest, [EDIT, lora] if after else [lora, EDIT])
    stacks = [forest.model.get_encoder(), forest.model.get_decoder()]
    tables = [forest.model.get_input_embeddings(), *(stack.get_input_embeddings() for stack in stacks)]
    grown = [m for m in forest.model.modules() if isinstance(m, GrownEmbedding)]
    assert len(set(tables)) == len(grown) == 3 and len({m.rows for m in grown}) == 1
    ids = torch.tensor([[5, 6, len(forest.tokenizer) - 1]])
    forest.model(input_ids=ids, decoder_input_ids=ids).logits.square().sum().backward()
    gradients = [p.grad for n, p in forest.model.named_parameters() if n in lora.tensors(forest.model)]
    learning = [g for g in gradients if g is not None and g.any()]
    assert len(gradients) == 4 and len(learning) == 2  # as B starts at random, the two A learn first


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_an_embedding_that_only_keeps_the_weight_is_refused_when_grown(kind: str) -> None:
    sizes = {"d_model": 16, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 1}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **ids, **sizes))
    EDIT.apply(model)
    with pytest.raises(FettleError, match=r"that \S*encoder\.embed_tokens and \S*decoder\.embed_tokens look tokens up"):
        LoRA(rank=2, targets="shared").apply(model)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("target", ["lm_head", "encoder.embed_tokens"])
def test_an_encoder_decoder_that_grew_twice_is_exported(kind: str, target: str, tmp_path: Path) -> None:
    """With a LoRA on what shares its weight, which the merge parts, and BART's bias of the logits and scaled embeddings."""
    forest = opened(make(kind, tmp_path / kind, "AutoModelForSeq2SeqLM", scale_embedding=True))
    generator = torch.Generator().manual_seed(2)
    if (beside := getattr(forest.model, "final_logits_bias", None)) is not None:
        beside.normal_(generator=generator)
    edits = [EDIT, LoRA(rank=2, targets=target), NewTokens(tokens=("okapi",))]
    apply_edits(forest, edits)
    with torch.no_grad():
        for parameter in forest.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    export(forest, edits, tmp_path / "out", "hf")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, *range(len(forest.tokenizer) - 3, len(forest.tokenizer))]])
    found, tuned = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, forest.model))
    assert torch.allclose(found, tuned, atol=1e-4, rtol=1e-5)
