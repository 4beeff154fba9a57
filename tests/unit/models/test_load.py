"""Loading: what a folder may not do, and what a wrong one is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fettle.core.config import validate
from fettle.core.errors import FettleError
from fettle.models import load as loading
from fettle.models.allocator import keep_pages
from fettle.models.spec import ModelSpec

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 40,
}  # fmt: skip
CONFIG = {"model_type": "llama", **SMALL}


def write_tokenizer(folder: Path, words: int = 40) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=None, bos_token_id=None, eos_token_id=1)).save_pretrained(
        tmp_path / "m"
    )
    write_tokenizer(tmp_path / "m")
    return tmp_path / "m"


def spec(path: Path | str, **more: Any) -> ModelSpec:
    return ModelSpec(path=str(path), dtype="float32", device="cpu", **more)


def refused(path: Path | str, words: str, **more: Any) -> None:
    with pytest.raises(FettleError, match=words):
        loading.load(spec(path, **more))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_loads(folder: Path) -> None:
    forest = loading.load(spec(folder))
    assert forest.backend == "segments" and forest.device.type == "cpu" and not forest.model.training
    assert torch.equal(forest.model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_bfloat16_where_the_processor_has_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "has_bf16_units", lambda has=has: has)
        assert loading.load(ModelSpec(path=str(folder), device="cpu")).model.dtype == dtype


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../b.safetensors", "model.bin", 3, "..", ""]
)
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / loading.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    opened: list[Any] = []
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: opened.append(a))
    refused(folder, "plain \\*.safetensors name")
    assert not opened


def test_pickles_are_refused(folder: Path) -> None:
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")
    refused(folder, "pickled.*convert")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors: no such file")


def test_weights_that_are_missing_are_not_drawn_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "lacks 1 of the weights.*model.layers.1.mlp.up_proj.weight")


def test_weights_too_many(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["vision.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "vision.weight")


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=32)
    refused(folder, "has in another shape 6 of the weights of .*model.layers.0.mlp.down_proj.weight")


def test_a_damaged_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(folder, "model.safetensors: the model cannot be loaded: .*header")


def test_a_tokenizer_that_is_not_there(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(
        folder,
        r"m: the tokenizer cannot be loaded: .{100,}; put its files there, or name another folder in model\.tokenizer",
    )


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no folder")
    refused("./nowhere", "there is no folder")
    refused("some/name-that-nobody-has", "neither a folder here nor could it be fetched")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    write_tokenizer(folder, 41)
    refused(folder, "ids up to 40 but the model's embedding has 40 rows")


def test_code_runs_only_when_trusted_and_pinned(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(folder, model_type="home_made", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    refused(folder, "trust_remote_code")
    assert not mark.exists()
    with pytest.raises(ValidationError, match="full commit"):
        ModelSpec(path=str(folder), trust_remote_code=True, revision="main")
    edit_config(folder, auto_map={"AutoConfig": "other/repository--code.C"})
    refused(folder, "another repository", trust_remote_code=True, revision="a" * 40)
    assert not mark.exists()


def test_from_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    made = [
        loading.load(ModelSpec(config=CONFIG, tokenizer=str(tmp_path), seed=s, dtype="float32", device="cpu"))
        for s in (1, 1, 2)
    ]
    first, again, other = (forest.model.lm_head.weight for forest in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_from_nothing_is_the_model_that_its_file_gives(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Rotary frequencies among it, which are no weights: rounded to 16 bits they turn by another angle at every position."""
    settings = json.loads((folder / "config.json").read_text())
    made = loading.load(ModelSpec(config=settings, tokenizer=str(folder), dtype=dtype, device="cpu")).model
    made.save_pretrained(tmp_path / "model")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    held, found = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (made, read))
    assert {n: t.dtype for n, t in held.items()} == {n: t.dtype for n, t in found.items()}
    assert all(torch.equal(held[name], found[name]) for name in found)


def test_a_config_that_is_wrong(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(FettleError, match="model.config.*lama"):
        loading.load(ModelSpec(config=CONFIG | {"model_type": "lama"}, tokenizer=str(tmp_path)))
    for bad, words in (
        ({"config": {}}, "model_type"),
        ({"config": CONFIG}, "needs 'tokenizer'"),
        ({"config": CONFIG, "path": "x"}, "exclude"),
    ):
        with pytest.raises(ValidationError, match=words):
            ModelSpec(**bad)


def test_a_plain_string_is_a_path() -> None:
    assert validate(ModelSpec, "name/model", "recipe.yaml").path == "name/model"


def test_the_hash_of_a_base_follows_its_weights(folder: Path) -> None:
    before = loading.base_hash(folder)
    assert before == loading.base_hash(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert loading.base_hash(folder) != before


def test_devices() -> None:
    assert loading.pick_device("cpu").type == "cpu"
    for bad in ("gpu", "cuda:99", "mps", "meta"):
        with pytest.raises(FettleError, match=bad):
            loading.pick_device(bad)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.pick_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert loading.pick_device(name) == torch.device("cuda", 1) and loading.pick_device("cuda:0").index == 0
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(FettleError, match=f"'{name}' means GPU number 2, and there are 2 here"):
        loading.pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(FettleError, match=f"'{name}' means GPU number 2, and there are 1 here"):
        loading.pick_device(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # of several, its launcher shows it this one
    assert loading.pick_device(name) == torch.device("cuda", 0)


def test_the_allocator_takes_the_setting() -> None:
    assert keep_pages() in (True, False)


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
TEXT = {
    **SMALL,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
}
SEEING: dict[str, dict[str, Any]] = {
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "vision_config": VISION | {
            "intermediate_size": 24, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32,
            "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
        },
    },
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 24, "num_local_experts": 2, "attention_chunk_size": 64},
        "vision_config": VISION | {
            "intermediate_size": 64, "num_attention_heads": 2, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5,
        },
    },
}  # fmt: skip


def seeing(folder: Path, kind: str, change: Any = None) -> Path:
    """A folder with a random model of text and images; `change` may do something to its tensors before they are written."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SEEING[kind]))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", SEEING)
def test_the_text_part_of_a_model_that_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    from transformers import AutoModelForImageTextToText

    folder = seeing(tmp_path / "m", kind)
    model = loading.pretrained(spec(folder, task="causal"), torch.float32).eval()
    said = capsys.readouterr().err.strip().splitlines()
    parts = [line for line in said if "left out" in line]
    assert len(parts) == 1 and f"{folder}: only the text part is loaded; left out: vision_model (" in parts[0]
    assert "multi_modal_projector (" in parts[0] and "tensors)" in parts[0]
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    forest = loading.load(spec(folder))  # proven to train on what it computes
    assert forest.model.base_model is forest.model.model


def test_only_other_parts_are_left_out(tmp_path: Path) -> None:
    def one_more(tensors: dict[str, torch.Tensor]) -> None:
        name = next(
            n for n in tensors if "layers.1." in n and n.endswith("input_layernorm.weight") and "vision" not in n
        )
        tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()

    def one_less(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[
            next(n for n in tensors if "layers.1." in n and n.endswith("input_layernorm.weight") and "vision" not in n)
        ]

    refused(
        seeing(tmp_path / "more", "mllama", one_more),
        r"has, unasked, 1 of the weights .*layers\.2\.input_layernorm",
        task="causal",
    )
    refused(
        seeing(tmp_path / "less", "mllama", one_less),
        r"lacks 1 of the weights .*layers\.1\.input_layernorm",
        task="causal",
    )


def test_a_spec_of_random_weights_can_be_read_again_from_a_manifest() -> None:
    spec = ModelSpec(config={"model_type": "llama"}, tokenizer="somewhere")
    dumped = spec.model_dump(mode="json")
    assert "path" not in dumped and ModelSpec.model_validate(dumped) == spec
    assert ModelSpec.model_validate(ModelSpec().model_dump(mode="json")) == ModelSpec()


def test_an_export_for_others_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "export", "format": "llama"}')
    with pytest.raises(
        FettleError, match="an export to 'llama', for other tools to load; here give the run or the model"
    ):
        loading.folder_of(str(tmp_path))


@pytest.mark.parametrize("inside", ["", "artifact"])
def test_what_a_run_left_is_no_model(inside: str, tmp_path: Path) -> None:
    place = tmp_path / "run" / inside
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")
    with pytest.raises(FettleError, match="run: what a run left, .*'fettle export .*run --to hf'"):
        loading.folder_of(str(tmp_path / "run"))
