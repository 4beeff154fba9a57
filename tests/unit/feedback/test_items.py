"""Items: rows to be labelled, the tasks they come to, and the order in which answers are shown."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fettle.core.errors import FettleError
from fettle.feedback.items import order, read_items, tasks
from unit.feedback.makers import write

BAD = [
    ({"prompt": "x", "answers": ["a"]}, "one answer cannot be ranked"),
    ({"prompt": "x", "answers": ["a", "a"]}, "answers 1 and 2 are the same text; leave one out"),
    ({"prompt": "x", "answers": ["a", ""]}, "answers.1: the text is empty"),
    ({"prompt": "x", "answers": [str(i) for i in range(10)]}, "at most 9 can be ranked at a time"),
    ({"prompt": "x", "answers": ["a", {"text": "b", "model": "m"}]}, "unknown key 'answers.1.model'"),
    ({"prompt": "x", "answers": ["a"], "rules": ["r", "r"]}, "'rules' 1 and 2 are the same"),
    ({"prompt": "x", "answers": ["a"], "questions": [" "]}, "'questions' holds an empty text"),
    ({"prompt": "x", "answers": ["a"], "questions": [{"ask": "?", "type": "scal"}]}, "questions.0.type"),
    ({"answers": ["a", "b"]}, "expected one of 'prompt' and 'messages'"),
    ({"prompt": "first", "answers": ["a", "c"]}, "the prompt stands in"),
    ("[1]", "expected a JSON object, found a list"),
]


@pytest.mark.parametrize(("row", "said"), BAD, ids=range(len(BAD)))
def test_bad_rows_are_named(row: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "items.jsonl", {"prompt": "first", "answers": ["a", "b"]}, row)
    with pytest.raises(FettleError) as error:
        read_items(str(path))
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value)


def test_ids_are_unique_and_the_same_prompt_may_have_two(tmp_path: Path) -> None:
    row = {"prompt": "x", "answers": ["a", "b"]}
    assert [
        i.prompt_id for i in read_items(str(write(tmp_path / "i.jsonl", row | {"id": "1"}, row | {"id": "2"})))
    ] == ["1", "2"]
    with pytest.raises(FettleError, match="the id '1' stands in"):
        read_items(str(write(tmp_path / "i.jsonl", row | {"id": "1"}, row | {"id": "1"})))


def test_questions_and_rules_of_every_answer_then_the_ranking(tmp_path: Path) -> None:
    row = {
        "id": "1",
        "prompt": "x",
        "answers": ["a", {"text": "b", "source": "m"}],
        "questions": ["Good?"],
        "rules": ["Short."],
    }
    (item,) = read_items(str(write(tmp_path / "i.jsonl", row)))
    found = tasks([item], "ada")
    first, second = (item.answers[i].text for i in found[-1].shown)
    assert [t.subject for t in found] == [
        ("question", first, "Good?"), ("rule", first, "Short."), ("question", second, "Good?"), ("rule", second, "Short."),
        ("ranking", "a", "b"),
    ]  # fmt: skip
    now = datetime.now(UTC)
    given: list[dict[str, Any]] = [{"value": True}, {"value": "unsure"}, {}, {"value": "not"}, {"ranks": (2, 1)}]
    made = [task.record("ada", now, 1.25, **g) for task, g in zip(found, given, strict=True)]
    assert [r.subject for r in made] == [t.subject for t in found]
    assert [r.skipped for r in made] == [False, False, True, False, False]
    assert made[-1].model_dump()["shown"] == found[-1].shown and made[0].seconds == 1.2


def test_an_order_is_the_labelers_own_and_every_place_as_likely() -> None:
    assert order(4, 0, "ada", "p") == order(4, 0, "ada", "p")
    assert len({order(9, seed, who, "p") for seed in (0, 1) for who in ("ada", "bo")}) == 4
    counts = Counter(order(3, 0, "ada", str(i)) for i in range(6000))
    assert len(counts) == 6  # each 1000 times on average, with a standard deviation of 29
    assert all(abs(n - 1000) < 5 * 29 for n in counts.values())
