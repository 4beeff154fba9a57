"""One process at a time: who comes second is told who is there, and a dead process holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.core.locks import LOCK, alone_in, locked

HOLD = """
import sys, time
from pathlib import Path
from fettle.core.locks import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(FettleError, match=f"run: process {other.pid} writes here now; wait for its end, or"):
            with alone_in(folder):
                pytest.fail("both are in")
        other.send_signal(signal.SIGKILL)
    assert (folder / LOCK).exists()
    with alone_in(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_in_which_nothing_was_written_is_gone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(ValueError, match="no"), alone_in(tmp_path / name):
            raise ValueError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_of_many_that_wait_one_is_in_at_a_time(tmp_path: Path) -> None:
    """Each removes the file as it leaves, while others wait for it."""
    inside, most, told = [0], [0], []

    def work() -> None:
        for _ in range(40):
            with locked(tmp_path / "lock", told.append):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1] and told and not (tmp_path / "lock").exists()
