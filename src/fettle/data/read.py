"""Rows of any file, one at a time in bounded memory: every row is a value or a problem, with the line where it begins."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import orjson

from fettle.core.errors import FettleError
from fettle.data.arrays import elements
from fettle.data.folders import KINDS, files, kind_of_file
from fettle.data.parse import BadRow, parse_object
from fettle.data.streams import HEAD, MAX_ROW, PIECE, UTF16, Advance, Broken, Line, compression, lines, pieces

PLACE = re.compile(r"(.*?):(\d+)(?::(\d+))?", re.DOTALL)
CALLS = ("tools", "functions", "tool_calls")  # keys below which each struct has fields of its own
BLANK = re.compile(rb"\S[^\S\n]*\r?\n[^\S\n]*\r?\n\s*\S")  # a blank line between two others


@dataclass(frozen=True)
class Row:
    """One row: `value`, or `problem` where there is none. `raw` is what is set aside (its head where it is very long)."""

    where: str  # file:line, or file:line:column where another row begins on the same line before it
    value: dict[str, Any] | None = None
    problem: str | None = None
    raw: str = ""
    lost: bool = False  # more rows are lost with it, nobody knows how many


def place(where: str) -> tuple[str, int, int]:
    """The file, line and column of a row's `where`; the column is 0 where it has none."""
    found = PLACE.fullmatch(where)
    if found is None:
        raise FettleError(f"'{where}' is no place of a row; expected file:line or file:line:column")
    return found[1], int(found[2]), int(found[3] or 0)


def read(path: str, documents: str = "auto", advance: Advance | None = None) -> Iterator[Row]:
    """Every row of a file, folder or glob, in order. `documents` says what a document of plain text is (see DataSpec)."""
    for file in files(path):
        yield from read_file(file, documents, advance)


def read_file(path: Path, documents: str = "auto", advance: Advance | None = None) -> Iterator[Row]:
    """Every row of one file, in order."""
    kind = kind_of_file(path)
    if not kind:
        raise FettleError(
            f"{path}: unknown kind of file '{path.suffix}'; known endings: {', '.join(KINDS)}, also with .gz or .zst"
        )
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        head = _head(path)
        if head.startswith(UTF16):
            raise FettleError(f"{path}: the text is UTF-16; save it as UTF-8")
        if kind in ("csv", "tsv"):
            yield from _csv(path, "," if kind == "csv" else "\t", advance)
        elif kind == "text":
            yield from _text(path, split_of(head) if documents == "auto" else documents, advance)
        elif head.lstrip()[:1] == b"[":
            yield from _array(path, advance)
        else:
            yield from _jsonl(path, advance)
    except OSError as error:
        raise FettleError(f"{path}: cannot be read ({error.strerror or error})") from None


def split_of(head: bytes) -> str:
    """What a document of plain text is, from its first MiB: a 'block' where a blank line stands in it, else a 'line'."""
    return "block" if BLANK.search(head) else "line"


def head_of(path: Path) -> bytes:
    """The first MiB of a file, decompressed."""
    return _head(path)


def _head(path: Path) -> bytes:
    found = b""
    try:
        for piece in pieces(path):
            found += piece
            if len(found) >= PIECE:
                break
    except Broken:
        pass  # the reader that follows reports it with its line
    return found


def _safely(path: Path, source: Iterator[Line]) -> Iterator[Line | Row]:
    """Lines, then a problem row where the stream broke."""
    number = 1
    try:
        for line in source:
            number = line.number
            yield line
    except Broken as error:
        yield Row(f"{path}:{number}", problem=str(error), lost=True)


def _too_long(where: str, data: bytes, size: int) -> Row:
    return Row(where, problem=f"a row of {size} bytes; the most is {MAX_ROW}", raw=shown(data[:HEAD]))


def shown(data: bytes) -> str:
    """Bytes as text that can always be written: what is not UTF-8 becomes \\xNN."""
    return data.decode("utf-8", errors="backslashreplace")


def _object(where: str, data: bytes) -> Row:
    try:
        return Row(where, value=parse_object(data))
    except BadRow as problem:
        return Row(where, problem=str(problem), raw=shown(data if len(data) <= PIECE else data[:HEAD]))
    except RecursionError:
        return Row(where, problem="nested too deeply", raw=shown(data[:HEAD]))


def _jsonl(path: Path, advance: Advance | None) -> Iterator[Row]:
    first = True
    for line in _safely(path, lines(pieces(path, advance))):
        if isinstance(line, Row):
            yield line
        elif first and line.data.strip() == b"{":
            raise FettleError(
                f"{path}: one JSON object over many lines; rows are read from a list ([...]) or from one object a line, so take "
                "the list out of it"
            )
        elif not line.whole:
            yield _too_long(f"{path}:{line.number}", line.data, line.size)
        elif line.data.strip():
            first = False
            yield _object(f"{path}:{line.number}", line.data)


def _array(path: Path, advance: Advance | None) -> Iterator[Row]:
    for element in elements(pieces(path, advance)):
        where = f"{path}:{element.line}" + (f":{element.column}" if element.column else "")
        if element.problem:
            yield Row(where, problem=element.problem, raw=shown(element.data[:HEAD]), lost=element.lost)
        else:
            yield _object(where, element.data)


def _text(path: Path, documents: str, advance: Advance | None) -> Iterator[Row]:
    """One document a line, a block between blank lines, or the file. Blank lines alone are no documents."""
    block: list[bytes] = []
    first = size = 0
    for line in _safely(path, lines(pieces(path, advance))):
        if isinstance(line, Row):
            yield from _document(path, first, b"\n".join(block), size)
            block, size = [], 0
            yield line
            continue
        if documents == "line":
            if line.data.strip():
                yield from _document(path, line.number, line.data, line.size)
            continue
        if documents == "block" and not line.data.strip():
            yield from _document(path, first, b"\n".join(block), size)
            block, size = [], 0
            continue
        if not block:
            first = line.number
        size += line.size + (1 if block else 0)
        if size <= MAX_ROW or not block:
            block.append(line.data)
    yield from _document(path, first, b"\n".join(block), size)


def _document(path: Path, number: int, data: bytes, size: int) -> Iterator[Row]:
    where = f"{path}:{number}"
    if size > len(data):
        yield _too_long(where, data, size)
        return
    if not data.strip():
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield Row(where, problem=f"invalid UTF-8 at byte {error.start + 1} of the document", raw=shown(data[:HEAD]))
        return
    if "\x00" in text:
        yield Row(where, problem="the text holds a NUL character", raw=text[:HEAD])
    else:
        yield Row(where, value={"text": text})


def _csv(path: Path, delimiter: str, advance: Advance | None) -> Iterator[Row]:
    """Rows of a CSV file with a header. Empty cells are empty texts; every value is a text."""
    csv.field_size_limit(MAX_ROW)
    problem: list[Row] = []
    taken = StringIO()  # the lines of the row that is being read, as far as they are kept of a bad one

    def texts() -> Iterator[str]:
        for line in _safely(path, lines(pieces(path, advance))):
            if isinstance(line, Row):
                problem.append(line)
                continue
            if not line.whole:
                problem.append(_too_long(f"{path}:{line.number}", line.data, line.size))
            text = line.data.decode("utf-8", errors="surrogateescape") if line.whole else ""
            if taken.tell() < PIECE:
                taken.write(f"{text}\n")
            yield f"{text}\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        taken.seek(0)
        taken.truncate()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            bad = Row(f"{path}:{first}", problem=f"not valid CSV: {error}", raw=_written(taken))
            yield _spanning(bad, first, reader.line_num)
            continue
        if header is None:
            header = _header(path, cells)
        elif cells:
            if why := _bad_cells(header, cells):
                bad = Row(f"{path}:{first}", problem=why, raw=_written(taken))
                yield _spanning(bad, first, reader.line_num) if len(cells) != len(header) else bad
            else:
                yield Row(f"{path}:{first}", value=dict(zip(header, cells, strict=True)))
        yield from problem
        problem.clear()
    yield from problem


def _written(taken: StringIO) -> str:
    return shown(taken.getvalue().removesuffix("\n").encode("utf-8", errors="surrogateescape")[:PIECE])


def _spanning(row: Row, first: int, last: int) -> Row:
    """A row that is no row, over some lines: an open quote takes others with it, up to the next quote or to the end."""
    if last <= first:
        return row
    return replace(row, problem=f"{row.problem} (lines {first} to {last} are read as one row)", lost=True)


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = {name for name in cells if cells.count(name) > 1}
    if not cells or "" in cells or twice:
        what = f"the column '{min(twice)}' stands twice" if twice - {""} else "a column has no name"
        raise FettleError(f"{path}:1: {what}; the first line of a CSV file must name its columns")
    return cells


def _bad_cells(header: list[str], cells: list[str]) -> str:
    """Why a row's cells are no row; '' where they are one."""
    if len(cells) != len(header):
        return f"{len(cells)} cells where the header names {len(header)} columns"
    for name, cell in zip(header, cells, strict=True):
        if "\x00" in cell:
            return f"the column '{name}' holds a NUL character"
        if not cell.isascii() and any("\ud800" <= c <= "\udfff" for c in cell):
            return f"invalid UTF-8 in the column '{name}'"
    return ""


def _parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file; the 'line' is the row's number, from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if compression(path):
        raise FettleError(f"{path}: a Parquet file inside gzip or zstd; unpack it first (Parquet compresses by itself)")
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = call_columns(file.schema_arrow)
            for batch in file.iter_batches(batch_size=256):
                yield from _parquet_rows(path, number, batch, columns)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if number == 0:
            raise FettleError(f"{path}: not a Parquet file, or damaged ({str(error).splitlines()[0]})") from None
        problem = f"the file is damaged from here on ({str(error).splitlines()[0]})"
        yield Row(f"{path}:{number + 1}", problem=problem, lost=True)


def _parquet_rows(path: Path, before: int, batch: Any, columns: list[str]) -> Iterator[Row]:
    """The rows of a batch behind `before` others, with calls or tools in `columns`; one by one where a value cannot be read."""
    try:
        values = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        yield from (_parquet_row(f"{path}:{before + i + 1}", batch, i, columns) for i in range(batch.num_rows))
        return
    yield from (Row(f"{path}:{before + i}", value=stated(value, columns)) for i, value in enumerate(values, 1))


def _parquet_row(where: str, batch: Any, i: int, columns: list[str]) -> Row:
    value: dict[str, Any] = {}
    problems = []
    for name, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = cells[i].as_py()
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            problems.append(f"the column '{name}' holds a value that cannot be read ({error})")
    if not problems:
        return Row(where, value=stated(value, columns))
    raw = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return Row(where, problem="; ".join(problems), raw=raw)


def call_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that are calls or tools, or have them in their structs."""
    return [field.name for field in schema if _has_calls(field)]


def _has_calls(field: Any) -> bool:
    from pyarrow.types import is_struct

    if field.name in CALLS:
        return True
    if is_struct(field.type):
        return any(map(_has_calls, field.type))
    return hasattr(field.type, "value_field") and _has_calls(field.type.value_field)  # a list of any kind


def stated(row: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """A row of Arrow without the nulls in calls and tools, which are those of other calls: their structs are joined to one.

    `columns` are those that may hold some. A call that says null itself cannot be told from one that lacks the key. A null in a
    list is said, and stays.
    """
    return row | {key: _stated(row[key], key in CALLS) for key in columns}


def _stated(value: Any, below: bool) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or not below}
        return {key: _stated(item, below or key in CALLS) for key, item in kept.items()}
    return [_stated(item, below) for item in value] if isinstance(value, list) else value
