"""Whole evaluations: rows, scores by group, files, comparison of two, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from fettle.core import FettleError
from fettle.evaluate import Perplexity, Results, TaskFile, compare, evaluate, picture
from fettle.evaluate.interval import mean_interval
from fettle.evaluate.results import Result, Row, _measure, difference_table, draw, paired, require_shared
from fettle.evaluate.run import prompt_text
from fettle.evaluate.tasks import names_of
from fettle.generate import Sampling, generate, prompter
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec


@pytest.fixture
def forest(tiny_llama) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32"))


def write(path: Path, rows: list[dict]) -> str:
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return str(path)


def ask(text: str, **more: object) -> dict:
    return {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], **more}


def test_a_model_that_is_right_scores_one(forest: Forest, tmp_path: Path) -> None:
    """The answers are what the model says, so that the whole path from prompt to score is checked."""
    render = prompter(forest.tokenizer)
    rows: list[dict] = []
    for text in ("Count the stones.", "What is the capital?"):
        row = ask(text, family="chat", cluster="talk")
        rows.append({**row, "answer": generate(forest, [render.chat(row["messages"])], Sampling(max_tokens=8))[0].text})
    rows.append(
        {
            "prompt": "The baker",
            "answer": generate(forest, [render.plain("The baker")], Sampling(max_tokens=8))[0].text,
            "family": "plain",
        }
    )
    rows.append({**rows[0], "answer": "certainly not this", "family": "wrong"})
    rows.append({"prompt": "The baker", "choices": [" sells", " xyz"], "answer": 0, "family": "pick"})
    results = evaluate(
        forest, [TaskFile(path=write(tmp_path / "t.jsonl", rows), max_tokens=8)], tmp_path / "out", progress=False
    )
    (result,) = results.results
    assert [r.score for r in result.rows[:4]] == [1, 1, 1, 0]
    assert {name: s.mean for name, s in result.families.items() if name != "pick"} == {
        "chat": 1,
        "plain": 1,
        "wrong": 0,
    }
    assert result.clusters["talk"].n == 3
    assert result.scores["exact"].mean == 0.75 and {"acc", "acc_norm"} <= result.scores.keys()
    assert result.main[0] == "score" and result.main[1].n == 5
    assert result.about["template_hash"] == render.template_hash and result.about["unfinished"] == 4
    assert results.model["path"] == forest.spec.path and results.model["dtype"] == "float32"
    assert result.settings["seed"] == 0 and result.settings["shots"] == 0 and len(result.sha256) == 64
    assert Results.read(tmp_path / "out") == results
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert results.summary()[0] | {"low": 0, "high": 0, "mean": 0} == {
        "evaluation": "t.jsonl", "metric": "score", "mean": 0, "low": 0, "high": 0, "n": 5, "families": 4,
    }  # fmt: skip


def test_perplexity_in_the_results(forest: Forest, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The baker sells bread in the morning. " * 30)
    results = evaluate(forest, [Perplexity(path=str(tmp_path / "a.txt"), context=64)], tmp_path / "out", progress=True)
    (result,) = results.results
    assert result.about["context"] == 64 and result.about["stride"] == 63 and result.main[0] == "perplexity"
    assert Results.read(tmp_path / "out") == results
    assert not (tmp_path / "out" / "results.png").exists()
    cells = printed(results)
    assert "context 64, stride 63" in cells and result.main[1].low is not None and "n/a" not in cells


def test_one_window_has_no_interval(forest: Forest, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The baker sells bread.")
    results = evaluate(forest, [Perplexity(path=str(tmp_path / "a.txt"))], tmp_path / "out", progress=False)
    score = results.results[0].main[1]
    assert (score.low, score.high, score.n) == (None, None, 1) and score.mean > 1
    assert Results.read(tmp_path / "out") == results
    assert "n/a" in printed(results) and "[n/a]" in str(score)


def printed(results: Results) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(results.table())
    return out.getvalue()


def test_shots_become_turns_or_solved_prompts(forest: Forest, tmp_path: Path) -> None:
    render = prompter(forest.tokenizer)
    chats = TaskFile(path=write(tmp_path / "c.jsonl", [ask("A?", answer="a"), ask("B?", answer="b")]), shots=1)
    items = chats.examples()
    text = prompt_text(items[0], chats.shown(items)[0], render)
    system, user, assistant = (
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
    )
    assert text == system + user.format("B?") + assistant + "b<|im_end|>\n" + user.format("A?") + assistant
    plain = TaskFile(
        path=write(
            tmp_path / "p.jsonl", [{"prompt": "Q: A\nA:", "answer": "a"}, {"prompt": "Q: B\nA:", "answer": "b"}]
        ),
        shots=1,
    )
    items = plain.examples()
    assert prompt_text(items[1], plain.shown(items)[1], render) == "Q: A\nA: a\n\nQ: B\nA:"


def test_a_prompt_over_the_context_is_named(forest: Forest, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "bread " * 600, "answer": "b"}])
    with pytest.raises(FettleError, match=r"t\.jsonl:2: the prompt has \d+ tokens, and the model sees 512 at most"):
        evaluate(forest, [TaskFile(path=path)], progress=False)


def of(path: str, **settings: object) -> dict:
    return {"path": path, "seed": 0, **settings}


def made(scores: list[float], sha: str = "x", path: str = "t.jsonl", **settings: object) -> Results:
    rows = [
        Row(f"t.jsonl:{i}", "even" if i % 2 == 0 else "odd", "", "exact", s, "", "") for i, s in enumerate(scores, 1)
    ]
    result = Result.of_rows(path, sha, of(path, **settings), rows, {"template_hash": "h"})
    return Results({"path": "m"}, (result,))


def test_compare_is_paired() -> None:
    a, b = [0.0, 1.0] * 20, [1.0, 1.0] * 20
    (found,) = compare(made(a), made(b))
    total, odd, even = found.total, found.families["odd"], found.families["even"]
    assert (total.a, total.b, total.change.mean) == (0.5, 1.0, 0.5)
    assert 0.3 < total.change.low < 0.5 < total.change.high < 0.7
    assert (odd.a, odd.b, odd.change.mean) == (0, 1, 1) and 0.6 < odd.change.low < odd.change.high == 1
    assert (even.a, even.b, even.change.mean) == (1, 1, 0) and even.change.low < 0 < even.change.high
    assert found.notes == ()
    (noted,) = compare(made(a, shots=0), made(b, shots=2))
    assert noted.notes == ("shots differs: 0 and 2",)
    assert difference_table([found, noted]).row_count == 7


def test_compare_refuses_what_is_not_comparable(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="run on different files"):
        compare(made([1.0]), made([1.0], sha="y"))
    with pytest.raises(FettleError, match="nothing to compare"):
        compare(made([1.0]), Results({}, ()))
    (tmp_path / "results.json").write_text('{"model": {}, "results": [{}]}')
    with pytest.raises(FettleError, match=r"results\.json: not a results file"):
        compare(tmp_path, made([1.0]))


A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def result(sha: str, score: float, path: str = "x/t.jsonl", **settings: object) -> Result:
    return made([score] * 8, sha, path, **settings).results[0]


@pytest.mark.parametrize(
    ("before", "after", "pairs"),
    [
        ([result(A, 0.1), result(A, 0.2, shots=2)], [result(A, 0.1), result(A, 0.2, shots=2)], [(0.1, 0.1), (0.2, 0.2)]),
        ([result(A, 0.1), result(A, 0.2, shots=2)], [result(A, 0.2, shots=2), result(A, 0.1)], [(0.1, 0.1), (0.2, 0.2)]),
        ([result(A, 0.1), result(B, 0.2, "y/t.jsonl")], [result(B, 0.2, "t.jsonl"), result(A, 0.1, "../x/t.jsonl")], [(0.1, 0.1), (0.2, 0.2)]),
        ([result(A, 0.1), result(A, 0.2)], [result(A, 0.3), result(A, 0.4)], [(0.1, 0.3), (0.2, 0.4)]),
        ([result(A, 0.1), result(A, 0.2, shots=2)], [result(A, 0.3, shots=3), result(A, 0.4, shots=2)], [(0.1, 0.3), (0.2, 0.4)]),
        ([result(A, 0.1, "other.jsonl")], [result(B, 0.2), result(A, 0.3)], [(0.1, 0.3)]),
        ([result(A, 0.1)], [result(B, 0.2, "y/t.jsonl"), result(A, 0.3, "other.jsonl", shots=2)], [(0.1, 0.3)]),
    ],
)  # fmt: skip
def test_what_is_compared_is_the_same_file_with_the_same_settings(before: list, after: list, pairs: list) -> None:
    found = compare(Results({}, tuple(before)), Results({}, tuple(after)))
    assert [(d.total.a, d.total.b) for d in found] == [pytest.approx(pair) for pair in pairs]


def test_a_picture_sets_beside_each_other_what_is_compared(tmp_path: Path, monkeypatch) -> None:
    before = Results({}, (result(A, 0.1), result(A, 0.2, shots=2)))
    after = Results({}, (result(A, 0.3, shots=2), result(A, 0.4), result(C, 0.5, "z.jsonl")))
    drawn: list[picture.Group] = []
    monkeypatch.setattr(picture, "bars", lambda groups, models, file: drawn.extend(g for g in groups if g.total))
    draw({"before": before, "after": after}, tmp_path / "p.png")
    means = [{model: round(score.mean, 3) for model, score in group.scores.items()} for group in drawn]
    assert means == [{"before": 0.1, "after": 0.4}, {"before": 0.2, "after": 0.3}, {"after": 0.5}]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["t/a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["x/a.jsonl", "y/a.jsonl", "y/b.jsonl"], ["x/a.jsonl", "y/a.jsonl", "b.jsonl"]),
        (["1/x/a.jsonl", "2/x/a.jsonl", "a.jsonl"], ["1/x/a.jsonl", "2/x/a.jsonl", "t/a.jsonl"]),
        (["a.jsonl", "./a.jsonl", "../t/a.jsonl"], ["a.jsonl"] * 3),
    ],
)
def test_a_name_is_as_much_of_the_path_as_tells_it_from_others(tmp_path: Path, monkeypatch, paths: list, names: list) -> None:  # fmt: skip
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path / "t")
    assert names_of([TaskFile(path=path) for path in paths]) == names


def test_a_name_has_the_settings_that_differ() -> None:
    specs = [TaskFile(path="a.jsonl"), TaskFile(path="./a.jsonl", shots=2), TaskFile(path="b.jsonl", shots=3)]
    assert names_of(specs) == ["a.jsonl, shots 0", "a.jsonl, shots 2", "b.jsonl"]
    texts = [Perplexity(path="a.jsonl", context=8), Perplexity(path="a.jsonl"), TaskFile(path="a.jsonl")]
    assert names_of(texts) == ["a.jsonl, kind perplexity, context 8", "a.jsonl, kind perplexity, context None", "a.jsonl, kind task"]  # fmt: skip


def test_each_of_many_is_looked_at_once(monkeypatch) -> None:
    seen: list[object] = []
    dump = TaskFile.model_dump
    monkeypatch.setattr(TaskFile, "model_dump", lambda spec, **how: seen.append(spec) or dump(spec, **how))
    assert len(set(names_of([TaskFile(path="t.jsonl", seed=i) for i in range(50)]))) == 50 == len(seen)
    seen.clear()
    monkeypatch.setattr("fettle.evaluate.results._measure", lambda one: seen.append(one) or _measure(one))
    before, after = ([result(f"{side}{i}", 0.1, f"{side}{i}.jsonl") for i in range(50)] for side in "xy")
    assert paired(before, after) == [] and len(seen) == 100
    assert paired(before, before[::-1]) == [(i, 49 - i) for i in range(50)]


def test_two_files_of_one_name_are_told_apart_and_compared_with_themselves(forest: Forest, tmp_path: Path) -> None:
    for folder in "xy":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "t.jsonl", [{"prompt": f"{folder}{i}", "choices": ["a", "b"], "answer": 0} for i in range(4)])  # fmt: skip
    specs = [TaskFile(path=str(tmp_path / folder / "t.jsonl")) for folder in "xy"]
    results = evaluate(forest, specs, progress=False)
    assert [row["evaluation"] for row in results.summary()] == ["x/t.jsonl", "y/t.jsonl"]
    require_shared(results, specs)
    assert [(d.name, d.total.change.mean, d.notes) for d in compare(results, results)] == [
        ("x/t.jsonl", 0, ()), ("y/t.jsonl", 0, ()),
    ]  # fmt: skip
    (only,) = compare(results, evaluate(forest, specs[1:], progress=False))
    assert only.name == "y/t.jsonl"
    write(tmp_path / "y" / "t.jsonl", [{"prompt": "changed", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(FettleError, match="y/t.jsonl: the two were run on different files"):
        require_shared(results, specs)
    with pytest.raises(FettleError, match="asked for are other.jsonl"):
        require_shared(results, [TaskFile(path=write(tmp_path / "other.jsonl", [{"prompt": "a", "answer": "b"}]))])


def grouped(right: float) -> Results:
    """Two files that share a cluster's name; four families in two clusters each."""
    found = []
    for name in ("a.jsonl", "b.jsonl"):
        rows = [Row(f"{name}:{i}", f"family {i % 4}", f"cluster {i % 2}", "exact", right, "", "") for i in range(1, 41)]
        found.append(Result.of_rows(name, name, of(name), rows, {}))
    return Results({"path": "m"}, tuple(found))


def test_clusters_stand_for_their_families_in_table_and_picture(tmp_path: Path, monkeypatch) -> None:
    before, after, titles = grouped(0.0), grouped(1.0), {"b.jsonl": "new tasks"}
    table = difference_table(compare(before, after), titles)
    assert list(table.columns[0].cells) == ["a.jsonl", "  cluster 0", "  cluster 1", "new tasks", "  cluster 0", "  cluster 1"]  # fmt: skip
    drawn: list[picture.Group] = []
    monkeypatch.setattr(picture, "bars", lambda groups, models, file: drawn.extend(groups))
    draw({"before": before, "after": after}, tmp_path / "p.png", titles)
    assert [(g.label, g.total) for g in drawn] == [
        ("a.jsonl", True), ("cluster 0", False), ("cluster 1", False), ("new tasks", True), ("cluster 0", False), ("cluster 1", False),
    ]  # fmt: skip
    assert all((g.scores["before"].mean, g.scores["after"].mean) == (0, 1) for g in drawn)
    assert len(before.results[0].families) == 4


@pytest.mark.filterwarnings("error")
def test_what_no_font_has_is_escaped(tmp_path: Path, monkeypatch) -> None:
    from matplotlib import font_manager

    bundled = [f for f in font_manager.fontManager.ttflist if f.name.startswith(("DejaVu Sans", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
    fonts = picture.legible(["分类", "a"])
    assert [fonts.show(t) for t in ("分类", "é", "$a$")] == [r"\u5206\u7c7b", "é", r"\$a\$"]
    groups = [picture.Group("分类", {"模型": mean_interval([0.0, 1.0])}, True)] * 99
    picture.bars(groups, ["模型", "b"], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_picture_of_two(tmp_path: Path) -> None:
    draw({"base": made([0.0, 1.0] * 9), "tuned": made([1.0, 1.0, 0.0] * 6)}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_rows_of_one_line_are_compared_each_with_itself() -> None:
    """As of a list that is written in one line: a place is a line and a column."""

    def results(scores: list[float]) -> Results:
        places = ["a.json:1", "a.json:1:20", "a.json:1:40"]
        rows = [Row(at, "", "", "accuracy", score, "", "") for at, score in zip(places, scores, strict=True)]
        return Results({}, (Result.of_rows("a.json", "0", of("a.json"), rows, {}),))

    (found,) = compare(results([0.0, 1.0, 0.0]), results([1.0, 1.0, 0.0]))
    assert found.total.change.n == 3 and found.total.change.mean == pytest.approx(1 / 3)
