"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fettle"
FILES = sorted(SOURCE.rglob("*.py"))
# Imports point down this list only; folders on one line never import each other.
FLOORS = [
    {"cli"},
    {"verbs"},
    {"serve", "studio"},
    {"lab"},
    {"stages"},
    {"feedback"},
    {"train", "prompting", "rag", "evaluate", "export"},
    {"generate"},
    {"objectives", "peft", "quantize", "compress", "vision"},
    {"data"},
    {"models"},
    {"core"},
]
LEVEL = {room: -i for i, floor in enumerate(FLOORS) for room in floor}
LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS = 400, 60, 8


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(SOURCE)) for p in paths]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of the package itself, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "fettle")
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            if base[:1] == ["fettle"]:
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # the package's lazy exports
    assert room in LEVEL, f"{path}: the room '{room}' is not in the plan of the house"
    package = ("fettle", *path.relative_to(SOURCE).parts[:-1])
    for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
        other = name.split(".")[1] if "." in name else room
        if other == room or other not in LEVEL:  # the package's own names: fettle.__version__, fettle.__file__
            continue
        assert LEVEL[other] < LEVEL[room], f"{path}:{line}: {room}/ must not import {other}/"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE, f"{path}: {text.count(chr(10))} lines; what second thing does it do?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_public_calls_are_narrow_and_described(path: Path) -> None:
    if path.name == "cli.py" or path.parent.name == "verbs":
        return  # a verb's arguments are the options of a command
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{path}: what is this file?"
    for owner in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            arguments = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls", "ctx")]
            assert len(arguments) <= MOST_ARGUMENTS, (
                f"{path}:{node.lineno}: {node.name} takes {len(arguments)} arguments"
            )


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    return set(done.stdout.splitlines())


HEAVY = {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "pydantic", "tokenizers", "datasets"}


def test_import_is_light() -> None:
    assert not HEAVY & modules_after("import fettle; fettle.__version__")


def test_help_is_light() -> None:
    code = "from fettle.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code"
    start = time.perf_counter()
    loaded = modules_after(code)
    print(f"fettle --help: {time.perf_counter() - start:.2f} s with the interpreter's start")
    assert not HEAVY & loaded


def test_every_lazy_name_exists() -> None:
    import fettle

    for name in fettle.__all__:
        assert getattr(fettle, name) is not None
