"""Recipes are strict: each mistake is one sentence with its line, its key and the nearest right spelling."""

from pathlib import Path
from typing import Literal

import pytest

from fettle.core import FettleError, Spec, one_of
from fettle.core.config import load, override


class Shape(Spec):
    pass


class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Shape):
    kind: Literal["square"] = "square"
    side: int = 1


class Drawing(Spec):
    shapes: tuple[one_of(Shape), ...] = ()  # type: ignore[valid-type]
    ink: str = "black"
    path: Path = Path("x")


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(FettleError) as caught:
        load(Drawing, file, overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_reads_floats_lists_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("shapes:\n  - {kind: circle, radius: 1e-4}\n  - kind: square\npath: a/b\n")
    drawing = load(Drawing, file, ["shapes.1.side=3"])
    assert drawing == Drawing(shapes=(Circle(radius=1e-4), Square(side=3)), path=Path("a/b"))


def test_five_typical_mistakes_are_told_at_once(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "shapes:\n  - kind: circle\n    raduis: 2\n  - kind: squaer\n  - {side: 3}\n  - {kind: square, side: '3'}\nikn: red\n",
    )
    assert told == [
        "r.yaml:3: unknown key 'shapes.0.raduis': did you mean 'radius'?",
        "r.yaml:4: shapes.1: unknown kind 'squaer': did you mean 'square'?",
        "r.yaml:5: shapes.2: the key 'kind' is missing: known: circle, square",
        'r.yaml:6: shapes.3.side: input should be a valid integer; found "3"',
        "r.yaml:7: unknown key 'ikn': did you mean 'ink'?",
    ]


def test_yaml_mistakes_have_a_line(tmp_path: Path) -> None:
    assert problems(tmp_path, "ink: red\nink: blue\n")[0].startswith("r.yaml:2: not valid YAML: found duplicate key")
    assert problems(tmp_path, "ink: [red\n")[0].startswith("r.yaml:2: not valid YAML")
    assert problems(tmp_path, "- a\n") == ["r.yaml: expected a mapping of keys at the top, found list"]


def test_yaml_1_2_words_are_words(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("ink: no\n")
    assert load(Drawing, file).ink == "no"


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="nowhere.yaml: no such file"):
        load(Drawing, tmp_path / "nowhere.yaml")


def test_overrides() -> None:
    data = {"a": {"b": [1, {"c": 2}]}}
    assert override(data, ["a.b.1.c=1e-3", "d.e=[x, y]"]) == {"a": {"b": [1, {"c": 1e-3}]}, "d": {"e": ["x", "y"]}}
    assert data == {"a": {"b": [1, {"c": 2}]}}, "the document itself is left alone"
    for bad, word in (("a.b.7=1", "index"), ("a.b.0.c=1", "plain value"), ("novalue", "key=value"), ("a=[1", "YAML")):
        with pytest.raises(FettleError, match=word):
            override(data, [bad])
