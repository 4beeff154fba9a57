"""The elements of one JSON array, found without reading the file whole, so that a broken one spoils only itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fettle.data.streams import HEAD, MAX_ROW, Broken

# A string ends at its quote, or at the end of the line where it was never closed (JSON has no line ends inside strings).
TOKEN = re.compile(rb'"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*(?:"|\\?\n|\\?\Z)|[{}\[\]]')
GAP = re.compile(rb"[\s,]*")
JUNK = re.compile(rb'(?:"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*"?|[^\s,{}\[\]"])+')
TORN = "not valid JSON: in the object that begins here a quote or a brace is missing"
FIRST_KEY = re.compile(rb'\{\s*("[^"\\\n]*(?:\\[^\n][^"\\\n]*)*")\s*:')
PAIR = {b"}": b"{", b"]": b"["}


@dataclass(frozen=True)
class Element:
    """The bytes of one element and the line it begins on, or what is wrong with that stretch of the file.

    `column` is its first character's, from 1, where another element begins on the same line before it, else 0.
    `lost` says that more elements may be lost with it, nobody knows how many.
    """

    line: int
    data: bytes
    problem: str | None = None
    column: int = 0
    lost: bool = False


class _Window:
    """The part of a stream that is being looked at: `data` from `at` on, and the line and indentation there."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.source, self.data, self.at, self.line = source, b"", 0, 1
        self.ended = False
        self.broken: str | None = None
        self.indent: bytes | None = b""  # what stands before `at` on its line, if that is only space
        self.column = 1  # of the character at `at`
        self.begun = 0  # the line on which the last element began
        self.several = False  # elements have begun on one line
        self.rows: bytes | None = None  # the indentation of the last element that began a line
        self.unsure = False  # an element ran to the end of the file, so braces alone do not tell where the next begins

    @property
    def size(self) -> int:
        return len(self.data) - self.at

    def more(self) -> bool:
        """Read at least as much again as there is; False at the end."""
        parts, want, grown = [self.data[self.at :]], max(self.size, 1), False
        while want > 0 and not self.ended:
            try:
                piece = next(self.source, None)
            except Broken as error:
                piece, self.broken = None, str(error)
            self.ended = piece is None
            parts.append(piece or b"")
            want -= len(parts[-1])
            grown = grown or bool(piece)
        self.data, self.at = b"".join(parts), 0
        return grown

    def cut(self, size: int) -> bytes:
        """Take the next `size` bytes."""
        taken = self.data[self.at : self.at + size]
        self.at += size
        self.line += taken.count(b"\n")
        _, newline, last = taken.rpartition(b"\n")
        before = last if newline else None if self.indent is None else self.indent + taken
        self.column = (1 if newline else self.column) + len(last.decode(errors="ignore"))
        self.indent = before if before is not None and not before.strip() else None
        return taken

    def skip_gap(self) -> bytes:
        """Step over spaces and commas; the byte that follows, or nothing at the end."""
        while True:
            found = GAP.match(self.data, self.at)
            self.cut(found.end() - self.at if found else 0)
            if self.size or not self.more():
                return self.data[self.at : self.at + 1]


def elements(source: Iterator[bytes]) -> Iterator[Element]:
    """Every element of the array in `source`, whose first byte that is no space must be '['."""
    for column, element in _elements(_Window(source)):
        yield replace(element, column=column) if column else element


def _elements(window: _Window) -> Iterator[tuple[int, Element]]:
    """Each element with the column it begins in, 0 for the first of a line."""
    window.skip_gap()
    window.cut(1)
    while True:
        first, beside = window.skip_gap(), window.line == window.begun
        column = window.column if beside else 0
        window.begun, window.several = window.line, window.several or beside
        if not first:
            problem = window.broken or "the file ends inside the array; what follows is lost"
            yield column, Element(window.line, b"", problem, lost=True)
            return
        if first == b"]":
            line = window.line
            window.cut(1)
            if not window.skip_gap():
                if window.broken:
                    yield column, Element(window.line, b"", window.broken, lost=True)
                return
            yield column, Element(line, b"]", "a closing bracket before the end of the file")
        elif first in b"{[":
            yield column, _container(window)
        else:
            yield column, _junk(window)


def _junk(window: _Window) -> Element:
    """A number, a word, a string or a stray brace where an object should begin."""
    line = window.line
    while True:
        found = JUNK.match(window.data, window.at)
        size = found.end() - window.at if found else 1
        if size < window.size or size > MAX_ROW or not window.more():
            return Element(line, window.cut(size), "expected an object, found something else")


def _container(window: _Window) -> Element:
    """The object (or list) that begins where the window stands."""
    done, stack, line = 0, bytearray(), window.line
    if window.indent is not None:
        window.rows = window.indent
    opener = re.compile(rb"\n" + (rb"[ \t]*" if window.rows is None else re.escape(window.rows)) + rb"(?=[{\[])")
    while True:
        found = opener.search(window.data, window.at + 1) if window.unsure else None
        done, end, torn = _scan(window, done, stack, found.end() if found else len(window.data))
        if end:
            return Element(line, window.cut(end))
        if torn or found:
            return _torn(window, line, opener)
        if window.size > MAX_ROW or not window.more():
            window.unsure = True
            return _torn(window, line, opener)


def _scan(window: _Window, done: int, stack: bytearray, limit: int) -> tuple[int, int, bool]:
    """Go on from `done` bytes: how far it got, where the element ended (0 for not yet), and whether it is torn."""
    data, start = window.data, window.at
    for token in TOKEN.finditer(data, start + done, limit):
        text = token.group()
        if text[:1] == b'"':
            if text[-1:] == b"\n":
                return token.start() - start, 0, True
            if token.end() == len(data) and _unclosed(text):
                return token.start() - start, 0, window.ended
        elif text in PAIR:
            if stack[-1:] != PAIR[text]:
                return token.start() - start, 0, True
            stack.pop()
            if not stack:
                return 0, token.end() - start, False
        else:
            before = data[max(start, token.start() - 64) : token.start()].rstrip()[-1:]
            if stack[-1:] == b"{" and before and before != b":":  # in an object, only a key's value can begin here
                return token.start() - start, 0, True
            stack += text
    return len(data) - start, 0, False


def _unclosed(text: bytes) -> bool:
    """Whether a string that reaches the end of the window may go on: no quote at its end, or an escaped one."""
    if len(text) == 1 or text[-1:] != b'"':
        return True
    body = text[1:-1]
    return (len(body) - len(body.rstrip(b"\\"))) % 2 == 1


def _holds_others(data: bytes) -> bool:
    """Whether behind an object another one begins with the first key of these bytes."""
    key = FIRST_KEY.match(data)
    return key is not None and re.search(rb"\}[ \t]*,[ \t]*\{\s*" + re.escape(key[1]) + rb"\s*:", data) is not None


def _torn(window: _Window, line: int, opener: re.Pattern[bytes]) -> Element:
    """An element that never closes: it goes up to the next line that opens one at the same indentation, or to the array's end.

    Others are lost with it where several stand in a line, as those before it did or its own first key, again, shows.
    """
    size, head, alone = 0, b"", window.indent is not None
    while True:
        found = opener.search(window.data, window.at + 1)
        if found:
            cut = found.end() - window.at
            break
        if window.size > MAX_ROW:  # let go of what cannot hold the next opener
            head = head or window.data[window.at : window.at + HEAD]
            newline = window.data.rfind(b"\n", window.at + 1)
            gone = newline - window.at if newline > 0 else window.size
            size += gone
            window.cut(gone)
        if not window.more():
            rest = window.data[window.at :].rstrip()
            cut = len(rest) - 1 if len(rest) > 1 and rest.endswith(b"]") else window.size
            break
    data = window.cut(cut)
    lost = window.several or not found and not alone or _holds_others(data)
    if size:
        return Element(line, head, f"a row of over {size} bytes that does not close; the most is {MAX_ROW}", lost=lost)
    problem = f"{TORN}; where the next row begins cannot be told" if lost else TORN
    return Element(line, data, problem if found else window.broken or problem, lost=lost)
