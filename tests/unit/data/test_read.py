"""Files of every kind and every damage: no row lost, none invented, each bad one with its line and the reason."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import sys
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import FettleError
from fettle.data import arrays, read, streams
from fettle.data.folders import files, left_out
from fettle.data.read import call_columns, place

ROWS = [{"text": f'row {i} 你好 "quoted" {{[,]}} \\ end'} for i in range(7)]


def rows(path: Path, **options):
    return list(read(str(path), **options))


def lines_of(found) -> list[int]:
    assert len({row.where for row in found}) == len(found), "each row has a place of its own"
    return [place(row.where)[1] for row in found]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    return path


JSONL = b"".join(json.dumps(r).encode() + b"\n" for r in ROWS)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.jsonl", JSONL, [1, 2, 3, 4, 5, 6, 7]),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\r\n"), [1, 3, 5, 7, 9, 11, 13]),
        ("a.json", json.dumps(ROWS).encode(), [1] * 7),
        ("a.json", json.dumps(ROWS, indent=2).encode(), [2, 5, 8, 11, 14, 17, 20]),
        ("a.json", json.dumps(ROWS, indent=0, ensure_ascii=False).encode(), [2, 5, 8, 11, 14, 17, 20]),
        (
            "a.json",
            b"\xef\xbb\xbf \n[" + b",\n".join(json.dumps(r).encode() for r in ROWS) + b"]\n\n",
            [2, 3, 4, 5, 6, 7, 8],
        ),
        ("a.json", JSONL, [1, 2, 3, 4, 5, 6, 7]),
        (
            "a.csv",
            ("text\n" + "".join('"' + r["text"].replace('"', '""') + '"\n' for r in ROWS)).encode(),
            [2, 3, 4, 5, 6, 7, 8],
        ),
        ("a.txt", "\n".join(r["text"] for r in ROWS).encode(), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_every_kind(tmp_path: Path, name: str, data: bytes, lines: list[int], ending: str) -> None:
    found = rows(write(tmp_path / (name + ending), data))
    assert [row.value for row in found] == ROWS
    assert lines_of(found) == lines
    assert all(row.problem is None for row in found)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("data", [json.dumps(ROWS, indent=2).encode(), json.dumps(ROWS).encode(), JSONL])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, data: bytes) -> None:
    monkeypatch.setattr(streams, "PIECE", piece)
    assert [row.value for row in rows(write(tmp_path / "a.json", data))] == ROWS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [r["text"] for r in ROWS], "n": [1, None, 3, 4, 5, 6, 7]}), tmp_path / "a.parquet")
    found = rows(tmp_path / "a.parquet")
    assert [r.value["text"] for r in found] == [r["text"] for r in ROWS] and found[1].value["n"] is None
    assert lines_of(found) == [1, 2, 3, 4, 5, 6, 7]
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(FettleError, match="b.parquet"):
        rows(tmp_path / "b.parquet")


def test_calls_of_parquet_have_no_fields_of_other_calls(tmp_path: Path) -> None:
    """Arrow joins the structs of a column: each call would have the arguments of all, null where it has none."""
    calls = [
        {"function": {"name": "f", "arguments": {"city": "Paris", "days": [1, None]}}},
        {"id": "x", "function": {"name": "g", "arguments": {"expr": "1+1", "deep": {"a": 1}}}},
        {"function": {"name": "g", "arguments": {"deep": {"b": "2"}}}},
    ]
    tools = [
        {"name": "f", "parameters": {"properties": {"city": {"type": "string", "enum": ["Paris", None]}}}},
        {"name": "g", "description": "sums", "parameters": {"properties": {"expr": {"default": 0}}}},
    ]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": calls}]
    given = [{"messages": talk, "tools": tools, "n": 1}, {"messages": talk[:1], "tools": None, "n": None}]
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet")
    first, second = (row.value for row in rows(tmp_path / "a.parquet"))
    assert first["messages"][1]["tool_calls"] == calls and first["tools"] == tools
    assert first["messages"][0]["tool_calls"] is None and (second["tools"], second["n"]) == (None, None)


def test_calls_are_found_by_the_schema(tmp_path: Path) -> None:
    """At any depth of structs and lists; what has none is as Arrow gives it, nulls and all."""
    call = {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}
    deep = [{"turn": {"tool_calls": [one]}} for one in call]
    plain = [{"a": 1, "b": None}, {"a": None, "b": 2}]
    given = {"deep": [deep, None], "functions": [call[:1], call[1:]], "plain": plain, "vector": [[0.5], [None]]}
    table = pa.table(given | {"lists": [[[deep[0]]], [[deep[1]]]], "few": pa.array([plain, plain], pa.list_(pa.struct({"a": pa.int8(), "b": pa.int8()}), 2))})  # fmt: skip
    assert call_columns(table.schema) == ["deep", "functions", "lists"]
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = (row.value for row in rows(tmp_path / "a.parquet"))
    assert first["deep"] == deep and second["deep"] is None and first["functions"] == [call[0]]
    assert [first["plain"], second["plain"]] == first["few"] == plain
    assert second["lists"] == [[deep[1]]] and second["vector"] == [None]


def test_what_cannot_be_read_of_parquet_leaves_the_rest(tmp_path: Path) -> None:
    columns = {"text": ["a", "b"], "at": pa.array([0, 2**62], pa.timestamp("us")), "cost": [Decimal("1.5"), None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    good, bad = rows(tmp_path / "a.parquet")
    assert good.value["text"] == "a" and bad.where.endswith("a.parquet:2")
    assert bad.problem == "the column 'at' holds a value that cannot be read (date value out of range)"
    assert json.loads(bad.raw) == {"text": "b", "cost": None}


BAD = {
    b'{"text": "a"': "not valid JSON",
    b"{}{}": "not valid JSON",
    b"not json": "not valid JSON",
    b"[1, 2]": "expected a JSON object, found a list",
    b"null": "found null",
    b"3.5": "found a number",
    b'"text"': "found a text",
    b"true": "found true or false",
    b'{"text": NaN}': "NaN is not a JSON value",
    b'{"text": -Infinity}': "Infinity is not a JSON value",
    b'{"n": 1e999}': "number too large",
    b'{"text": "a", "text": "b"}': "'text' stands twice",
    b'{"a": [{"b": 1, "b": 2}]}': "'b' stands twice",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "a\\u0000b"}': "NUL",
    b'{"text": "a\x00b"}': "NUL",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'\xef\xbb\xbf{"text": "a"}': "byte order mark",
    b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}": "nested deeper",
    b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}": "nested deeper",
    b'{"a": ' + b"[" * 100000: "nested deeper",
}


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_bad_lines(tmp_path: Path, bad: bytes) -> None:
    good = b'{"text": "a", "note": "\\"text\\": twice \\"text\\":"}'
    path = write(tmp_path / "a.jsonl", b"\n".join([good, bad, good, bad]))
    found = rows(path)
    assert [row.problem is None for row in found] == [True, False, True, False]
    assert found[1].where == f"{path}:2" and BAD[bad] in found[1].problem
    assert found[0].value == found[2].value == json.loads(good)
    found[1].raw.encode()  # can be written


@pytest.mark.parametrize("bad", [b for b in BAD if b[:1] in b"{["], ids=range(len([b for b in BAD if b[:1] in b"{["])))
@pytest.mark.parametrize("style", ["{},\n{},\n{},\n{}", "\n  {},\n  {},\n  {},\n  {}\n"])
def test_bad_elements_spoil_only_themselves(tmp_path: Path, bad: bytes, style: str) -> None:
    good = b'{"text": "a {[ \\" ]} b"}'
    before, *rest = style.encode().split(b"{}")
    text = b"[" + before + b"".join(x + r for x, r in zip([good, bad, good, good], rest, strict=True)) + b"]"
    found = rows(write(tmp_path / "a.json", text))
    good_ones = [row for row in found if row.problem is None]
    if b"{}{}" in text:
        return  # two empty objects without a comma between: read as two rows
    assert [row.value for row in good_ones] == [json.loads(good)] * 3
    assert len(found) == 4 and found[1].problem


def test_missing_brace_in_a_nested_row(tmp_path: Path) -> None:
    talks = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]} for i in range(5)
    ]
    text = json.dumps(talks, indent=2)
    for broken in (text.replace('"q1"\n      }', '"q1"\n'), text.replace('"a1"', '"a1'), text.replace('"q1"', 'q1"')):
        found = rows(write(tmp_path / "a.json", broken.encode()))
        assert [row.value for row in found if row.value] == [talks[i] for i in (0, 2, 3, 4)], broken
        assert len(found) == 5


@pytest.mark.parametrize("cut", [1, 10, 60, 100])
def test_array_cut_short(tmp_path: Path, cut: int) -> None:
    text = json.dumps(ROWS, indent=1).encode()
    found = rows(write(tmp_path / "a.json", text[:-cut]))
    good = [row.value for row in found if row.value]
    assert good == ROWS[: len(good)] and len(good) >= 5
    assert "ends inside" in found[-1].problem and found[-1].lost


def test_rows_beside_each_other_are_told_apart_by_their_column(tmp_path: Path) -> None:
    text = '[{"a": "你好"}, {"a": 2},\n{"a": 3}, 5, {"a": {"b": [{"c": 4}]}} ]'
    found = rows(write(tmp_path / "a:1.json", text.encode()))
    assert [place(row.where) for row in found] == [
        (str(tmp_path / "a:1.json"), line, column) for line, column in ((1, 0), (1, 15), (2, 0), (2, 11), (2, 14))
    ]
    assert [text.split("\n")[line - 1][(column or 1) - 1] for _, line, column in map(place, (r.where for r in found))] == [
        "[", "{", "{", "5", "{"
    ]  # fmt: skip


WHOLE = json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}])


@pytest.mark.parametrize(
    ("name", "data", "lost"),
    [
        ("a.json", WHOLE.encode(), []),
        ("a.json", WHOLE.replace('"b"', '"b').encode(), [False, True]),  # an open quote in one line: c is gone with it
        ("a.json", WHOLE.replace("}, ", "},\n").replace('"b"', '"b').encode(), [False, False, False]),
        ("a.json", WHOLE.replace("}, ", "},\n").replace('"c"', '"c').encode(), [False, False, False]),
        ("a.json", WHOLE[:-1].encode(), [False, False, False, True]),
        ("a.json", WHOLE[:-5].encode(), [False, False, True, True]),
        ("a.json", ("[\n" + WHOLE[1:].replace('"a"', '"a')).encode(), [True]),
        # several in a line and several lines: what follows on the torn one's line is gone, though the next line is found
        ("a.json", b'[{"a": 1}, {"a": "x}, {"a": 3},\n{"a": 4}, {"a": 5}]', [False, True, False, False]),
        ("a.json", b'[{"a": "x}, {"a": 2}, {"a": 3},\n{"a": 4}, {"a": 5}]', [True, False, False]),
        # the last of one row a line, with objects inside of it: that one alone
        ("a.json", b'[\n{"m": [{"r": 1}, {"r": 2}]},\n{"m": [{"r": 1}, {"r": "x}]}\n]', [False, False]),
        ("a.csv", b'text,n\na,1\n"b,2\nc,3\n', [False, True]),
        ("a.csv", b'text,n\na,1\n"b,2\nc,3\nd,4\n"x",5\ne,6\n', [False, True, False]),  # up to the next quote
        ("a.csv", b'text,n\na,1\n"b,2\nc,3"\ne,6\n', [False, True, False]),  # which makes one cell of them
        ("a.csv", b'text,n\na,1\nc,3\n"b,2', [False, False, False]),  # the last line alone
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', [False, False]),
    ],
)
def test_what_takes_others_with_it(tmp_path: Path, name: str, data: bytes, lost: list[bool]) -> None:
    assert [row.lost for row in rows(write(tmp_path / name, data))] == (lost or [False] * 3)


def test_stray_things_between_elements(tmp_path: Path) -> None:
    found = rows(write(tmp_path / "a.json", b'[{"a": 1}, 5, "x", nul, }, {"a": 2}, ] , {"a": 3}]'))
    assert [row.value for row in found if row.value] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert len([row for row in found if row.problem]) >= 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.txt.gz", "a.csv.gz"])
def test_broken_compression(tmp_path: Path, name: str) -> None:
    random.seed(0)
    texts = [{"text": "".join(random.choices("abcdefghij ", k=100)).strip()} for _ in range(3000)]
    plain = {
        "jsonl": b"".join(json.dumps(t).encode() + b"\n" for t in texts), "json": json.dumps(texts, indent=0).encode(),
        "txt": "\n".join(t["text"] for t in texts).encode(), "csv": ("text\n" + "\n".join(t["text"] for t in texts)).encode(),
    }  # fmt: skip
    data = write(tmp_path / name, plain[name.split(".")[1]]).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    found = rows(tmp_path / name)
    good = [row.value for row in found if row.value]
    whole = good[:-1] if name.startswith(("a.txt", "a.csv")) else good  # a text's last row may be a part
    assert whole == texts[: len(whole)]
    broken = [row.problem for row in found if row.problem]
    assert any("stream ends early or is damaged" in p for p in broken) and len(broken) <= 2
    assert found[-1].lost
    if name.endswith(".zst"):
        return  # written without a checksum, so that a changed byte is just another text
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(bytes(flipped))
    assert any(row.problem for row in rows(tmp_path / name))


def test_huge_rows_do_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streams, arrays, sys.modules["fettle.data.read"]):
        monkeypatch.setattr(module, "MAX_ROW", 1 << 20)
    good = b'{"text": "a"}'
    huge = b'{"text": "' + b"x" * (40 << 20) + b'"}'
    for name, text in (
        ("a.jsonl", b"\n".join([good, huge, good])),
        ("a.json", b"[\n" + b",\n".join([good, huge, good]) + b"\n]"),
    ):
        path = write(tmp_path / name, text)
        tracemalloc.start()
        found = rows(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [bool(row.problem) for row in found] == [False, True, False]
        assert "the most is" in found[1].problem and len(found[1].raw) < 10000
        assert peak < 16 << 20
    table = rows(write(tmp_path / "a.csv", b"text\na\n" + b"x" * (3 << 20) + b"\nb\n"))
    assert [(place(row.where)[1], bool(row.problem)) for row in table] == [(2, False), (3, True), (4, False)]
    plain = write(tmp_path / "a.txt", b"one\n" + b"y" * (3 << 20) + b"\ntwo")
    assert [bool(row.problem) for row in rows(plain)] == [False, True, False]
    assert [bool(row.problem) for row in rows(plain, documents="file")] == [True]


def test_csv_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'q,a\n1,2\n1\n1,2,3\n\n\xff,2\n"two\nlines",3\nx\x00,1\n4,5\n"open,6\n7,8\n')
    found = rows(path)
    assert [row.value for row in found if row.value] == [
        {"q": "1", "a": "2"},
        {"q": "two\nlines", "a": "3"},
        {"q": "4", "a": "5"},
    ]
    problems = {int(row.where.rpartition(":")[2]): row.problem for row in found if row.problem}
    assert "1 cells" in problems[3] and "3 cells" in problems[4] and "UTF-8" in problems[6] and "NUL" in problems[9]
    assert "not valid CSV" in problems[11] and "lines 11 to 12 are read as one row" in problems[11]
    kept = {int(row.where.rpartition(":")[2]): row.raw for row in found if row.problem}
    assert kept == {3: "1", 4: "1,2,3", 6: "\\xff,2", 9: "x\x00,1", 11: '"open,6\n7,8'}
    quoted = write(tmp_path / "q.tsv", b'q\ta\n"a"b\tc\n"d"\t"e"\tf\n')
    assert [row.raw for row in rows(quoted)] == ['"a"b\tc', '"d"\t"e"\tf']
    for header in (b"a,a\n1,2\n", b",a\n1,2\n"):
        with pytest.raises(FettleError, match=":1:"):
            rows(write(tmp_path / "b.csv", header))


def test_documents_of_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo\n\nthree\n \nfour\n\xff\n\n\nfive")
    assert [r.value["text"] for r in rows(path) if r.value] == ["one\ntwo", "three", "five"]
    assert lines_of(rows(path)) == [1, 4, 6, 10]
    assert [r.value["text"] for r in rows(path, documents="line") if r.value] == ["one", "two", "three", "four", "five"]
    assert [bool(r.problem) for r in rows(path, documents="file")] == [True]
    lines = write(tmp_path / "b.txt", b"one\n two\nthree\n\n")
    assert [r.value["text"] for r in rows(lines)] == ["one", " two", "three"]


def test_folders_globs_and_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl", "in/c.txt", "notes.pdf", ".hidden.jsonl"):
        write(tmp_path / name, JSONL)
    assert [p.name for p in files(str(tmp_path))] == ["a.jsonl", "b.jsonl", "c.txt"]
    assert [p.name for p in files(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(FettleError, match="did you mean 'a.jsonl'"):
        files(str(tmp_path / "aa.jsonl"))
    with pytest.raises(FettleError, match="unknown kind of file"):
        rows(tmp_path / "notes.pdf")
    with pytest.raises(FettleError, match="UTF-16"):
        rows(write(tmp_path / "u.jsonl", JSONL.decode().encode("utf-16")))


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write(root / name, JSONL)
    return root


def inside(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in files(str(root))]


def test_linked_folders_are_read_and_each_folder_once(tmp_path: Path) -> None:
    other = tree(tmp_path / "other", "c.jsonl", "deep/d.jsonl", ".git/e.jsonl")
    root = tree(tmp_path / "root", "a.jsonl", "real/b.jsonl")
    for name, to in (("linked", other), ("loop", root), ("real/up", root), ("again", root / "real"), (".off", other)):
        (root / name).symlink_to(to, target_is_directory=True)
    (other / "back").symlink_to(root, target_is_directory=True)
    (root / "one.jsonl").symlink_to(other / "c.jsonl")
    assert inside(root) == ["a.jsonl", "linked/c.jsonl", "linked/deep/d.jsonl", "one.jsonl", "real/b.jsonl"]
    (tmp_path / "way").symlink_to(root, target_is_directory=True)
    assert len(inside(tmp_path / "way")) == 5 and len(rows(tmp_path / "way")) == 5 * len(ROWS)
    assert left_out(str(root)) == []


ABOUT = ["LICENSE.txt", "README.md", "in/Dataset_card.MD", "in/readme.txt.gz"]


@pytest.mark.parametrize("data", ["a.jsonl", "a.json.gz", "in/a.csv", "a.tsv", "a.parquet"])
def test_texts_about_the_data_are_left_out_with_a_note(tmp_path: Path, data: str) -> None:
    root = tree(tmp_path / "root", data, "b.txt", *ABOUT)
    assert inside(root) == sorted([data, "b.txt"])
    assert left_out(str(root)) == [f"{root}: not read, as a text about the data beside it: {', '.join(ABOUT)}"]
    texts = tree(tmp_path / "texts", "b.txt", *ABOUT)  # nothing but texts: all of them are data
    assert len(inside(texts)) == 5 and left_out(str(texts)) == []
    assert inside(tree(tmp_path / "named", data, "readme.jsonl", "b.md.txt"))[-1] == "readme.jsonl"
    assert left_out(str(root / "README.md")) == [] and files(str(root / "README.md"))


def test_texts_beside_one_table_are_data(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", *(f"page{i}.md" for i in range(5)), "package.json")
    assert len(inside(root)) == 6 and left_out(str(root)) == []


def test_folders_that_are_not_entered_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is closed, and a link to a folder around the data, beside which held-out rows may lie."""
    root = tree(tmp_path / "data" / "train", "a.jsonl", "shut/b.jsonl").parent / "train"
    tree(tmp_path / "data", "held.jsonl")
    (root / "up").symlink_to(tmp_path / "data", target_is_directory=True)
    scan = os.scandir

    def refused(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert inside(root) == ["a.jsonl"]
    assert left_out(str(root)) == [
        f"{root}: not read, since the folder cannot be opened (Permission denied): shut",
        f"{root}: not read, since the link leads to a folder around this one: up",
    ]


def test_what_a_folder_holds_and_is_not_read_is_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a.jsonl", "b.jsonl.xz", "in/LICENSE", ".cache/x.pdf", ".hidden")
    (root / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert inside(root) == ["a.jsonl"]
    assert left_out(str(root)) == [
        f"{root}: not read, since the ending is not known: b.jsonl.xz, in/LICENSE",
        f"{root}: not read, since it is no file, or a link to nowhere: gone.jsonl",
    ]
    tree(root, *(f"{i:02}.pdf" for i in range(12)))
    assert left_out(str(root))[0].endswith("06.pdf, 07.pdf, 08.pdf, 09.pdf and 4 more")


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([json.dumps(r).encode() for r in ROWS])), max_size=12),
    st.data(),
)
def test_fuzzed_bytes(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], data) -> None:
    """Whatever the bytes: no exception but FettleError, a line for every row, and good JSONL lines all come through."""
    folder = tmp_path_factory.mktemp("fuzz")
    joined = b"\n".join(parts)
    if not joined.lstrip().startswith(b"["):
        found = rows(write(folder / "a.jsonl", b"{}\n" + joined))
        assert len(found) == 1 + sum(bool(line.removesuffix(b"\r").strip()) for line in joined.split(b"\n"))
    name = data.draw(st.sampled_from(["a.json", "a.csv", "a.txt", "a.json.gz"]))
    try:
        for row in rows(write(folder / name, b"[" + joined if "json" in name else joined)):
            assert (row.value is None) != (row.problem is None)
            assert int(row.where.rpartition(":")[2]) >= 1
            row.raw.encode()
    except FettleError:
        pass
