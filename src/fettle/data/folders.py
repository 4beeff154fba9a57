"""The files that a source is: one file, what a folder holds at any depth, or what a glob matches."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from fettle.core.errors import FettleError
from fettle.core.spec import nearest

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv",
    ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
ABOUT = (
    "readme",
    "license",
    "licence",
    "changelog",
    "contributing",
    "dataset_card",
)  # how names of texts about data begin
SHOWN = 10  # files named that are not read


def files(path: str) -> list[Path]:
    """The files that a path means: itself, what a folder holds at any depth, or what a glob matches; sorted.

    Linked folders are entered, each folder once; hidden files and folders are not, and `left_out` tells what else is not read.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = [file for file, why in _held(root).items() if not why]
        if not found:
            known = f"{path}: the folder holds no data file; known endings: {', '.join(KINDS)}, also with .gz or .zst"
            raise FettleError("\n".join([known, *left_out(path)]))
        return found
    found = [p for p in map(Path, sorted(glob.glob(str(root), recursive=True))) if p.is_file()]
    if not found:
        beside = [p.name for p in root.parent.iterdir() if kind_of_file(p)] if root.parent.is_dir() else []
        close = f"; in {root.parent}: {nearest(root.name, beside)}" if beside and len(beside) < 1000 else ""
        raise FettleError(f"{path}: no such file or folder{close}")
    return found


def left_out(path: str) -> list[str]:
    """A sentence for each reason why files of a folder are not read, with their names."""
    root = Path(path).expanduser()
    by_reason: dict[str, list[str]] = {}
    for file, why in _held(root).items() if root.is_dir() else ():
        if why:
            by_reason.setdefault(why, []).append(str(file.relative_to(root)))
    return [
        f"{path}: not read, {why}: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for why, names in by_reason.items()
    ]


def kind_of_file(path: Path) -> str:
    """'json', 'parquet', 'csv', 'tsv' or 'text' by the name's ending; '' where it is not known."""
    return KINDS.get(_ending(path), "")


def _ending(path: Path) -> str:
    name = path.name.lower()
    for packed in (".gz", ".gzip", ".zst", ".zstd"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def _held(root: Path) -> dict[Path, str]:
    """Every file of a folder, sorted, with the reason why it is not read; '' where it is."""
    every = _within(root)
    tables = any(kind_of_file(file) not in ("", "text") for file in every)
    return {file: every[file] or _why_not(file, tables) for file in sorted(every)}


def _why_not(file: Path, tables: bool) -> str:
    """`tables`: whether there are files of rows beside it, so that a text may be about them."""
    kind = kind_of_file(file)
    if not kind:
        return "since the ending is not known"
    if not file.is_file():
        return "since it is no file, or a link to nowhere"
    about = kind == "text" and file.name.lower().startswith(ABOUT)
    return "as a text about the data beside it" if tables and about else ""


def _within(root: Path) -> dict[Path, str]:
    """All files in a folder and in those below it, and the folders that are not entered, with the reason. Nothing hidden."""
    found: dict[Path, str] = {}
    entered: set[str] = set()
    tops, above = [str(root)], {str(folder) for folder in root.resolve().parents}

    def closed(error: OSError) -> None:
        found[Path(error.filename)] = f"since the folder cannot be opened ({error.strerror})"

    for top in tops:  # links come behind, so that a folder goes by its own name, and a link back into it is no loop
        for folder, inner, names in os.walk(top, onerror=closed):
            if (real := os.path.realpath(folder)) in above:
                found[Path(folder)] = "since the link leads to a folder around this one"
                inner.clear()
            elif real in entered:
                inner.clear()
            else:
                entered.add(real)
                inner[:] = [name for name in inner if not name.startswith(".")]
                tops += [link for name in inner if os.path.islink(link := os.path.join(folder, name))]
                found |= {Path(folder, name): "" for name in names if not name.startswith(".")}
    return found
