"""The stage that quantizes: an artifact like any other, scores before and after, a row of findings, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.files import sha256
from fettle.export.hf import export_hf
from fettle.generate import Sampling, generate
from fettle.quantize.linear import quantized
from fettle.stages import check, load_recipe, open_model, run
from fettle.stages.adapters import open_adapters
from small import rows as write_rows

GPTQ = "{kind: gptq, grid: {bits: 4, group: 16, symmetric: false}}"


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Any:
    """A function from edits, and more of a recipe, to its file."""
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"The baker sells {i} cakes and bread in the morning. " * 4} for i in range(60)])  # fmt: skip
    (tmp_path / "held.txt").write_text("The baker sells bread in the afternoon. A short answer is better.\n" * 20)

    def write(edits: str, more: str = "", samples: int = 6, kind: str = "kind: quantize") -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"{kind}\nmodel: {{path: {tiny_llama}, dtype: float32}}\nedits: [{edits}]\n"
            f"calibration: {{data: [{{path: {text}, format: text}}], samples: {samples}, length: 64}}\n"
            f"output: {tmp_path / 'run'}\n{more}\n"
        )
        return file

    return write


def test_a_later_stage_must_take_what_loftq_left(recipe: Any, tmp_path: Path) -> None:
    flat = recipe("{kind: rtn, grid: {bits: 4, group: 16}, loftq: {rank: 2}}").read_text()
    data = write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"Count {i}.", "completion": "one two"} for i in range(12)])
    first = "\n".join(("- " if not i else "  ") + line for i, line in enumerate(flat.strip().splitlines()))

    def looked_at(lora: str) -> list[bool]:
        file = tmp_path / "stages.yaml"
        file.write_text(
            f"stages:\n{first}\n- edits: [{lora}]\n  data: [{{path: {data}}}]\n"
            f"  optim: {{steps: 3}}\n  batch: {{tokens: 64}}\n  output: {tmp_path / 'tuned'}\n"
        )
        return [r.ok for r in check(load_recipe(file), 0, Console(quiet=True), time_steps=False)]

    assert looked_at("{kind: lora, rank: 2, init: loftq}") == [True, True]
    with pytest.raises(FettleError, match="stage 2 .*loftq took an update of rank 2 off .*q_proj and 13 more"):
        looked_at("{kind: lora, rank: 2}")


@pytest.mark.parametrize(
    ("edits", "row"),
    [
        (GPTQ, {"name": "gptq", "bits": 4, "activations": None, "group": 16, "symmetric": False}),
        ("{kind: smoothquant}, {kind: rtn, grid: {bits: 8}, activations: {bits: 8}}", {"name": "smoothquant+rtn", "bits": 8, "activations": 8, "group": "row"}),
        ("{kind: awq, search: layer, grid: {bits: 4, group: 16, symmetric: false}}", {"name": "awq", "bits": 4}),
        ("{kind: nf4}", {"name": "nf4", "bits": 4, "group": 64}),
        ("{kind: llm_int8}", {"name": "llm_int8", "bits": 8, "activations": 8}),
    ],
    ids=["gptq", "w8a8", "awq", "nf4", "int8"],
)  # fmt: skip
def test_it_leaves_an_artifact_and_the_row_of_findings(
    recipe: Any, edits: str, row: dict[str, Any], tmp_path: Path
) -> None:
    more = f"evaluate: [{{kind: perplexity, path: {tmp_path / 'held.txt'}}}]"
    artifact = run(load_recipe(recipe(edits, more)))
    found = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert row.items() <= found["row"].items()
    assert found["row"]["layers"] == 14 and found["row"]["fallbacks"] == {} and 0 < found["row"]["output_error"] < 0.05
    assert found["row"]["worst"][0]["error"] >= found["row"]["worst"][-1]["error"] > 0
    assert row["bits"] < found["row"]["effective_bits"] < row["bits"] + 3.2
    assert found["row"]["calibration_tokens"] == 334 and found["row"]["seconds"] > 0 and found["row"]["peak_bytes"] > 0
    before, after = found["row"]["evaluation_before"][0], found["row"]["evaluation"][0]
    assert before["mean"] != after["mean"] == pytest.approx(before["mean"], rel=0.05)
    assert (
        found["versions"]["dtype"] == "float32"
        and found["base_hash"]
        and found["recipe"]["calibration"]["samples"] == 6
    )
    page = (tmp_path / "run" / "report.md").read_text()
    assert "Before and after" in page and "greatest output error" in page
    assert not (tmp_path / "run" / "calibration").exists()

    forest, opened = open_model(str(tmp_path / "run"))
    assert [e.kind for e in opened] == row["name"].split("+") and len(quantized(forest.model)) == 14  # type: ignore[attr-defined]
    answer = generate(forest, [[5, 6, 7]], Sampling(max_tokens=4))[0]
    assert len(answer.tokens) > 0
    assert artifact == tmp_path / "run" / "artifact"
    if row["name"] == "awq":  # merged by dequantizing, read back and compared by the exporter
        export_hf(forest, opened, tmp_path / "out")
        twin, _ = open_model(str(tmp_path / "out"), dtype="float32")
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert torch.allclose(twin.model(input_ids=ids).logits, forest.model(input_ids=ids).logits, atol=1e-4)


def test_a_later_stage_tunes_over_it(recipe: Any, tmp_path: Path, tiny_llama: Path) -> None:
    flat = recipe(GPTQ).read_text()
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": f"Count {i}."}, {"role": "assistant", "content": "one two"}]} for i in range(12)])  # fmt: skip
    first = "\n".join(("- " if not i else "  ") + line for i, line in enumerate(flat.strip().splitlines()))
    file = tmp_path / "stages.yaml"
    file.write_text(
        f"stages:\n{first}\n- edits: [{{kind: lora, rank: 2}}]\n  data: [{{path: {data}}}]\n"
        f"  optim: {{steps: 3, lr: 1.0e-3}}\n  batch: {{tokens: 64}}\n  output: {tmp_path / 'tuned'}\n"
    )
    reports = check(load_recipe(file), 0, Console(quiet=True), time_steps=False)
    assert [r.ok for r in reports] == [True, True] and reports[0].trained == 0 < reports[1].trained
    assert reports[0].memory.activations == 6 * 64 * 64 * 4
    run(load_recipe(file))
    quantized_alone, _ = open_model(str(tmp_path / "run"))
    forest, edits = open_model(str(tmp_path / "tuned"))
    assert [e.kind for e in edits] == ["gptq", "lora"]  # type: ignore[attr-defined]
    alone = quantized(quantized_alone.model)
    for name, layer in quantized(forest.model).items():
        assert torch.equal(layer.packed.codes, alone[name.removesuffix(".base")].packed.codes)
    reports = check(load_recipe(file), 0, Console(quiet=True), time_steps=False)  # now over what is there
    assert reports[1].ok
    shared, adapters = open_adapters({"one": str(tmp_path / "tuned")})  # many tasks on one quantized base
    adapters.use("one")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(shared.model(input_ids=ids).logits, forest.model(input_ids=ids).logits, atol=1e-5)
    other = tmp_path / "other"
    run(
        load_recipe(
            file, [f"stages.0.output={other / 'q'}", "stages.0.calibration.samples=5", f"stages.1.output={other / 't'}"]
        )
    )
    with pytest.raises(FettleError, match="'two' and 'one' have not one base: 'model.layers.0"):
        open_adapters({"one": str(tmp_path / "tuned"), "two": str(other / "t")})


@pytest.mark.parametrize(
    ("edits", "more", "said"),
    [
        ("{kind: lora}", "", r"recipe.yaml:3: edits.0: lora does not quantize; put it into a stage of kind: tune"),
        ("{kind: smoothquant}", "", "nothing is quantized after smoothquant"),
        ("{kind: rtn}, {kind: smoothquant}", "", "edits.1: smoothquant scales weights that are packed by then"),
        (
            "{kind: smoothquant}, {kind: rtn, loftq: {rank: 4}}",
            "",
            "edits.1.loftq: a later stage would find its update again",
        ),
        ("{kind: hqq}", "", "hqq fits zero points .* symmetric: false"),
        ("{kind: gptq, bits: 4}", "", "bits"),
    ],
)
def test_recipes_that_make_no_sense(recipe: Any, edits: str, more: str, said: str) -> None:
    file = recipe(edits if "hqq" not in edits else "{kind: hqq, grid: {bits: 4}}", more)
    with pytest.raises(FettleError, match=said):
        load_recipe(file)


def test_a_method_that_looks_at_text_is_refused_where_there_is_none(
    recipe: Any, tmp_path: Path, tiny_llama: Path
) -> None:
    file = recipe(GPTQ)
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("calibration")))
    with pytest.raises(FettleError, match=r"edits.0: gptq looks at text; add calibration"):
        load_recipe(file)
    file.write_text(
        f"model: {{path: {tiny_llama}}}\nedits: [{GPTQ}, {{kind: lora}}]\ndata: [{{path: {tmp_path / 'text.jsonl'}}}]\noutput: {tmp_path / 'x'}\n"
    )
    with pytest.raises(
        FettleError, match=r"recipe.yaml:2: edits.0: gptq looks at text; put it into a stage of kind: quantize"
    ):
        load_recipe(file)


@pytest.mark.parametrize(
    ("edits", "samples", "said"),
    [
        (GPTQ, 4000, r"calibration: the text is too short: its data fill \d+ rows of 64 tokens, and 4000 are asked for"),
        (GPTQ, 3, r"calibration: the text is too short: 167 tokens in all, and under 256"),
        ("{kind: gptq, grid: {bits: 4, group: 7}}", 6, r"edits.0: gptq: model.layers.0.self_attn.q_proj: group: 7 does not divide rows of 64 values; choose 8"),
        ("{kind: nf4, targets: q_proj}, {kind: awq, search: layer, targets: [q_proj]}", 6, r"edits.1: awq finds \S+q_proj quantized already"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing_half_written(
    recipe: Any, edits: str, samples: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(FettleError, match=said) as raised:
        run(load_recipe(recipe(edits, samples=samples)))
    assert "\n" not in str(raised.value)
    left = {p.name for p in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {"cache"}
    assert run(load_recipe(recipe("{kind: rtn}"))).is_dir(), "the output is free for the next run"


def test_a_run_that_is_there_is_not_overwritten_and_a_resume_must_be_the_same(recipe: Any, tmp_path: Path) -> None:
    run(load_recipe(recipe("{kind: rtn}")))
    with pytest.raises(FettleError, match="holds a run already; go on with --resume"):
        run(load_recipe(recipe("{kind: rtn}")))
    assert run(load_recipe(recipe("{kind: rtn}")), resume=True).is_dir()
    with pytest.raises(FettleError, match="written by another recipe"):
        run(load_recipe(recipe(GPTQ)), resume=True)


def test_scores_are_those_of_this_run(recipe: Any, tmp_path: Path) -> None:
    more = f"evaluate: [{{kind: perplexity, path: {tmp_path / 'held.txt'}}}]"
    with pytest.raises(FettleError, match="does not divide"):
        run(load_recipe(recipe("{kind: gptq, grid: {group: 7}}", more)))  # after it was scored
    held = tmp_path / "held.txt"
    held.write_text("Bread and cakes are sold in town.\n" * 20)
    run(load_recipe(recipe("{kind: rtn}", more)))
    row = json.loads((tmp_path / "run" / "findings.json").read_text())["row"]
    before, after = row["evaluation_before"][0], row["evaluation"][0]
    assert before["mean"] == pytest.approx(after["mean"], rel=0.05)
    results = json.loads((tmp_path / "run" / "evaluation-before" / "results.json").read_text())["results"]
    assert results[0]["sha256"] == sha256(held)


def test_the_verb_needs_no_kind(recipe: Any) -> None:
    file = recipe(GPTQ, kind="seed: 1")
    assert load_recipe(file, kind="quantize").stages[0].kind == "quantize"
    with pytest.raises(FettleError):
        load_recipe(file)


def test_evaluations_are_looked_at_first_and_made_anew_where_they_change(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held.txt"
    file = recipe("{kind: nf4}", f"evaluate: [{{kind: perplexity, path: {held}, context: 64}}]")
    with pytest.raises(FettleError, match=r"evaluate\.0\.path: none\.txt: no such file"):
        run(load_recipe(file, ["evaluate.0.path=none.txt"]))
    (report,) = check(load_recipe(file, ["evaluate.0.context=4096"]), console=Console(quiet=True))
    assert "perplexity with context 4096, but the model sees" in report.problems[0]
    run(load_recipe(file))
    first = json.loads((tmp_path / "run" / "findings.json").read_text())["row"]
    monkeypatch.setattr("fettle.stages.quantize.Quantize._edit", lambda *_: pytest.fail("it quantizes again"))
    run(load_recipe(file), resume=True)
    assert json.loads((tmp_path / "run" / "findings.json").read_text())["row"] == first
    run(load_recipe(file, ["evaluate.0.context=32"]), resume=True)
    second = json.loads((tmp_path / "run" / "findings.json").read_text())["row"]
    assert all(second[key][0]["mean"] != first[key][0]["mean"] for key in ("evaluation_before", "evaluation"))
