"""Exports: read back, compared, whole or absent; what a format cannot hold is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fettle.core import FettleError
from fettle.core.files import read_json, verify, write_json
from fettle.export import export, load_peft, read_peft
from fettle.export import hf as hf_module
from fettle.export.llama import LAYER, feed_forward_rule, feed_forward_size, frequencies, neighbours, params_of
from fettle.export.parity import Reference, check
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import Freeze, Full, LoRA, NewTokens


def opened(folder: Path, dtype: str = "float32") -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype=dtype))  # type: ignore[arg-type]
    forest.model.requires_grad_(False)
    return forest


def moved(forest: Forest, edits: list, size: float = 0.1) -> tuple[Forest, list]:
    """The edits applied, and away from where they start."""
    torch.manual_seed(0)
    for edit in edits:
        edit.apply(forest.model)
        for tensor in edit.tensors(forest.model).values():
            tensor.normal_(std=size)
    return forest, edits


def adapted(folder: Path, dtype: str = "float32", size: float = 0.1, **settings) -> tuple[Forest, list]:
    return moved(opened(folder, dtype), [LoRA(**{"rank": 4, **settings})], size)


@pytest.mark.parametrize("to", ["hf", "peft", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_format_reads_back(tiny_llama: Path, tmp_path: Path, to: str, dtype: str) -> None:
    forest, edits = adapted(tiny_llama, dtype)
    parity = export(forest, edits, tmp_path / "out", to)
    assert parity.written_difference <= parity.tolerance < 1e-3 and parity.dtype == dtype
    assert parity.largest_difference < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert parity.effect_kept == pytest.approx(1, abs=1e-4 if dtype == "float32" else 0.05)
    assert parity.same_top > 0.9 and parity.tokens == 4 * 48
    manifest = verify(tmp_path / "out")
    assert manifest["kind"] == "export" and manifest["format"] == to
    assert manifest["parity"]["largest_difference"] == parity.largest_difference
    assert manifest["base"]["hash"] and manifest["edits"][0]["rank"] == 4
    assert {"tokenizer.json", "manifest.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert len(edits[0].tensors(forest.model)) == 2 * 7 * 2  # the model itself is not merged


EMBEDS = {
    "new tokens": [NewTokens(tokens=("<a>", "<b>")), LoRA(rank=4)],
    "lora on the embedding": [LoRA(rank=4, targets="embed_tokens")],
}


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("case", EMBEDS)
def test_an_edit_around_the_embedding_is_not_the_models_type(
    tiny_llama: Path, tmp_path: Path, case: str, dtype: str | None
) -> None:
    """Such an edit's float32 weights are the model's first parameters; what is written is of the model's own type, or as asked."""
    forest, edits = moved(opened(tiny_llama, "bfloat16"), EMBEDS[case])
    assert forest.dtype == torch.bfloat16 and next(forest.model.parameters()).dtype == torch.float32
    parity = export(forest, edits, tmp_path / "out", "hf", dtype=dtype)
    kind = dtype or "bfloat16"
    assert {
        str(t.dtype).removeprefix("torch.") for t in load_file(tmp_path / "out" / "model.safetensors").values()
    } == {kind}
    assert parity.dtype == kind == read_json(tmp_path / "out" / "config.json")["dtype"]
    assert parity.largest_difference < {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[kind]


def test_a_lora_on_the_embedding_of_a_model_in_sixteen_bits_goes_to_peft(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = moved(opened(tiny_llama, "bfloat16"), EMBEDS["lora on the embedding"])
    parity = export(forest, edits, tmp_path / "out", "peft")
    assert parity.written_difference <= parity.tolerance and parity.effect_kept == pytest.approx(1, abs=1e-3)


def test_every_new_token_is_probed(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    """One row of the new ones, changed on its way into the file, is heard."""
    forest, edits = moved(opened(tiny_llama), EMBEDS["new tokens"])
    assert export(forest, edits, tmp_path / "whole", "hf").tokens == 5 * 48
    whole = hf_module.merged

    def lossy(*given):
        model, written = whole(*given)
        model.get_input_embeddings().weight.data[-1].mul_(1.5)
        return model, written

    monkeypatch.setattr(hf_module, "merged", lossy)
    with pytest.raises(FettleError, match="logits differ by .* nothing was written"):
        export(forest, edits, tmp_path / "out", "hf")


def test_a_merged_folder_opens_again_and_ends_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = adapted(tiny_llama)
    forest.tokenizer.chat_template = None
    export(forest, edits, tmp_path / "out", "hf")
    again = load(ModelSpec(path=str(tmp_path / "out"), dtype="float32"))
    assert "<|im_start|>" in again.tokenizer.chat_template  # the default that stood in for the missing one
    assert again.model.generation_config.eos_token_id == [forest.tokenizer.eos_token_id]
    assert "fettle_" not in (tmp_path / "out" / "config.json").read_text()


def test_full_tuning_exports(tiny_llama: Path, tmp_path: Path) -> None:
    forest = opened(tiny_llama)
    edit = Full()
    edit.apply(forest.model)
    for tensor in edit.tensors(forest.model).values():
        tensor.mul_(1.01)
    assert export(forest, [edit], tmp_path / "hf", "hf").largest_difference < 1e-5
    assert export(forest, [edit, Freeze(targets="lm_head")], tmp_path / "llama", "llama").effect_kept is None
    with pytest.raises(FettleError, match="a peft folder holds one LoRA.* and nothing else, the edits here are: Full"):
        export(forest, [edit], tmp_path / "peft", "peft")


def test_an_export_that_differs_leaves_nothing(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    forest, edits = adapted(tiny_llama)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("x")
    monkeypatch.setattr(LoRA, "merge", lambda self, model: None)
    with pytest.raises(FettleError, match="still has an adapter after merging"):
        export(forest, edits, tmp_path / "out", "hf")
    monkeypatch.undo()
    whole = hf_module.merged

    def lossy(*given):
        model, written = whole(*given)
        model.lm_head.weight.data[7] += 1
        return model, written

    monkeypatch.setattr(hf_module, "merged", lossy)
    with pytest.raises(FettleError, match="logits differ by .* nothing was written"):
        export(forest, edits, tmp_path / "out", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in (tmp_path / "out").iterdir()] == [
        "kept"
    ]


def test_a_lost_adapter_is_heard() -> None:
    torch.manual_seed(0)
    base = torch.randn(50, 30) * 10
    adapted_logits = base + torch.randn(50, 30) * 0.02
    reference = Reference(((0,),), adapted_logits, base, torch.bfloat16)
    with pytest.raises(FettleError, match="differ by"):
        check(reference, lambda _: base, "x", "test")
    with pytest.raises(FettleError, match="0% of the adaptation arrived.*--dtype float32"):
        check(reference, lambda _: base, "x", "test", base)
    half = (base + adapted_logits) / 2
    with pytest.raises(FettleError, match="50% of the adaptation"):
        check(reference, lambda _: half, "x", "test", half)
    noisy = adapted_logits + torch.randn(50, 30) * 0.02
    assert check(reference, lambda _: noisy, "x", "test", noisy).effect_kept == pytest.approx(1, abs=0.1)
    with pytest.raises(FettleError, match="differ by"):
        check(reference, lambda _: noisy, "x", "test")
    with pytest.raises(FettleError, match="differ by nan"):
        check(reference, lambda _: base * torch.nan, "x", "test")
    with pytest.raises(FettleError, match="shape"):
        check(reference, lambda _: base[:, :5], "x", "test")


def test_one_weight_changed_on_the_way_is_heard_in_sixteen_bits(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    forest = opened(tiny_llama, "bfloat16")
    assert export(forest, [], tmp_path / "same", "hf").largest_difference < 1e-4
    read = AutoModelForCausalLM.from_pretrained

    def off(*args, **settings):
        model = read(*args, **settings)
        model.model.layers[0].mlp.up_proj.weight.data[3] *= 1.05
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", off)
    with pytest.raises(FettleError, match="logits differ"):
        export(forest, [], tmp_path / "other", "hf")


def test_a_small_update_is_refused_in_sixteen_bits_and_whole_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = adapted(tiny_llama, "bfloat16", size=0.002)
    with pytest.raises(FettleError, match="of the adaptation arrived.*--dtype float32"):
        export(forest, edits, tmp_path / "narrow", "hf")
    parity = export(forest, edits, tmp_path / "wide", "hf", "float32")
    assert parity.effect_kept == pytest.approx(1, abs=0.02)
    assert load(ModelSpec(path=str(tmp_path / "wide"), dtype="float32")).model.dtype == torch.float32
    assert export(forest, edits, tmp_path / "peft", "peft").effect_kept == pytest.approx(1, abs=1e-2)
    with pytest.raises(FettleError, match="--dtype is for merged weights"):
        export(forest, edits, tmp_path / "no", "peft", "float32")


def test_unknown_format(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="no format 'lama': did you mean 'llama'"):
        export(opened(tiny_llama), [], tmp_path / "x", "lama")


def test_peft_round_trip(tiny_llama: Path, tmp_path: Path) -> None:
    forest, (edit,) = adapted(
        tiny_llama, targets=("q_proj", r"model\.layers\.1\.mlp\..*"), alpha=6.0, rslora=True, rank=3, dropout=0.1
    )
    export(forest, [edit], tmp_path / "out", "peft")
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["lora_alpha"] == 6 and config["use_rslora"] and config["r"] == 3
    assert "model.layers.1.mlp.up_proj" in config["target_modules"]  # the end alone would mean layer 0 too
    (read,), tensors = read_peft(tmp_path / "out")
    assert (read.rank, read.alpha, read.rslora, read.dropout) == (3, 6.0, True, 0.1)
    mine = edit.tensors(forest.model)
    assert tensors.keys() == mine.keys() and all(torch.equal(tensors[k], mine[k]) for k in mine)
    again = opened(tiny_llama)
    load_peft(again, tmp_path / "out")
    tokens = torch.arange(20)[None]
    assert torch.equal(again.model(input_ids=tokens).logits, forest.model(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "LOHA"}, "holds a LOHA adapter"),
        ({"r": 0}, "'r' is 0; expected a positive number"),
        ({"r": 5}, "rank 4 and 4, but adapter_config.json says r = 5"),
        ({"bias": "all"}, "trained biases"),
        ({"use_dora": True}, "no magnitude of DoRA, though adapter_config.json says use_dora: True"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside the adapter"),
        ({"rank_pattern": {"q_proj": 8}}, "q_proj has rank 4 and 4, but adapter_config.json says r = 8"),
        ({"init_lora_weights": "pissa"}, "changed the base's weights too"),
    ],
)
def test_peft_folders_that_cannot_be_read(tiny_llama: Path, tmp_path: Path, change: dict, reason: str) -> None:
    forest, edits = adapted(tiny_llama)
    export(forest, edits, tmp_path / "out", "peft")
    file = tmp_path / "out" / "adapter_config.json"
    write_json(file, read_json(file) | change)
    with pytest.raises(FettleError, match=reason):
        read_peft(tmp_path / "out")


def test_damaged_peft_weights(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = adapted(tiny_llama, targets="q_proj")
    out = tmp_path / "out"
    export(forest, edits, out, "peft")
    file = out / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]
    for change, reason in [
        ({first: None}, "only one of lora_A and lora_B"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "no A or B of a linear layer"),
        (dict.fromkeys(whole), "no tensors in it"),
    ]:
        save_file({k: v for k, v in (whole | change).items() if v is not None}, file)
        with pytest.raises(FettleError, match=reason):
            read_peft(out)
    save_file({k.replace("layers.1", "layers.7"): v for k, v in whole.items()}, file)
    with pytest.raises(
        FettleError, match=r"adapts 'model.layers.7.self_attn.q_proj', which this model does not have; did you mean"
    ):
        load_peft(opened(tiny_llama), out)
    save_file({k: v[:, :5].contiguous() if "lora_A" in k else v for k, v in whole.items()}, file)
    with pytest.raises(FettleError, match="belongs to another base"):
        load_peft(opened(tiny_llama), out)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(FettleError, match="not a whole safetensors file"):
        read_peft(out)
    file.rename(out / "adapter_model.bin")
    with pytest.raises(FettleError, match="unpickling runs code"):
        read_peft(out)


def test_llama_file(tiny_llama: Path, tmp_path: Path) -> None:
    forest, edits = adapted(tiny_llama, "bfloat16")
    export(forest, edits, tmp_path / "out", "llama")
    tensors = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    assert all(t.dtype == torch.bfloat16 for t in tensors.values())
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"} | {
        f"layers.{i}.{n}" for i in (0, 1) for n in LAYER.values()
    }
    assert tensors.keys() == expected
    params = read_json(tmp_path / "out" / "params.json")
    size = len(forest.tokenizer)
    assert (params["dim"], params["n_layers"], params["n_heads"], params["n_kv_heads"], params["vocab_size"]) == (
        64,
        2,
        4,
        2,
        size,
    )
    assert feed_forward_size(64, params["multiple_of"], params.get("ffn_dim_multiplier")) == 128


@pytest.mark.parametrize(
    ("width", "size", "rule"),
    [
        (4096, 11008, (256, None)),
        (5120, 13824, (512, None)),
        (4096, 14336, (1024, 1.3)),
        (8192, 28672, (4096, 1.3)),
        (2048, 8192, (4096, 1.5)),
    ],
)
def test_feed_forward_rule_on_metas_models(width: int, size: int, rule: tuple) -> None:
    found = feed_forward_rule(width, size)
    assert feed_forward_size(width, *found) == size
    assert feed_forward_size(width, *rule) == size  # as their own params.json have it


@pytest.mark.parametrize("width", [64, 100, 320])
@pytest.mark.parametrize("size", [33, 127, 512, 1000])
def test_feed_forward_rule_reaches_any_size(width: int, size: int) -> None:
    assert feed_forward_size(width, *feed_forward_rule(width, size)) == size


def test_rope_rows_become_neighbours() -> None:
    weight = torch.arange(8)[:, None].float()  # one head of size 8: halves (0..3), (4..7)
    assert neighbours(weight, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert neighbours(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_scaled_frequencies_are_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, intermediate_size=128, rope_parameters=scaling)
    params = params_of(config)
    assert params["use_scaled_rope"] and params["rope_theta"] == 500000.0
    assert torch.allclose(frequencies(params).float(), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "mistral"}, "this one is 'mistral'"),
        ({"head_dim": 32}, "heads of 32 x 4"),
        ({"attention_bias": True}, "has biases"),
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "positions are scaled by 'linear'",
        ),
    ],
)
def test_llamas_that_the_format_cannot_hold(settings: dict, reason: str) -> None:
    from transformers import AutoConfig

    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 1}
    with pytest.raises(FettleError, match=reason):
        params_of(AutoConfig.for_model(**({"model_type": "llama"} | size | settings)))
