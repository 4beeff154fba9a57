"""The file of labels: on disk at once, whole lines only, one writer, the last label can be taken back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.feedback.items import read_items
from fettle.feedback.ledger import Ledger
from unit.feedback.makers import ranking, records, write


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def test_a_label_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "labels.jsonl", []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(path.stat().st_size), real(handle))[1])
    with Ledger(path, "ada") as ledger:
        for prompt in ("p1", "p2"):
            ledger.append(records(ranking([1, 2], prompt))[0])
            assert synced[-1] == path.stat().st_size > 0  # nothing was written after it was synced
    assert len(lines(path)) == 2


def test_it_goes_on_with_what_is_there_and_undo_reaches_back(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    one, two = records(ranking([1, 2], "p1"), ranking([2, 1], "p2"))
    for record in (one, two):
        with Ledger(path, "ada") as ledger:
            ledger.append(record)
    with Ledger(path, "ada") as ledger:
        assert ledger.own == [one, two]
        assert ledger.undo() == two and len(lines(path)) == 1
        ledger.append(two)
        assert (ledger.undo(), ledger.undo(), ledger.undo()) == (two, one, None)
    assert path.read_bytes() == b""


def test_undo_leaves_other_labelers_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", ranking([1, 2], labeler="bo"))
    with Ledger(path, "ada") as ledger:
        assert ledger.own == [] and ledger.undo() is None and len(lines(path)) == 1


def test_whatever_a_kill_leaves_of_a_line_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    first, last = (r.to_line() for r in records(ranking([1, 2], "p1"), ranking([2, 1], "p2", seconds=2.0)))
    for cut in sorted({*range(0, len(last), 9), 1, len(last) - 2, len(last) - 1}):
        path.write_bytes(first + last[:cut])
        with Ledger(path, "ada") as ledger:
            whole = cut == len(last) - 1  # all but the end of the line
            assert [r.prompt_id for r in ledger.records] == ["p1", *["p2"] * whole]
            assert ledger.repaired == (0 < cut < len(last) - 1)
        assert path.read_bytes() == first + (last if whole else b"")


def test_damage_elsewhere_is_an_error_and_nothing_is_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", ranking([1, 2], "p1"), '{"kind": "rank', ranking([1, 2], "p2"))
    before = path.read_bytes()
    with pytest.raises(FettleError, match=r"labels\.jsonl:2: not valid JSON"):
        Ledger(path, "ada")
    assert path.read_bytes() == before


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with Ledger(path, "ada"), pytest.raises(FettleError, match="another `fettle label` is writing to it"):
        Ledger(path, "bo")
    with Ledger(path, "bo"):
        pass


def test_a_disk_that_refuses_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "labels.jsonl", os.write
    one, two = records(ranking([1, 2], "p1"), ranking([2, 1], "p2"))
    with Ledger(path, "ada") as ledger:
        ledger.append(one)
        before = path.read_bytes()
        calls = iter([10, None])

        def full(handle: int, data: bytes) -> int:
            if (room := next(calls)) is None:
                raise OSError(28, "No space left on device")
            return real(handle, data[:room])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(FettleError, match="No space left on device"):
            ledger.append(two)
        assert path.read_bytes() == before and ledger.records == [one]


def test_prompts_that_changed_under_their_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.jsonl", ranking([1, 2], "p1"))
    items = read_items(str(write(tmp_path / "items.jsonl", {"id": "p1", "prompt": "another", "answers": ["a", "b"]})))
    with Ledger(path, "ada") as ledger, pytest.raises(FettleError, match="labels of another prompt with the id 'p1'"):
        ledger.check(items)
    with pytest.raises(FettleError, match=r"ends in \.jsonl"):
        Ledger(tmp_path / "labels.json", "ada")
