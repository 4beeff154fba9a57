"""Single keys from a terminal, or characters from whatever is piped in."""

from __future__ import annotations

import codecs
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

END = "\x04"
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)  # what arrow and function keys send


@contextmanager
def keyboard(source: TextIO | None = None) -> Iterator[Iterator[str]]:
    """Within it, keys as they are pressed, without Enter and without echo; ends with the input, or at Ctrl-D.

    The terminal is put back on leaving, at an interruption and at a signal that ends the process too.
    """
    source = source or sys.stdin
    if not source.isatty():
        yield _characters(source)
    elif sys.platform == "win32":
        yield _console()
    else:
        with _unbuffered(source):
            yield _pressed(source)


def _characters(source: TextIO) -> Iterator[str]:
    while character := source.read(1):
        yield character


def _pressed(source: TextIO) -> Iterator[str]:
    """Characters of a terminal; what arrow and function keys send is left out."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    while data := os.read(source.fileno(), 1024):
        for character in ESCAPE.sub("", decode(data)):
            if character == END:
                return
            yield character


@contextmanager
def _unbuffered(source: TextIO) -> Iterator[None]:
    import termios
    import tty

    before = termios.tcgetattr(source)
    ends = (signal.SIGTERM, signal.SIGHUP)
    handlers: dict[int, Any] = {}

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        handlers = {number: signal.signal(number, leave) for number in ends}
        tty.setcbreak(source)
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _console() -> Iterator[str]:
    import msvcrt

    while (character := msvcrt.getwch()) != END:  # type: ignore[attr-defined]
        if character in ("\x00", "\xe0"):  # the first half of an arrow or function key
            msvcrt.getwch()  # type: ignore[attr-defined]
        elif character == "\x03":
            raise KeyboardInterrupt
        else:
            yield character
