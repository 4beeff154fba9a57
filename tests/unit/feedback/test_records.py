"""Records: what is one, what is none and why, and that a line says what was read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fettle.core.errors import FettleError
from fettle.feedback.records import read_records, to_record
from unit.feedback.makers import about, question, ranking, records, verdict, write

GOOD = [
    ranking([2, 1, 2]),
    ranking([1, 1], shown=[1, 0], seconds=2.5),
    ranking([], skipped=True),
    question(True),
    question(None, skipped=True),
    question(5, question={"ask": "How good?", "type": "scale"}),
    question("red", question={"ask": "Which?", "type": "choice", "options": ["red", "blue"]}),
    question(2.5, question={"ask": "How many?", "type": "number"}),
    question("It is clear.", question={"ask": "Why?", "type": "text"}),
    verdict("violated"),
    {"kind": "rule", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    | {k: v for k, v in verdict("unsure").items() if k != "prompt"},
]


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row["kind"])
def test_a_line_reads_back(row: dict[str, Any]) -> None:
    record = to_record(row, "here")
    assert to_record(json.loads(record.to_line()), "here") == record
    assert record.to_line().endswith(b"\n") and record.to_line().count(b"\n") == 1


BAD = [
    (ranking([2, 1], prompt="p1") | {"kind": "rankign"}, "unknown kind 'rankign': did you mean 'ranking'?"),
    ({k: v for k, v in ranking([1, 2]).items() if k != "kind"}, "the key 'kind' is missing"),
    (ranking([1, 2]) | {"labeller": "bo"}, "unknown key 'labeller': did you mean 'labeler'?"),
    ({k: v for k, v in ranking([1, 2]).items() if k != "time"}, "the key 'time' is missing"),
    (ranking([1, 2], time="2026-11-21T10:00:00"), "time: input should have timezone info"),
    (ranking([1, 2], time=3), "time"),
    (ranking([2, 3]), "'ranks' are 2 places from 1 to 2, one an answer; found [2, 3]"),
    (ranking([1, 2], ranks=[1]), "'ranks' are 2 places"),
    (ranking([1, 2], ranks=[1, 2.5]), "ranks.1"),
    (ranking([1, 2], ranks=[]), "expected 'ranks', or skipped: true without them"),
    (ranking([1, 2], skipped=True), "expected 'ranks', or skipped: true without them"),
    (ranking([1, 2], shown=[0, 0]), "'shown' must list the answers 0 to 1 once each"),
    (ranking([1]), "answers"),
    (ranking([1, 2], answers=[{"text": "x"}, {"text": "x"}]), "answers 1 and 2 are the same text"),
    (ranking([1, 2], answers=[{"text": "x"}, {"text": " "}]), "answers.1: the text is empty"),
    (ranking([1, 2], messages=[{"role": "user", "content": "u"}]), "expected one of 'prompt' and 'messages'"),
    (ranking([1, 2], prompt_id=""), "prompt_id"),
    (ranking([1, 2]) | {"prompt": " "}, "'prompt' is empty"),
    (ranking([1, 2]) | {"prompt": None, "messages": [{"role": "assistant", "content": "u"}]}, "must end with what is to be answered"),
    (ranking([1, 2]) | {"prompt": None, "messages": [{"role": "human", "content": "u"}]}, "messages.0.role"),
    (ranking([1, 2], seconds=-1), "seconds"),
    (question(1), "'value': expected true or false, found 1"),
    (question(None), "expected a 'value', or skipped: true without one"),
    (question(8, question={"ask": "?", "type": "scale"}), "'value': expected a whole number from 1 to 7, found 8"),
    (question(True, question={"ask": "?", "type": "scale"}), "'value': expected a whole number from 1 to 7, found True"),
    (question("rad", question={"ask": "?", "type": "choice", "options": ["red", "blue"]}), "none of the options: did you mean 'red'?"),
    (question("x", question={"ask": "?", "type": "choice", "options": ["x"]}), "leaves no choice"),
    (question("x", question={"ask": "?", "options": ["x", "y"]}), "belong to type: choice"),
    (question(1, question={"ask": "?", "type": "scale", "low": 3, "high": 3}), "has no two values"),
    (question(" ", question={"ask": "?", "type": "text"}), "expected a text"),
    (verdict("maybe"), "verdict: input should be 'violated', 'not' or 'unsure'; found \"maybe\""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD, ids=range(len(BAD)))
def test_every_mistake_has_its_sentence_and_line(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", ranking([1, 2], prompt="other"), row)
    with pytest.raises(FettleError) as error:
        read_records([str(path)])
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_are_told_and_many_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", *["{oops"] * 12, ranking([1, 2]))
    with pytest.raises(FettleError) as error:
        read_records([str(path)])
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and lines[0].startswith(f"{path}:1: not valid JSON")
    assert lines[-1] == f"{path}: and 2 rows more that cannot be used"


def test_one_labeler_labels_a_thing_once_whatever_the_order_of_answers(tmp_path: Path) -> None:
    swapped = ranking([1, 2]) | {"answers": ranking([1, 2])["answers"][::-1]}
    path = write(tmp_path / "labels.jsonl", ranking([1, 2]), ranking([1, 2], labeler="bo"), swapped)
    with pytest.raises(FettleError) as error:
        read_records([str(path)])
    assert str(error.value) == f"{path}:3: 'ada' has labelled the same in {path}:1; keep one of the two"


def test_an_id_means_one_prompt_in_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", ranking([1, 2]))
    two = write(tmp_path / "b.jsonl", ranking([1, 2], labeler="bo") | {"prompt": "another"})
    with pytest.raises(FettleError, match="prompt_id 'p1' stands for another prompt in .*a.jsonl:1"):
        read_records([str(one), str(two)])


def test_labelers_can_be_left_out(tmp_path: Path) -> None:
    path = str(write(tmp_path / "labels.jsonl", ranking([1, 2]), ranking([2, 1], labeler="bo")))
    assert [r.labeler for r in read_records([path], without=["ada"])] == ["bo"]
    with pytest.raises(FettleError, match="no record is by the labeler 'adda': did you mean 'ada'?"):
        read_records([path], without=["adda"])
    with pytest.raises(FettleError, match="no records are left"):
        read_records([path], without=["ada", "bo"])


def test_no_record_at_all(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="no records; fettle label FILE writes them"):
        read_records([str(write(tmp_path / "labels.jsonl"))])


def test_a_prompt_keeps_its_form() -> None:
    plain, talk = records(GOOD[0], GOOD[-1])
    assert plain.asked == {"prompt": about()["prompt"]} and plain.conversation == [
        {"role": "user", "content": about()["prompt"]}
    ]
    assert [m["role"] for m in talk.asked["messages"]] == ["system", "user"] and talk.conversation == talk.asked[
        "messages"
    ]
