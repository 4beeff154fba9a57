"""(IA)^3 against PEFT: its folders load here, ours load there, with equal logits and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fettle.core.errors import FettleError
from fettle.export import export, load_peft
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import IA3, LoRA
from fettle.quantize import NF4
from fettle.stages.artifact import apply_edits

peft: Any = pytest.importorskip("peft")
TOKENS = torch.randint(0, 300, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bases(tiny_llama: Path, tmp_path_factory: Any, tokenizer: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, **ids)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"llama": tiny_llama, "gpt2": folder}


def opened(folder: Path) -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype="float32", device="cpu"))
    forest.model.requires_grad_(False)
    return forest


def stirred(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["usual", "others"])
def test_pefts_folder_loads_here_and_goes_out_again(
    bases: dict[str, Path], tmp_path: Path, base: str, targets: str
) -> None:
    usual = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    }
    others = {"llama": (["q_proj", "up_proj"], ["up_proj"]), "gpt2": (["c_attn", "c_fc"], [])}
    modules, feedforward = (usual if targets == "usual" else others)[base]
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=feedforward, fan_in_fan_out=base == "gpt2"
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[base]), config)
    stirred(p for n, p in theirs.named_parameters() if "ia3_l" in n)
    theirs.save_pretrained(tmp_path / "theirs")
    forest = opened(bases[base])
    (edit,) = load_peft(forest, tmp_path / "theirs")
    assert (edit == IA3()) == (targets == "usual")
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-5)
    export(forest, [edit], tmp_path / "ours", "peft")
    back = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), tmp_path / "ours")
    assert torch.allclose(logits(back), logits(theirs), atol=1e-6)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_our_folder_loads_in_peft_with_equal_logits_and_gradients(
    bases: dict[str, Path], tmp_path: Path, base: str
) -> None:
    forest, edit = opened(bases[base]), IA3()
    edit.apply(forest.model)
    stirred(edit.tensors(forest.model).values())
    assert export(forest, [edit], tmp_path / "out", "peft").checked_with == "peft"
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases[base]), tmp_path / "out", is_trainable=True
    )
    for model in (forest.model, theirs):
        model.double()
    assert torch.allclose(logits(forest.model), logits(theirs), atol=1e-10)
    for model in (forest.model, theirs):
        logits(model).square().mean().backward()
    mine = {n: p.grad for n, p in forest.model.named_parameters() if p.requires_grad}
    assert len(mine) == len(edit.tensors(forest.model))
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            ours = name.removeprefix("base_model.model.").replace("ia3_l.default", "scale")
            assert torch.allclose(mine[ours], parameter.grad.flatten(), atol=1e-10), name


@pytest.mark.parametrize("edit", [IA3(), LoRA(rank=2)], ids=lambda edit: edit.kind)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_on_four_bits_peft_puts_it_on_what_these_stand_for(
    bases: dict[str, Path], tmp_path: Path, base: str, edit: IA3 | LoRA
) -> None:
    packed = NF4()
    forest = apply_edits(opened(bases[base]), [packed, edit])
    stirred(edit.tensors(forest.model).values())
    parity = export(forest, [packed, edit], tmp_path / "out", "peft")
    assert parity.checked_with == "fettle"
    dense = apply_edits(opened(bases[base]), [packed])
    packed.merge(dense.model)
    theirs = peft.PeftModel.from_pretrained(dense.model, tmp_path / "out")
    assert theirs.peft_config["default"].fan_in_fan_out == (base == "gpt2")
    assert torch.allclose(logits(theirs), logits(forest.model), atol=parity.tolerance)


def test_what_peft_cannot_say_and_what_does_not_fit_are_sentences(bases: dict[str, Path], tmp_path: Path) -> None:
    forest = opened(bases["llama"])
    lora, edit = LoRA(rank=2), IA3()
    lora.apply(forest.model)
    edit.apply(forest.model)
    with pytest.raises(FettleError, match="holds one"):
        export(forest, [lora, edit], tmp_path / "two", "peft")
    forest = opened(bases["llama"])
    edit.apply(forest.model)
    export(forest, [edit], tmp_path / "llama", "peft")
    with pytest.raises(FettleError, match="which this model does not have"):
        load_peft(opened(bases["gpt2"]), tmp_path / "llama")
