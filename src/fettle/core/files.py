"""Files that are whole or absent: written aside, synced, renamed, hashed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import orjson

from fettle.core.errors import FettleError

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FOREIGN = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust tell of a system's error, in types of their own
ASIDE = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")  # what is written aside: its name, its process, and what it is


class NotWritten(FettleError):
    """The system refuses to write. `reason` is the system's own."""

    def __init__(self, path: Path, reason: str, full: bool) -> None:
        super().__init__(
            f"{path}: cannot be written ({reason}); {'make room and go on' if full else 'choose another place, or clear the way'}"
        )
        self.reason, self.full = reason, full


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """NotWritten with the name of `path` where the system refuses a write: a full disk, no permission, a file in the way."""
    try:
        yield
    except NotWritten as error:  # of a part of it, written aside
        raise NotWritten(path, error.reason, error.full) from error.__cause__
    except Exception as error:
        foreign = FOREIGN.search(str(error))
        if foreign is None and (not isinstance(error, OSError) or _elsewhere(error, path)):
            raise
        number = int(foreign[1]) if foreign else getattr(error, "errno", None)
        raise NotWritten(path, os.strerror(number) if number else str(error), number in FULL) from error


def _elsewhere(error: OSError, path: Path) -> bool:
    """Whether an error has nothing to do with writing `path`: of a connection, or of a file that is read meanwhile."""
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__ != "builtins":
        return True
    if not isinstance(error.filename, (str, os.PathLike)):
        return False
    at, home = Path(error.filename).absolute(), path.absolute().parent
    return not (at.is_relative_to(home) or home.is_relative_to(at))


def make_folder(path: Path) -> Path:
    """The folder, made with those above it where they are not there. FettleError where it cannot be."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file aside through the handle this gives, then sync and rename it to `path`.

    A reader sees the old bytes or the whole new ones, never a part; a body that fails leaves what was there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    with new_file(path) as handle:
        handle.write(data)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file in one step."""
    write_bytes(path, orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def read_json(path: Path) -> dict:
    """A JSON object from a file; FettleError where it is missing or broken."""
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise FettleError(f"{path}: no such file") from None
    except orjson.JSONDecodeError as error:
        raise FettleError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FettleError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside, then seal and rename it to `path`, replacing what stood there.

    On leaving, a manifest of SHA-256 hashes is added (merged into `manifest.json` where the body
    wrote one), everything is synced, and only then does the name appear.
    """
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        aside.mkdir()
        try:
            yield aside
            seal(aside)
            if path.exists():
                os.replace(path, old)
                try:
                    os.replace(aside, path)
                except OSError:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(aside, path)
            sync(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Undo in a folder what killed processes left half-done, of one name or of all.

    `.old` is what a name held before: it is put back where the process died before the new one got the name.
    """
    for path in sorted(folder.glob(".*")):
        found = ASIDE.fullmatch(path.name)
        if found is None or found[1] != (name or found[1]) or _lives(int(found[2])):
            continue
        if found[3] == "old" and not path.with_name(found[1]).exists():
            os.replace(path, path.with_name(found[1]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether another process of that number is there."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def seal(folder: Path) -> None:
    """Record the hash of every file of a folder in its manifest, and sync them all."""
    listed = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    for file in files:
        sync(file)
    listed["files"] = {str(p.relative_to(folder)): sha256(p) for p in files}
    write_json(folder / MANIFEST, listed)
    mode = (folder / MANIFEST).stat().st_mode
    for file in files:  # some libraries write for the owner alone, whatever the umask says
        if file.stat().st_mode != mode:
            file.chmod(stat.S_IMODE(mode))
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync(inner)


def verify(folder: Path) -> dict:
    """The manifest of a sealed folder, after checking every file against it; FettleError names the first that differs."""
    listed = read_json(folder / MANIFEST)
    files = listed.get("files")
    if not isinstance(files, dict):
        raise FettleError(
            f"{folder / MANIFEST}: no 'files' in it; the folder was not written by fettle, or not to its end"
        )
    for name, digest in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise FettleError(f"{folder / MANIFEST}: names '{name}', which lies outside the folder")
        if not file.is_file():
            raise FettleError(f"{file}: listed in the manifest but missing")
        if sha256(file) != digest:
            raise FettleError(f"{file}: damaged (its SHA-256 is not the manifest's)")
    return listed
