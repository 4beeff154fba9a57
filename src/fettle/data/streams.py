"""Bytes of a file, plain or compressed, in pieces and in lines of bounded size."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 1 << 20  # bytes read at a time
MAX_ROW = 64 << 20  # a longer row is set aside unread
HEAD = 4096  # bytes kept of what is too long to keep
BOM = b"\xef\xbb\xbf"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
UTF16 = (b"\xff\xfe", b"\xfe\xff")

Advance = Callable[[int], None]  # told how many bytes of the file were read


class Broken(Exception):
    """A compressed stream that ends early or is damaged; the text says how."""


@dataclass(frozen=True)
class Line:
    """One line without its end. `size` is its true length; `data` is only its head where that is over MAX_ROW."""

    number: int  # from 1
    data: bytes
    size: int

    @property
    def whole(self) -> bool:
        """Whether `data` is all of the line."""
        return self.size == len(self.data)


def compression(path: Path) -> str:
    """'gzip', 'zstd' or '' by the file's first bytes, whatever its name says."""
    with open(path, "rb") as handle:
        head = handle.read(4)
    return "gzip" if head.startswith(GZIP) else "zstd" if head == ZSTD else ""


def pieces(path: Path, advance: Advance | None = None) -> Iterator[bytes]:
    """The decompressed bytes of a file, without a leading byte order mark; raises Broken where they end too early."""
    first = True
    for piece in _raw_pieces(path, advance):
        if first and piece:
            piece, first = piece.removeprefix(BOM), False
        yield piece


def _raw_pieces(path: Path, advance: Advance | None) -> Iterator[bytes]:
    kind = compression(path)
    with open(path, "rb") as handle:
        stream: Any = handle
        if kind == "gzip":
            stream = gzip.GzipFile(fileobj=handle)
        elif kind == "zstd":
            import pyarrow as pa

            stream = pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd")
        read = stream.read1 if kind == "gzip" else stream.read
        before = 0
        while True:
            try:
                piece = read(PIECE)
            except (EOFError, zlib.error, OSError) as error:
                if not kind:
                    raise
                raise Broken(f"the {kind} stream ends early or is damaged ({error}); what follows is lost") from None
            if advance and not handle.closed:
                advance(handle.tell() - before)
                before = handle.tell()
            if not piece:
                return
            yield piece


def lines(source: Iterator[bytes]) -> Iterator[Line]:
    """Lines at '\\n' (a '\\r' before it goes too), each at most MAX_ROW in memory. Broken passes through after the last part."""
    number, head, size = 1, bytearray(), 0
    broken: Broken | None = None
    while True:
        try:
            piece = next(source, None)
        except Broken as error:
            piece, broken = None, error
        if piece is None:
            break
        *ended, rest = piece.split(b"\n")
        for i, part in enumerate(ended):
            if i == 0 and size:
                _extend(head, part, size)
                yield _line(number, bytes(head), size + len(part))
                head, size = bytearray(), 0
            else:
                yield _line(number, part, len(part))
            number += 1
        _extend(head, rest, size)
        size += len(rest)
    if size:
        yield _line(number, bytes(head), size)
    if broken:
        raise broken


def _extend(head: bytearray, part: bytes, size: int) -> None:
    if size + len(part) <= MAX_ROW:
        head += part
    elif len(head) < HEAD:
        head += part[: HEAD - len(head)]
    else:
        del head[HEAD:]


def _line(number: int, data: bytes, size: int) -> Line:
    if len(data) == size and data.endswith(b"\r"):
        data, size = data[:-1], size - 1
    return Line(number, data, size)
