"""Recipes are strict: each mistake is one sentence with its line, its key and the nearest right spelling."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from fettle.core import FettleError, Spec, one_of
from fettle.core.config import Document, load
from fettle.core.spec import refuse


class Shape(Spec):
    pass


class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Shape):
    kind: Literal["square"] = "square"
    side: int = 1


class Pen(Spec):
    plain: ClassVar[str | None] = "name"

    name: str = "pen"
    width: int = 1

    @model_validator(mode="before")
    @classmethod
    def _plain_string(cls, data: Any) -> Any:
        return {cls.plain: data} if isinstance(data, str) else data


class Frame(Spec):
    edges: tuple[Annotated[Pen, Field()], ...] = Field(default=(), min_length=2)
    narrow: int = 0
    wide: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> "Frame":
        if self.narrow > self.wide:
            raise ValueError("'narrow' is over 'wide'")
        refuse([(("edges", i), "is too wide") for i, pen in enumerate(self.edges) if pen.width > self.wide])
        return self


class Drawing(Spec):
    shapes: tuple[one_of(Shape), ...] = ()  # type: ignore[valid-type]
    pen: Pen = Pen()
    frames: tuple[Frame, ...] = ()
    number: int = 0
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
    assert problems(tmp_path, 'ink: "\a"\n')[0].startswith("r.yaml: not valid YAML: unacceptable character #x0007")
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
    document = Document(data, "r.yaml")
    assert document.override(Any, ["a.b.1.c=1e-3", "d.e=[x, y]"]).data == {
        "a": {"b": [1, {"c": 1e-3}]},
        "d": {"e": ["x", "y"]},
    }
    assert data == {"a": {"b": [1, {"c": 2}]}}, "the document itself is left alone"
    for bad, word in (
        ("a.b.7=1", "index"), ("a.b.²=1", "'²' is not an index"), ("a.b.-1=1", "index"), ("a.b.0.c=1", "plain value"),
        ("novalue", "key=value"), ("a=[1", "YAML"),
    ):  # fmt: skip
        with pytest.raises(FettleError, match=word):
            document.override(Any, [bad])
    assert document.override(Any, ["d.²=1"]).data == {**data, "d": {"²": 1}}


def test_a_string_opens_where_the_spec_takes_one(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("pen: brush\nframes:\n  - edges: [thin, thick]\nink: red\n")
    drawing = load(Drawing, file, ["pen.width=3", "frames.0.edges.1.width=7"])
    assert drawing.pen == Pen(name="brush", width=3)
    assert drawing.frames[0].edges == (Pen(name="thin"), Pen(name="thick", width=7))
    with pytest.raises(FettleError, match=r"override 'ink.tone=1': 'tone' lies inside a plain value"):
        load(Drawing, file, ["ink.tone=1"])


def test_mistakes_of_the_command_line_are_its_own(tmp_path: Path) -> None:
    text = "shapes:\n  - {kind: circle, radius: 2}\nframes:\n  - narrow: 5\nink: red\n"
    assert problems(tmp_path, text, "ikn=red", "shapes.0.raduis=2", "shapes=[{kind: squaer}]") == [
        "override 'shapes=[{kind: squaer}]': shapes.0: unknown kind 'squaer': did you mean 'square'?",
        "override 'ikn=red': unknown key 'ikn': did you mean 'ink'?",
    ]
    assert problems(tmp_path, text, "shapes.0.kind=squaer", "pen.width=x") == [
        "override 'shapes.0.kind=squaer': shapes.0: unknown kind 'squaer': did you mean 'square'?",
        "override 'pen.width=x': pen.width: input should be a valid integer; found \"x\"",
    ]
    # two keys that do not go together, one of the file and one of the command line
    assert problems(tmp_path, text, "frames.0.wide=1") == [
        "r.yaml:4 with 'frames.0.wide=1': frames.0: 'narrow' is over 'wide'"
    ]
    assert problems(tmp_path, text + "ikn: red\n", "ink=blue") == ["r.yaml:6: unknown key 'ikn': did you mean 'ink'?"]


def test_values_that_no_recipe_holds_are_shown(tmp_path: Path) -> None:
    large = 10**23 - 1
    assert problems(tmp_path, f"number: {large}\nshapes:\n  - {{kind: circle, radius: -.inf}}\n4: x\n") == [
        f"r.yaml:1: number: expected an integer of at most 64 bits, found {large}",
        "r.yaml:3: shapes.0.radius: expected a finite number, found -inf",
        "r.yaml: the key 4 is not text; put it in quotes",
    ]
    assert problems(tmp_path, "ink: red\n", "ink=2020-01-01", "shapes=[{kind: circle, radius: .nan}]") == [
        "override 'ink=2020-01-01': ink: expected text, a number or true/false, found 2020-01-01 (date); put it in quotes",
        "override 'shapes=[{kind: circle, radius: .nan}]': shapes.0.radius: expected a finite number, found nan",
    ]


def test_a_wrong_part_is_not_a_missing_one(tmp_path: Path) -> None:
    assert problems(tmp_path, "frames:\n  - edges: [{width: heavy}, thin]\n") == [
        'r.yaml:2: frames.0.edges.0.width: input should be a valid integer; found "heavy"'
    ]
    assert problems(tmp_path, "frames:\n  - edges: []\n")[0].startswith("r.yaml:2: frames.0.edges: tuple should have")


def test_a_spec_names_the_part_that_does_not_fit(tmp_path: Path) -> None:
    told = problems(tmp_path, "frames:\n  - wide: 2\n    edges:\n      - thin\n      - {width: 3}\n")
    assert told == ["r.yaml:5: frames.0.edges.1: is too wide"]
