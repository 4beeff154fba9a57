"""The rows of a run outlive what happens while it is resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fettle.train.log import METRICS, Log, read_metrics


def write(folder: Path, start: int, steps: range) -> None:
    log = Log(folder, start, quiet=True)
    for step in steps:
        log.row({"step": step, "loss": 1.0})
    log.close()


def test_rows_after_the_start_are_written_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"step": 6, "lo')
    write(tmp_path, 3, range(4, 5))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_kill_while_the_rows_are_rewritten_loses_none(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    child = os.fork()
    if child == 0:
        os.fsync = lambda handle: os._exit(9)
        Log(tmp_path, 5, quiet=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_write_that_the_system_refuses_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fettle.core.errors import FettleError

    log = Log(tmp_path, 0, quiet=True)
    log._file.close()
    log._file = open("/dev/full", "ab")
    with pytest.raises(FettleError, match=r"metrics.jsonl: cannot be written \(No space left"):
        log.row({"step": 1})
    with pytest.raises(FettleError, match="metrics.jsonl: cannot be written"):
        log.close()
