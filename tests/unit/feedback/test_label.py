"""Labelling: sessions by scripted keys, and the command itself in a terminal, killed and gone on with."""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.feedback.label import default_output, label
from fettle.feedback.records import Ranking, Record, read_records
from unit.feedback.makers import write

ROWS = [
    {"id": "p1", "prompt": "First?", "answers": [{"text": "one", "source": "SECRET-A"}, {"text": "two", "source": "SECRET-B"}]},
    {"id": "p2", "prompt": "Second?", "answers": ["three", "four", "five"]},
    {"id": "p3", "prompt": "Third?", "answers": ["six"], "questions": ["Good?", {"ask": "Why?", "type": "text"}], "rules": ["No \x1b[31mred."]},
]  # fmt: skip


def items(folder: Path) -> Path:
    return write(folder / "items.jsonl", *ROWS)


def sit(
    folder: Path, keys: str | Iterator[str], terminal: bool = False, width: int = 100, **more
) -> tuple[str, list[Record]]:
    """One sitting of ada's: what was shown, and all records that there are then."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None, highlight=False)
    path = label(str(folder / "items.jsonl"), "ada", console=console, keys=iter(keys), **more)
    return out.getvalue(), read_records([str(path)]) if path.read_bytes() else []


def test_a_whole_sitting(tmp_path: Path) -> None:
    items(tmp_path)
    said, found = sit(tmp_path, "2" + "2=3" + "y" + "too long\x7f\x7f\x7f\x7fwide\n" + "?")
    assert [r.kind for r in found] == ["ranking", "ranking", "question", "question", "rule"]  # type: ignore[attr-defined]
    first, second, good, why, rule = found
    assert isinstance(first, Ranking) and isinstance(second, Ranking)
    assert [first.ranks[i] for i in first.shown] == [2, 1] and [second.ranks[i] for i in second.shown] == [2, 1, 1]
    assert (good.value, why.value, rule.verdict) == (True, "too wide", "unsure")  # type: ignore[attr-defined]
    assert all(r.labeler == "ada" and r.seconds is not None for r in found)
    assert "5 labels in" in said and "nothing is left to label" in said
    assert (
        "SECRET" not in said and "\x1b[31m" not in said
    )  # neither whose answers they are, nor what takes hold of the terminal


def test_skip_undo_and_quit(tmp_path: Path) -> None:
    items(tmp_path)
    said, found = sit(tmp_path, "1" + "s" + "u" + "u" + "u" + "2" + "q" + "1")
    assert [(r.prompt_id, r.skipped) for r in found] == [("p1", False)]
    assert isinstance(found[0], Ranking) and [found[0].ranks[i] for i in found[0].shown] == [2, 1]
    assert "Skipped." in said and said.count("Taken back.") == 2 and "There is nothing to take back." in said
    assert "1 labels in" in said and "4 to go, with the same command" in said


def test_it_goes_on_where_it_stopped_and_may_undo_across_sittings(tmp_path: Path) -> None:
    items(tmp_path)
    sit(tmp_path, "1sq")
    said, found = sit(tmp_path, "")
    assert "Third?" in said and "First?" not in said and "Second?" not in said  # what was skipped is not asked again
    assert [r.skipped for r in found] == [False, True]
    said, found = sit(tmp_path, "u" + "t" + "q")
    assert len(found) == 2 and isinstance(found[1], Ranking) and found[1].ranks == (1, 1, 1)
    said, _ = sit(tmp_path, "ynow/skip\n/undo\nx\n")
    assert "Expected" not in said


def test_typed_commands(tmp_path: Path) -> None:
    items(tmp_path)
    sit(tmp_path, "ttn")
    said, found = sit(tmp_path, "/undo\n" + "y" + " \n" + "/skip\n" + "/quit")
    assert "Expected a text, found ''." in said
    assert [(r.skipped, getattr(r, "value", None)) for r in found[2:]] == [(False, True), (True, None)]


def test_every_label_is_on_disk_before_the_next_key_is_read(tmp_path: Path) -> None:
    items(tmp_path)
    file, counts = tmp_path / "items.ada.jsonl", []

    def keys() -> Iterator[str]:
        for key in "1ty":
            counts.append(file.read_bytes().count(b"\n"))
            yield key
        counts.append(file.read_bytes().count(b"\n"))

    sit(tmp_path, keys())
    assert counts == [0, 1, 2, 3]


def test_the_screen(tmp_path: Path) -> None:
    items(tmp_path)
    wide, _ = sit(tmp_path, "1x2q", terminal=True, width=120)
    wide = STYLE.sub("", wide)
    top = next(line for line in wide.splitlines() if "╭─ 1" in line and "╭─ 3" in line)  # three beside each other
    assert top.count("╭") == 3 and "'x' means nothing here." in wide and "ada: item 2 of 3, 1 of 5 labels" in wide
    narrow, _ = sit(tmp_path, "", width=76)
    assert any(line.count("╭") == 2 for line in narrow.splitlines()) and not any(
        line.count("╭") == 3 for line in narrow.splitlines()
    )


def test_two_labelers_see_orders_of_their_own(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"{i}?", "answers": ["one", "two"]} for i in range(60)]
    write(tmp_path / "items.jsonl", *rows)
    shown = {}
    for who in ("ada", "bo"):
        path = label(str(tmp_path / "items.jsonl"), who, console=Console(file=io.StringIO()), keys=iter("1" * 60))
        shown[who] = [r.shown for r in read_records([str(path)]) if isinstance(r, Ranking)]
    assert shown["ada"] != shown["bo"]
    assert all(15 < sum(s == (0, 1) for s in orders) < 45 for orders in shown.values())


def test_names_of_labelers_make_names_of_files(tmp_path: Path) -> None:
    assert default_output("some/items.jsonl.gz", "ada") == Path("some/items.ada.jsonl")
    with pytest.raises(FettleError, match="labeler '../x': a name has letters"):
        default_output("items.jsonl", "../x")


# The command, in a terminal of its own.


STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`fettle label` behind a pseudo-terminal."""

    def __init__(self, folder: Path) -> None:
        import fcntl
        import struct
        import termios

        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.before = termios.tcgetattr(theirs)
        code = "from fettle.cli import main; main(['label', 'items.jsonl', '--labeler', 'ada'])"
        environment = os.environ | {"TERM": "xterm-256color", "NO_COLOR": "1", "PYTHONUTF8": "1"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )  # fmt: skip
        self.theirs, self.said = theirs, ""
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What is said up to and with a pattern; it counts from the last one on."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.said, re.DOTALL)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.said!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                self.said += self.characters.decode(os.read(self.ours, 65536))
                self.said = STYLE.sub("", self.said)
        found, self.said = self.said[: match.end()], self.said[match.end() :]
        return found

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def restored(self) -> bool:
        """Whether the terminal echoes and waits for lines as before."""
        import termios

        return termios.tcgetattr(self.theirs)[3] == self.before[3]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_in_a_terminal_killed_and_gone_on_with(tmp_path: Path, terminals: list[Terminal]) -> None:
    items(tmp_path)
    labels = tmp_path / "items.ada.jsonl"
    first = Terminal(tmp_path)
    terminals.append(first)
    screen = first.wait_for("q quit")
    assert "item 1 of 3" in screen and "First?" in screen and "╭─ 1" in screen and "SECRET" not in screen
    assert not first.restored()
    first.press("\x1b[A1")  # an arrow key means nothing; no Enter is needed
    assert "Saved." in first.wait_for(r"item 2 of 3.*Saved\.")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert len(read_records([str(labels)])) == 1  # what was confirmed is there

    second = Terminal(tmp_path)
    terminals.append(second)
    assert "First?" not in second.wait_for("item 2 of 3.*q quit")
    second.press("u")
    second.wait_for(r"item 1 of 3.*Taken back\..*q quit")
    second.press("2s")
    second.wait_for("item 3 of 3.*q quit")
    second.press("y")
    second.wait_for("/quit")
    second.press("because é\x7fe\r")
    second.wait_for(r"Is this rule violated\?.*q quit")
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(30) == 128 + signal.SIGTERM and second.restored()
    found = read_records([str(labels)])
    assert [(r.prompt_id, r.skipped, getattr(r, "value", None)) for r in found] == [
        ("p1", False, None), ("p2", True, None), ("p3", False, True), ("p3", False, "because e"),
    ]  # fmt: skip
