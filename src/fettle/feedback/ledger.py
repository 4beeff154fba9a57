"""The file that receives labels: every label is on disk before the next question, and one process writes at a time.

A label is one line, written and synced at once. What a killed process may leave is a line without its end, whose label was never
confirmed to anybody: it is completed where it is whole, and removed where it is not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fettle.core.errors import FettleError
from fettle.core.files import make_folder, sync, writing
from fettle.feedback.items import Item
from fettle.feedback.records import Problem, Record, raise_problems, scan


class Ledger:
    """One labeler's labels in a file that may hold those of others. Use it in a `with`."""

    def __init__(self, path: Path, labeler: str) -> None:
        if path.suffix != ".jsonl":
            raise FettleError(f"{path}: labels go to a file that ends in .jsonl")
        self.path, self.labeler = path, labeler
        self.repaired = False
        make_folder(path.parent)
        with writing(path):
            new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            if new:
                sync(path.parent)
            self._repair()
            found = list(scan([str(path)]))
            raise_problems([row.said for row in found if isinstance(row, Problem)], [str(path)])
            self.records = [row[1] for row in found if not isinstance(row, Problem)]
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    @property
    def own(self) -> list[Record]:
        """This labeler's records."""
        return [record for record in self.records if record.labeler == self.labeler]

    def check(self, items: Sequence[Item]) -> None:
        """FettleError where a prompt of these items is another one than that which the file has labels of."""
        known = {record.prompt_id: record.digest for record in self.records}
        for item in items:
            if known.get(item.prompt_id, item.digest) != item.digest:
                raise FettleError(
                    f"{self.path}: has labels of another prompt with the id '{item.prompt_id}'; the items were changed, or the labels "
                    "belong to another file: choose another with --output"
                )

    def append(self, record: Record) -> None:
        """Add a label; it is on disk when this returns. FettleError, and the file as it was, where the system refuses."""
        size = os.fstat(self._file).st_size
        line = record.to_line()
        with writing(self.path):
            try:
                while line:
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
        self.records.append(record)

    def undo(self) -> Record | None:
        """Take back the label that was written last, and return it; None where there is none, or it is another labeler's."""
        if not self.records or self.records[-1].labeler != self.labeler:
            return None
        data = self.path.read_bytes().rstrip(b"\r\n \t")
        with writing(self.path):
            os.ftruncate(self._file, data.rfind(b"\n") + 1)
            os.fsync(self._file)
        return self.records.pop()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FettleError(
                f"{self.path}: another `fettle label` is writing to it; end that one, or choose another file with --output"
            ) from None

    def _repair(self) -> None:
        """End a last line that was not ended: completed where it is a whole object, else removed."""
        data = self.path.read_bytes()
        if not data or data.endswith(b"\n"):
            return
        start = data.rfind(b"\n") + 1
        with writing(self.path):
            if data[start:].rstrip().endswith(b"}") and _is_object(data[start:]):
                os.write(self._file, b"\n")
            else:
                os.ftruncate(self._file, start)
                self.repaired = True
            os.fsync(self._file)


def _is_object(line: bytes) -> bool:
    from fettle.data.parse import BadRow, parse_object

    try:
        parse_object(line)
    except BadRow:
        return False
    return True
