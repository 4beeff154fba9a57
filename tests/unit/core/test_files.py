"""Files are whole or absent, and damage is found and named."""

import errno
import os
from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.core.files import make_folder, new_file, new_folder, read_json, sweep, verify, write_bytes


def make(folder: Path) -> Path:
    with new_folder(folder) as aside:
        (aside / "a.bin").write_bytes(bytes(range(256)) * 4)
        (aside / "inner").mkdir()
        (aside / "inner" / "b.txt").write_text("hello")
    return folder


def test_a_sealed_folder_verifies(tmp_path: Path) -> None:
    assert set(verify(make(tmp_path / "f"))["files"]) == {"a.bin", "inner/b.txt"}


@pytest.mark.parametrize("offset", range(0, 1024, 51))
def test_a_flipped_byte_or_a_cut_is_found_and_named(tmp_path: Path, offset: int) -> None:
    folder = make(tmp_path / "f")
    whole = (folder / "a.bin").read_bytes()
    for damaged in (whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :], whole[:offset]):
        (folder / "a.bin").write_bytes(damaged)
        with pytest.raises(FettleError, match="a.bin: damaged"):
            verify(folder)


def test_a_missing_file_and_a_path_outside_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "f")
    (folder / "a.bin").unlink()
    with pytest.raises(FettleError, match="missing"):
        verify(folder)
    (folder / "manifest.json").write_text('{"files": {"../secret": "00"}}')
    with pytest.raises(FettleError, match="outside"):
        verify(folder)


def test_a_failed_body_leaves_what_was_there(tmp_path: Path) -> None:
    folder = make(tmp_path / "f")
    with pytest.raises(RuntimeError), new_folder(folder) as aside:
        (aside / "a.bin").write_bytes(b"half")
        raise RuntimeError
    verify(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_replacing_a_folder_and_a_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "f")
    with new_folder(folder) as aside:
        (aside / "c").write_text("new")
    assert set(verify(folder)["files"]) == {"c"}
    write_bytes(tmp_path / "x", b"1")
    write_bytes(tmp_path / "x", b"22")
    assert (tmp_path / "x").read_bytes() == b"22"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "x"]


def test_a_streamed_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    with new_file(path) as handle:
        handle.write(b"first ")
        handle.write(b"half")
        assert not path.exists()
    with pytest.raises(RuntimeError), new_file(path) as handle:
        handle.write(b"torn")
        raise RuntimeError
    assert path.read_bytes() == b"first half"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_broken_json_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(FettleError, match="m.json: not valid JSON"):
        read_json(tmp_path / "m.json")


@pytest.mark.parametrize("again", [True, False], ids=["written again", "swept"])
def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path, again: bool) -> None:
    folder = make(tmp_path / "f")
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, []

        def deadly(source: Path, target: Path) -> None:
            calls.append(target)
            if Path(target) == folder:
                os._exit(9)
            replace(source, target)

        os.replace = deadly
        with new_folder(folder) as aside:
            (aside / "c").write_text("new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not folder.exists()
    if again:
        with pytest.raises(RuntimeError), new_folder(folder):
            raise RuntimeError
    else:
        sweep(tmp_path)
    assert set(verify(folder)["files"]) == {"a.bin", "inner/b.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    (tmp_path / f".f.{os.getppid()}.tmp").mkdir()
    (tmp_path / ".hidden").mkdir()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


FULL = [OSError(errno.ENOSPC, "No space left on device"), Exception("Error while serializing: I/O error (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["of the system", "of a library in Rust"])
@pytest.mark.parametrize("inner", [True, False])
def test_a_full_disk_is_one_sentence_with_the_name(tmp_path: Path, error: Exception, inner: bool) -> None:
    folder = make(tmp_path / "f")
    with pytest.raises(FettleError, match=r"/f: cannot be written \(No space left on device\); make room"):
        with new_folder(folder) as aside:
            if inner:
                with new_file(aside / "c"):
                    raise error
            raise error
    verify(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text("")
    place = tmp_path / "good.jsonl" / "x"
    for write in (lambda: write_bytes(place / "a", b""), lambda: make(place), lambda: make_folder(place / "y")):
        with pytest.raises(FettleError, match="good.jsonl/x.*: cannot be written .(Not a directory|File exists)"):
            write()


def test_what_cannot_be_read_meanwhile_is_not_blamed_on_the_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out" / "f"):
        open(tmp_path / "in" / "missing")


def test_a_sealed_folder_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    with new_folder(tmp_path / "f") as aside:
        (aside / "a.bin").write_bytes(b"a")
        (aside / "a.bin").chmod(0o600)  # as a library leaves what it made as a temporary file
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "f").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}
