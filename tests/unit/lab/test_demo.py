"""The demo removes what it made before, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.lab import demo as module


def test_what_is_not_its_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "quickstart"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "old").touch()
    with pytest.raises(FettleError, match=r"data\.0\.path: no, {such}\.json: no such file"):
        module.demo("no, {such}.json")
    assert (tmp_path / "runs" / "demo" / "old").exists()

    def enough(*_: object, **__: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(module, "check", enough)
    with pytest.raises(InterruptedError):
        module.demo(short=True)
    assert not (tmp_path / "runs" / "demo").exists() and (tmp_path / "runs" / "quickstart" / "old").exists()
    assert (tmp_path / "runs" / "lab" / "instructions.jsonl").read_text().count("\n") == 12_000
