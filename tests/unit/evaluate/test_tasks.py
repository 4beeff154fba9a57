"""Task files: what is read, what is refused and how it is named, which examples are shown."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from fettle.core import FettleError
from fettle.core.config import validate
from fettle.evaluate import EvalSpec, Perplexity, TaskFile, find
from fettle.evaluate.tasks import read_tasks

GOOD = {"prompt": "2 + 2 =", "answer": "4"}


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else orjson.dumps(r) for r in rows) + b"\n")
    return path


def test_reads_each_kind(tmp_path: Path) -> None:
    chat = {
        "messages": [{"role": "user", "content": "Capital?"}],
        "answer": ["Paris"],
        "metric": "contains",
        "family": "f",
        "cluster": "c",
    }
    choice = {"prompt": "The sky is", "choices": [" blue", " red"], "answer": 0, "id": 7, "meta": {"a": 1}}
    items = read_tasks(write(tmp_path / "t.jsonl", GOOD, b"", chat, choice))
    assert [i.where for i in items] == [f"{tmp_path}/t.jsonl:{n}" for n in (1, 3, 4)]
    assert [i.metric for i in items] == ["exact", "contains", "choice"]
    assert (items[1].family, items[1].cluster, items[1].question) == ("f", "c", "Capital?")
    assert [i.solution for i in items] == ["4", "Paris", " blue"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        ({**GOOD, "anwser": "4"}, "unknown key 'anwser': did you mean 'answer'"),
        ({"answer": "4"}, "expected one of 'messages' and 'prompt'"),
        ({**GOOD, "messages": []}, "expected one of 'messages' and 'prompt'"),
        ({**GOOD, "prompt": ""}, "'prompt' is not a text, or is empty"),
        ({**GOOD, "prompt": 3}, "'prompt' is not a text"),
        ({"messages": [], "answer": "4"}, "'messages' is not a list of messages, or is empty"),
        ({"messages": [{"role": "user"}], "answer": "4"}, "messages[0] has no text 'content'"),
        ({"messages": [{"role": "usr", "content": ""}], "answer": "4"}, "role 'usr': did you mean 'user'"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "4"}, "last message is the assistant's"),
        ({"prompt": "x"}, "'answer' is not a text"),
        ({**GOOD, "answer": []}, "'answer' is not a text or a list of texts, or is empty"),
        ({**GOOD, "answer": [" "]}, "is empty"),
        ({**GOOD, "metric": "exakt"}, "unknown metric 'exakt': did you mean 'exact'"),
        ({**GOOD, "metric": "regex", "answer": "("}, "not a regular expression"),
        ({**GOOD, "metric": "regex", "answer": "a{99999999999999999999}"}, "not a regular expression"),
        ({**GOOD, "metric": "regex", "answer": "(" * 5000}, "not a regular expression"),
        ({**GOOD, "metric": ["exact"]}, "'metric' is not a text"),
        ({**GOOD, "metric": {}}, "'metric' is not a text"),
        ({**GOOD, "metric": "number", "answer": "four"}, "needs an answer with a number"),
        ({**GOOD, "family": 3}, "'family' is not a text"),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "two texts or more"),
        ({"prompt": "x", "choices": ["a", "a"], "answer": 0}, "two of the choices are the same"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "expected the index of a choice, 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "expected the index of a choice"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 0, "metric": "exact"}, "scored by likelihood"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(FettleError) as caught:
        read_tasks(write(tmp_path / "t.jsonl", GOOD, row))
    assert str(caught.value).startswith(f"{tmp_path}/t.jsonl:2: ") and reason in str(caught.value)


def test_every_malformed_row_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(FettleError) as caught:
        read_tasks(write(tmp_path / "t.jsonl", *[{"prompt": "x"}] * 12))
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{tmp_path}/t.jsonl:10: ") and "2 malformed rows more" in lines[10]


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="no such task file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(FettleError, match="no rows"):
        read_tasks(write(tmp_path / "e.jsonl"))
    with pytest.raises(FettleError, match="cannot be read"):
        read_tasks(tmp_path)


def test_shown_examples(tmp_path: Path) -> None:
    rows = [{"prompt": f"{f}{i}", "answer": str(i), "family": f} for f in "ab" for i in range(6)]
    path = str(write(tmp_path / "t.jsonl", *rows))
    spec = TaskFile(path=path, shots=3, seed=5)
    items = spec.examples()
    shown = spec.shown(items)
    for item, examples in zip(items, shown, strict=True):
        assert len({e.prompt for e in examples}) == 3
        assert item.prompt not in {e.prompt for e in examples}
        assert {e.family for e in examples} == {item.family}
    assert shown == spec.shown(items)
    few = TaskFile(path=path, shots=3, seed=5, limit=4)
    assert [few.shown([i])[0] for i in few.examples()] == [shown[items.index(i)] for i in few.examples()]
    assert len(few.examples()) == 4
    with pytest.raises(FettleError, match="shots is 6 but the family 'a' has 5 other rows"):
        TaskFile(path=path, shots=6).shown(items)


def test_shown_examples_do_not_depend_on_how_the_path_is_spelt(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "t" / "a.jsonl", *[{"prompt": f"{i}", "answer": f"{i}"} for i in range(30)])
    monkeypatch.chdir(path.parent)
    drawn = []
    for name in ("a.jsonl", "./a.jsonl", "../t/a.jsonl", str(path)):
        spec = TaskFile(path=name, shots=2)
        drawn.append([[s.prompt for s in shown] for shown in spec.shown(spec.examples())])
    assert drawn == drawn[:1] * 4 and len({tuple(shown) for shown in drawn[0]}) > 20


def test_specs_from_a_recipe_and_from_a_folder(tmp_path: Path) -> None:
    task, text = validate(
        tuple[EvalSpec, ...], [{"path": "a.jsonl", "shots": 2}, {"kind": "perplexity", "path": "b.txt"}], "r.yaml"
    )
    assert isinstance(task, TaskFile) and task.shots == 2 and isinstance(text, Perplexity)
    with pytest.raises(FettleError, match="unknown key '0.shot': did you mean 'shots'"):
        validate(tuple[EvalSpec, ...], [{"path": "a.jsonl", "shot": 2}], "r.yaml")
    with pytest.raises(FettleError, match="stride 8 is not below context 8"):
        validate(tuple[EvalSpec, ...], [{"kind": "perplexity", "path": "b", "context": 8, "stride": 8}], "r.yaml")
    write(tmp_path / "b.jsonl", GOOD)
    (tmp_path / "a.txt").write_text("x")
    assert [type(s) for s in find([str(tmp_path)], limit=3)] == [Perplexity, TaskFile]
    with pytest.raises(FettleError, match="no task files"):
        (tmp_path / "empty").mkdir()
        find([str(tmp_path / "empty")])
