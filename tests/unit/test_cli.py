"""The command line: exit codes, sentences without a traceback, help for every verb."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fettle.cli import main
from fettle.core.errors import FettleError

VERBS = [
    ["check"], ["run"], ["chat"], ["eval"], ["export"], ["schema"],
    ["label"], ["feedback"], ["feedback", "report"], ["feedback", "pairs"], ["feedback", "rankings"], ["feedback", "labels"],
    ["lab"], ["lab", "list"], ["lab", "run"], ["lab", "data"], ["lab", "base"], ["lab", "demo"],
]  # fmt: skip


def code_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    "words",
    [
        "chat m --max-tokens 0", "chat m --temperature -1", "chat m --seed -1", "eval m t --limit 0", "eval m t --shots -1",
        "eval m t --seed -1", "check r -n -1", "lab run c --seeds 0", "lab data --instructions 0", "delta m -o o --steps 0",
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_anything_is_loaded(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fettle.stages

    monkeypatch.setattr(fettle.stages, "open_model", lambda name: pytest.fail("a model was loaded"))
    assert code_of(words.split()) == 2
    assert "Invalid value for" in capsys.readouterr().err


def test_what_an_evaluation_is_compared_with_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fettle.stages

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fettle.stages, "open_model", lambda name: pytest.fail("a model was loaded"))
    (tmp_path / "t.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    scores = {"mean": 1.0, "low": None, "high": None, "n": 1}
    row = {
        "where": "t.jsonl:1",
        "family": "",
        "cluster": "",
        "metric": "exact",
        "score": 1.0,
        "output": "b",
        "right": "b",
    }
    result = {"name": "t.jsonl", "kind": "task", "sha256": "0" * 64, "settings": {}, "scores": {"score": scores}}
    result |= {"families": {}, "clusters": {}, "about": {}, "rows": [row]}
    assert code_of(["eval", "m", "nothere.jsonl", "--against", "none.json"]) == 1
    assert "nothere.jsonl: no such task file, text or folder" in capsys.readouterr().err
    for name, content, said in (
        ("none.json", None, "none.json: no such file"),
        ("odd.json", {"a": 1}, "not a results file"),
        (
            "other.json",
            {"model": {}, "results": [result | {"name": "u.jsonl"}]},
            "nothing to compare: .* u.jsonl, .* t.jsonl",
        ),
        ("changed.json", {"model": {}, "results": [result]}, "t.jsonl: the two were run on different files"),
    ):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
        assert code_of(["eval", "m", "t.jsonl", "--against", name]) == 1
        assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*verb, "--help"]) == 0
    assert "Usage: fettle " + " ".join(verb) in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["--version"]) == 0
    assert capsys.readouterr().out == "fettle 0.1.0\n"


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["rnu"]) == 2
    assert "Did you mean 'run'" in capsys.readouterr().err


def test_a_mistake_in_a_recipe_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data:\n  - {path: a.jsonl}\nedits:\n  - {kind: lora, rnak: 4}\noutput: out\n")
    assert code_of(["check", str(recipe)]) == 1
    said = capsys.readouterr().err
    assert said == f"{recipe}:4: unknown key 'edits.0.rnak': did you mean 'rank'?\n"


def test_an_override_reaches_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data:\n  - {path: a.jsonl}\noutput: out\n")
    assert code_of(["run", str(recipe), "optim.lr=fast"]) == 1
    assert "optim.lr" in capsys.readouterr().err


def test_an_export_goes_beside_a_folder_or_gets_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fettle.export
    import fettle.stages

    written: list[Path] = []

    def export(forest: object, edits: object, target: Path, *more: object) -> object:
        written.append(target)
        raise FettleError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fettle.stages, "open_model", lambda name: (None, ()))
    monkeypatch.setattr(fettle.export, "export", export)
    (tmp_path / "mine").mkdir()
    for arguments in (["fettle/tiny"], ["mine", "--to", "llama"], ["fettle/tiny", "-o", "there"]):
        assert code_of(["export", *arguments]) == 1
    assert written == [Path("tiny-hf"), Path("mine/llama"), Path("there")]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import fettle.stages

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fettle.stages, "schema", broken)
    with pytest.raises(ZeroDivisionError):
        main(["schema"])


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interruption_ends_with_130(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, fettle.stages\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "fettle.stages.schema = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "from fettle.cli import main\nmain(['schema'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("choices", ["2,x,4", "1,4", "²", "", "44"])
def test_choices_of_bits_are_numbers_from_2_to_8(choices: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["quantize", "plan", "none.yaml", "--choices", choices]) == 2
    assert f"'{choices}' is not understood" in " ".join(capsys.readouterr().err.replace("│", " ").split())
