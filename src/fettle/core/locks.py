"""One process at a time: locks on files, which the system frees when their process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fettle.core.errors import FettleError
from fettle.core.files import make_folder, writing

LOCK = ".lock"


@contextmanager
def locked(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file, which is gone afterwards.

    Where another process has it, `busy` is told which, and if that returns the lock is waited for.
    """
    try:
        import fcntl
    except ImportError:  # a system without these locks
        yield
        return
    make_folder(path.parent)
    told = False
    while True:
        with writing(path):
            handle = open(path, "a+")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if told else fcntl.LOCK_NB))
            except BlockingIOError:
                handle.seek(0)
                busy(f"process {handle.read().strip() or 'unknown'}")
                told = True
                continue
            except OSError:
                pass  # a file system without these locks
            if not _is(handle, path):
                continue  # whoever held it has removed it since
            try:
                with writing(path):
                    handle.truncate(0)
                    handle.write(str(os.getpid()))
                    handle.flush()
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Write into a folder as the only process. FettleError where another one does."""

    def refuse(who: str) -> None:
        raise FettleError(f"{folder}: {who} writes here now; wait for its end, or choose another output")

    there = folder.exists()
    try:
        with locked(folder / LOCK, refuse):
            yield
    finally:
        if not there:
            with suppress(OSError):  # it is not empty, as it should be
                folder.rmdir()
