"""`fettle feedback`: from labels to rows that the reader of preferences takes, and a report."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from fettle.cli import main
from unit.feedback.makers import question, ranking, write


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    folder = tmp_path / "labels"
    folder.mkdir()
    write(folder / "ada.jsonl", ranking([1, 2, 2]), question(True))
    write(folder / "bo.jsonl", ranking([1, 2, 3], labeler="bo"), ranking([2, 1], "p2", "bo"))
    return str(folder)


@pytest.mark.parametrize(("arguments", "rows"), [
    (["pairs"], 6), (["pairs", "--majority"], 3), (["pairs", "--without", "bo"], 2), (["rankings"], 3),
    (["labels", "--by", "Helpful?"], 1),
])  # fmt: skip
def test_rows_are_written(
    labels: str, arguments: list[str], rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert run(["feedback", arguments[0], labels, *arguments[1:], "-o", str(out)]) == 0
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == rows
    assert capsys.readouterr().out.startswith(f"{out}: {rows} ")


def test_a_report_is_printed_and_written(labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = write(tmp_path / "gold.jsonl", ranking([1, 2, 3], labeler="gold"))
    assert run(["feedback", "report", labels, "--gold", str(gold), "-o", str(tmp_path / "report.json")]) == 0
    said = capsys.readouterr().out
    assert (
        "4 records (3 ranking, 1 question) on 2 prompts" in said
        and "gold" in said
        and "Fewer than 20 judgements" in said
    )
    found = orjson.loads((tmp_path / "report.json").read_bytes())
    assert [(s["labeler"], s["basis"], s["compared"]) for s in found["labelers"]] == [
        ("ada", "gold", 3),
        ("bo", "gold", 3),
    ]


def test_mistakes_are_sentences(labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["feedback", "pairs", labels, "--by", "rules", "-o", str(tmp_path / "x.jsonl")]) == 1
    assert "no record compares answers by 'rules'" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()
    assert run(["feedback", "report", str(tmp_path / "none")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
