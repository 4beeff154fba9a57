"""What a run of one stage looks at before its first step, and what it leaves to read."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.core.locks import alone_in
from fettle.stages import check, load_recipe, open_model, run, tune
from fettle.train import loop
from fettle.train.log import read_metrics

RECIPE = """
model: {{path: {model}, dtype: float32}}
edits: [{{kind: lora, rank: 2}}]
data: [{{path: {folder}/data.jsonl}}]
optim: {{steps: 3}}
batch: {{tokens: 64}}
output: {folder}/run
evaluate:
  - {{path: {folder}/tasks.jsonl, max_tokens: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> Path:
    rows = [{"instruction": f"Say {i}.", "output": "one two " * (40 if i % 10 == 0 else 1)} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": f"{i} and", "answer": str(i)} for i in range(6)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=tiny_llama, folder=tmp_path))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate=[{path: none.jsonl}]", r"evaluate\.0\.path: none\.jsonl: no such file"),
        ("evaluate=[{path: FOLDER/tasks.jsonl, shots: 9}]", r"evaluate\.0: .*tasks\.jsonl:1: shots is 9 but"),
        ("evaluate=[{path: FOLDER/long.jsonl}]", r"evaluate\.0: .*long\.jsonl:1: the prompt has \d+ tokens"),
        ("evaluate=[{path: FOLDER/data.jsonl, kind: preference}]", r"evaluate\.0: .*data\.jsonl:1: "),
        ("evaluate=[{path: FOLDER/data.jsonl, kind: classify}]", r"evaluate\.0: .*need a model with task: classify"),
        ("evaluate=[{path: none.txt, kind: perplexity}]", r"evaluate\.0\.path: none\.txt: no such file"),
        ("data=[{path: none.jsonl}]", r"data\.0\.path: none\.jsonl: no such file or folder"),
        ("validation={data: [{path: none.jsonl}]}", r"validation\.data\.0\.path: none\.jsonl: no such file"),
    ],
)
def test_files_that_cannot_be_used_are_found_before_a_step(
    recipe: Path, override: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "long.jsonl").write_text(json.dumps({"prompt": "one two " * 400, "answer": "1"}))
    monkeypatch.setattr(loop, "run_step", lambda *_: pytest.fail("a step was taken"))
    pipeline = load_recipe(recipe, [override.replace("FOLDER", str(recipe.parent))])
    with pytest.raises(FettleError, match=rf"^override '.*': {said}"):
        run(pipeline)
    assert not (recipe.parent / "run" / "checkpoints").exists()
    found = []
    try:
        (report,) = check(pipeline, 0, time_steps=False)
        found = report.problems
    except FettleError as error:
        found = [str(error)]
    assert re.search(said, found[0])


@pytest.mark.parametrize("edits", ["[{kind: lora}]", "[{kind: prompt_tuning, tokens: 100}]"])
def test_positions_end_with_the_models_context(recipe: Path, edits: str) -> None:
    """A row of 2,048 tokens holds texts of up to 512 of a model that sees so many, soft prompt included."""
    (recipe.parent / "long.txt").write_text("one two three " * 3000)
    data = f"[{{path: {recipe.parent}/long.txt, format: text}}]"
    (stage,) = load_recipe(
        recipe, ["batch.tokens=2048", f"data={data}", f"edits={edits}", f"validation={{data: {data}}}"]
    ).stages
    forest, _ = stage.open(None)
    assert forest.context == (512 if "lora" in edits else 412)
    for corpus in (stage.corpus(forest), stage.held_out(forest).corpus):
        batch = corpus.batch(0)
        assert int(batch.positions.max()) == {512: 511, 412: 408}[forest.context]  # a fifth of a row: windows fill it
        assert batch.useful == {512: 2048, 412: 2045}[forest.context]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_run_does_not_go_on_over_another_base(
    recipe: Path, tiny_llama: Path, file: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe.parent / "base"
    shutil.copytree(tiny_llama, base)
    pipeline = load_recipe(recipe, [f"model.path={base}", "evaluate=[]"])
    if not finished:
        monkeypatch.setattr(tune, "save_artifact", lambda *_: 1 / 0)
    with nullcontext() if finished else pytest.raises(ZeroDivisionError):
        run(pipeline)
    monkeypatch.undo()
    whole = (base / file).read_bytes()
    other = whole[:-1] + bytes([whole[-1] ^ 1]) if file.endswith("safetensors") else whole + b"\n"
    (base / file).write_bytes(other)
    with pytest.raises(
        FettleError, match="was written on another parent .*the base's weights or tokenizer, have changed"
    ):
        run(pipeline, resume=True)
    (base / file).write_bytes(whole)
    run(pipeline, resume=True)


def test_what_a_check_notes_a_run_tells_and_reports(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(load_recipe(recipe))
    folder = recipe.parent / "run"
    (listed,) = (folder / "cache").glob("*.over-64.jsonl")
    said = f"3 rows are longer than 64 tokens and were left out (long: drop); they are listed in {listed}"
    told, report = capsys.readouterr().err, (folder / "report.md").read_text()
    assert said.replace(" ", "") in re.sub(r"\s", "", told) and f"- {recipe.parent}/data.jsonl: {said}\n" in report
    assert "format alpaca, by its columns" in report and "## Evaluation" in report
    (report_of_check,) = check(load_recipe(recipe), 0, time_steps=False)
    assert set(json.loads((folder / "artifact" / "manifest.json").read_text())["notes"]) <= set(report_of_check.notes)


def test_scores_come_after_the_report(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fettle.stages.tune.evaluate", fail)
    with pytest.raises(RuntimeError):
        run(load_recipe(recipe))
    assert "## Evaluation" not in (recipe.parent / "run" / "report.md").read_text()
    assert (recipe.parent / "run" / "loss.png").exists() and (recipe.parent / "run" / "artifact").exists()


def test_resumed_with_other_evaluations_they_are_made(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe.parent / "run"
    run(load_recipe(recipe))
    first = (folder / "report.md").read_text()
    scores = (folder / "evaluation" / "results.json").read_bytes()
    monkeypatch.setattr(loop, "run_step", lambda *_: pytest.fail("a step was taken"))
    run(load_recipe(recipe), resume=True)
    assert (folder / "report.md").read_text() == first, "as it was, its columns in their order"
    for change in ("evaluate.0.limit=2", "evaluate.0.max_tokens=2"):
        run(load_recipe(recipe, [change]), resume=True)
        found = json.loads((folder / "evaluation" / "results.json").read_text())["results"][0]
        key, _, value = change.removeprefix("evaluate.0.").partition("=")
        assert found["settings"][key] == int(value)
    tasks = recipe.parent / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace('"answer": "1"', '"answer": "7"'))
    run(load_recipe(recipe), resume=True)
    assert (folder / "evaluation" / "results.json").read_bytes() != scores


def test_time_and_memory_are_those_of_all_its_processes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_save", _stopping(loop._save, 2))
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(recipe, ["checkpoint={every: 1}"]))
    monkeypatch.undo()
    folder = recipe.parent / "run"
    rows = read_metrics(folder)
    rows[-1] |= {"elapsed": 1000.0, "peak_bytes": 1 << 50}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(load_recipe(recipe, ["checkpoint={every: 1}"]), resume=True)
    facts = json.loads((folder / "artifact" / "manifest.json").read_text())
    assert 1000 < facts["seconds"] < 1600 and facts["peak_bytes"] == 1 << 50
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["elapsed"] > 1000


def _stopping(save, at: int):
    def stop(job, step, *rest) -> None:
        save(job, step, *rest)
        if step == at:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("resume", [False, True])
def test_another_process_in_the_output_is_noticed(recipe: Path, resume: bool) -> None:
    with alone_in(recipe.parent / "run"), pytest.raises(FettleError, match=r"run: process \d+ writes here now"):
        run(load_recipe(recipe), resume=resume)


def test_files_of_all_stages_are_asked_for_before_the_first_one_runs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent
    one = "\n".join("    " + line for line in recipe.read_text().strip().splitlines())
    stages = (
        one.replace("    model", "  - model", 1)
        + "\n"
        + one.replace("    model", "  - model", 1).replace("/run", "/two")
    )
    recipe.write_text(f"stages:\n{stages}\n")
    monkeypatch.setattr(loop, "run_step", lambda *_: pytest.fail("a step was taken"))
    for change, said in (
        (
            f"stages.1.validation={{data: [{{path: {folder}/data.jsonl}}]}}",
            r"validation\.data\.0\.path: .* is also trained on",
        ),
        ("stages.1.evaluate.0.path=none.jsonl", r"evaluate\.0\.path: none\.jsonl: no such file"),
        ("stages.1.data.0.path=none.jsonl", r"data\.0\.path: none\.jsonl: no such file"),
    ):
        with pytest.raises(FettleError, match=said):
            run(load_recipe(recipe, [change]))
        assert not (folder / "run").exists()


@pytest.mark.parametrize("name", ["data.jsonl", "copy.jsonl", "link.jsonl", ".", "d*.jsonl", "sub/../data.jsonl"])
def test_rows_that_are_trained_on_are_no_held_out_rows(recipe: Path, name: str) -> None:
    folder = recipe.parent
    (folder / "sub").mkdir()
    (folder / "copy.jsonl").write_bytes((folder / "data.jsonl").read_bytes())
    (folder / "link.jsonl").symlink_to("data.jsonl")
    pipeline = load_recipe(recipe, [f"validation={{data: [{{path: {folder / name}}}]}}"])
    with pytest.raises(FettleError, match=r"validation\.data\.0\.path: '.*\.jsonl' is also trained on"):
        run(pipeline)
    with pytest.raises(FettleError, match="is also trained on"):
        check(pipeline, 0, time_steps=False)
    (folder / "held.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    run(load_recipe(recipe, [f"validation={{data: [{{path: {folder / 'held.jsonl'}}}]}}"]))


def test_an_artifact_on_a_relative_base_names_itself_elsewhere(
    recipe: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent
    shutil.copytree(tiny_llama, folder / "base")
    monkeypatch.chdir(folder)
    artifact = run(load_recipe(recipe, ["model.path=./base", "evaluate=[]"]))
    assert open_model(str(artifact))[1]
    monkeypatch.chdir("/")
    with pytest.raises(
        FettleError, match=r"artifact: its base, '\./base' in manifest\.json, cannot be opened from here: .*no folder"
    ):
        open_model(str(artifact))
