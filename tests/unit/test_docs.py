"""What the docs say that a machine can check: recipes, links, names, and the table of methods.

A ```yaml block is a recipe, a part of one (its `edits`, without data and output), or a list of edits; each is validated by
`load_recipe`. The recipe that a page of docs/methods begins with is also applied to the embedded base.
"""

from __future__ import annotations

import ast
import copy
import importlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import concrete
from fettle.export.peft import METHODS
from fettle.models import prompt
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.select import partly_matched
from fettle.models.spec import EMBEDDED, ModelSpec
from fettle.stages.artifact import apply_edits, outline_edits
from fettle.stages.compare import read_arms
from fettle.stages.pipeline import Pipeline, load_recipe
from fettle.stages.recipes import recipe_file
from fettle.stages.tune import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
METHOD_PAGES = sorted((DOCS / "methods").glob("*.md"))
OBJECTIVE_PAGES = sorted((DOCS / "objectives").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^    .*$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in FENCE.finditer(text)]
    return [block for block in found if block.language == language]


def every(language: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for page in PAGES for block in blocks_of(page, language)]


def is_whole(data: Any) -> bool:
    """Whether a document is a recipe that could run, rather than a part of one."""
    return "stages" in data or {"data", "output"} <= set(data) or data.get("kind") == "quantize"


def read(block: Block, folder: Path) -> Pipeline | None:
    """The block as a recipe; what a part of one leaves out is filled in. None where it is something else."""
    data = YAML(typ="safe", pure=True).load(block.text)
    data = {"edits": data} if isinstance(data, list) else data
    if not {"edits", "stages", "data"} & set(data):
        return None
    file = folder / "recipe.yaml"
    filled = {"data": [{"path": "rows.jsonl"}], "output": "runs/mine"} | data
    file.write_text(block.text if is_whole(data) else json.dumps(filled), encoding="utf-8")
    return load_recipe(file)


def recipe_of(page: Path, folder: Path) -> Recipe:
    """The recipe that a page begins with."""
    pipeline = read(blocks_of(page, "yaml")[0], folder)
    assert pipeline is not None
    (recipe,) = pipeline.stages
    return recipe


@pytest.mark.parametrize("block", every("yaml"))
def test_every_recipe_is_one(block: Block, tmp_path: Path) -> None:
    read(block, tmp_path)


@pytest.mark.parametrize("block", every("python"))
def test_python_reads_and_its_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fettle"):
            home = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(home, name.name), f"{block}: {node.module} has no {name.name}"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}: {sorted(anchors(there))}"


def test_every_page_is_in_the_index() -> None:
    index = {(DOCS / target.partition("#")[0]).resolve() for target in LINK.findall(prose(DOCS / "README.md"))}
    assert {p.resolve() for p in DOCS.rglob("*.md")} - index == {(DOCS / "README.md").resolve()}


def test_arms_that_pages_name_exist() -> None:
    arms = set(read_arms(recipe_file("peft.yaml")))
    for page in METHOD_PAGES:
        named = re.findall(r'--only (?:"([^"]+)"|([^\s`]+))', page.read_text(encoding="utf-8"))
        said = {quoted or plain for quoted, plain in named}
        assert said <= arms, f"{page.name}: {said - arms} of {arms}"


def test_claims_that_pages_name_exist_and_each_is_named_by_a_method() -> None:
    from fettle.lab.claims import CLAIMS

    named = {page: re.findall(r"fettle lab run ([\w-]+)", page.read_text(encoding="utf-8")) for page in PAGES}
    for page, names in named.items():
        assert set(names) <= set(CLAIMS), f"{page.name}: {set(names) - set(CLAIMS)} of {set(CLAIMS)}"
    assert set(CLAIMS) <= {name for page in (*METHOD_PAGES, *OBJECTIVE_PAGES) for name in named[page]}


def test_every_edit_has_a_page_that_shows_it(tmp_path: Path) -> None:
    shown = {
        edit.kind  # type: ignore[attr-defined]
        for page in METHOD_PAGES
        for block in blocks_of(page, "yaml")
        for stage in (read(block, tmp_path) or Pipeline(stages=())).stages
        for edit in stage.edits
    }
    assert set(concrete(Edit)) <= shown, f"without a page in docs/methods: {set(concrete(Edit)) - shown}"


# The table of methods.


def table() -> dict[Path, dict[str, str]]:
    """The rows of the table 'All methods' by page, each by its column."""
    text = (DOCS / "edits.md").read_text(encoding="utf-8").partition("## All methods")[2].partition("\n## ")[0]
    lines = [
        [c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    head, _, *rows = lines
    return {DOCS / LINK.findall(row[0])[0]: dict(zip(head, row, strict=True)) for row in rows}


ROWS = table()
NO_EDIT = {"several_adapters.md"}  # what is done with edits afterwards


@pytest.fixture(scope="module")
def base() -> Forest:
    return load(ModelSpec(path=EMBEDDED, device="cpu", dtype="float32"))


def test_every_page_has_a_row() -> None:
    assert {page.name for page in METHOD_PAGES} - {page.name for page in ROWS} == NO_EDIT


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_the_table_says_what_the_code_does(page: Path, base: Forest, tmp_path: Path) -> None:
    block = blocks_of(page, "yaml")[0]
    assert is_whole(YAML(typ="safe", pure=True).load(block.text)), f"{block}: the first recipe could not run as it is"
    recipe, row = recipe_of(page, tmp_path), ROWS.get(page)
    if recipe.model.path != EMBEDDED:
        assert row is not None and row["tiny"] == "-"
        return
    forest = Forest(copy.deepcopy(base.model), copy.deepcopy(base.tokenizer), base.spec, base.backend)
    (outline_edits if recipe.kind == "quantize" else apply_edits)(forest, recipe.edits)
    model = forest.model
    for edit in recipe.edits:
        assert not partly_matched(model, getattr(edit, "targets", None) or ()), f"{block}: a run would refuse it"
    if row is None:
        return
    assert row["tiny"] == f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"
    assert row["PEFT"] == ("yes" if is_in_peft(model, recipe.edits) else "no")
    assert row["merges"] == ("yes" if merges(model, recipe.edits) else "no")


def test_the_formulas_give_these_numbers(base: Forest) -> None:
    """The column 'trains', and the pages' formulas, worked out for the embedded base and the recipes of the pages."""
    c = base.config
    C, L, I = c.hidden_size, c.num_hidden_layers, c.intermediate_size  # noqa: E741 - as the page has them
    kv = c.num_key_value_heads * C // c.num_attention_heads
    ends = [(C, C), (C, kv), (C, kv), (C, C), (C, I), (C, I), (I, C)] * L  # K and N of all linear layers
    low, out = sum(k + n for k, n in ends), sum(n for _, n in ends)
    P, M, table = 20, 512, 2 * L * kv
    expected = {
        "lora": 16 * low, "rslora": 64 * low, "dora": 16 * low + out, "lora_plus": 16 * low, "pissa": 16 * low,
        "loftq": 16 * low, "nf4": 16 * low, "rtn": 16 * low, "qat": 16 * low, "lsq": 16 * low + out, "bitdelta": len(ends), "adalora": 24 * (low + len(ends)),
        "adapter": L * (2 * C * 64 + 64 + C), "tinytl": L * C * 64 * (1 + 1 / 4) + out, "bitfit": out,
        "ia3": L * (2 * kv + I), "norms": (2 * L + 1) * C, "new_tokens": 2 * C, "prompt_tuning": P * C,
        "p_tuning_v2": P * table, "prefix_tuning": P * C + (C + 1) * M + (M + 1) * table,
    }  # fmt: skip
    m = C // 2
    lstm = 8 * m * (C + m + 2) + 8 * m * (3 * m + 2)
    expected["p_tuning"] = P * C + lstm + 2 * m * (2 * m + 1) + (2 * m + 1) * C
    for name, count in expected.items():
        assert ROWS[DOCS / "methods" / f"{name}.md"]["tiny"] == f"{int(count):,}", name


def is_in_peft(model: Any, edits: tuple[Edit, ...]) -> bool:
    """Whether one edit, of a kind that PEFT's format has, holds all that an artifact would keep."""
    held = [edit for edit in edits if edit.tensors(model)]
    known = tuple(kind for method in METHODS for kind in method.edits)
    return len(held) == 1 and (isinstance(held[0], known) or prompt.find(model, held[0]) is not None)


def merges(model: Any, edits: tuple[Edit, ...]) -> bool:
    try:
        for edit in edits:
            edit.merge(model)
    except FettleError:
        return False
    return True
