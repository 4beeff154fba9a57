"""Preferences: every form of row, every way to fail, and the tree that a row becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fettle.core.batch import ancestors
from fettle.core.errors import FettleError
from fettle.data import BadRow, DataSpec, Encoder, prepare, to_sample
from fettle.data.preference import MOST, Preference, compared, joined_at, tree
from fettle.data.template import Encoded

USER = {"role": "user", "content": "Count."}
GOOD, BAD = {"role": "assistant", "content": "one two"}, {"role": "assistant", "content": "bread"}


def texts(row: dict[str, Any]) -> list[list[tuple[str, str, bool]]]:
    """(role, content, learned) of each turn, of each answer."""
    return [
        [(m["role"], m["content"], w > 0) for m, w in zip(a.messages, a.weights, strict=True)]
        for a in to_sample(row, "preference").answers
    ]


PAIR = [
    [("user", "Count.", False), ("assistant", "one two", True)],
    [("user", "Count.", False), ("assistant", "bread", True)],
]
FORMS: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Count."}], "chosen": {"from": "gpt", "value": "one two"},
        "rejected": {"from": "gpt", "value": "bread"},
    },
    "messages": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "prompt of turns": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt of turns, answers of text": {"prompt": [USER], "chosen": "one two", "rejected": "bread"},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "whole conversations beside a prompt": {"prompt": "Count.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt of text, answers of turns": {"prompt": "Count.", "chosen": [GOOD], "rejected": [BAD]},
    "alpaca": {"instruction": "Count.", "input": "", "chosen": "one two", "rejected": "bread"},
    "one text": {"chosen": "\n\nHuman: Count.\n\nAssistant: one two", "rejected": "\n\nHuman: Count.\n\nAssistant: bread"},
    "a ranking of two": {"prompt": [USER], "answers": ["bread", "one two"], "ranks": [2, 1]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_says_the_same(name: str) -> None:
    assert texts(FORMS[name]) == PAIR
    assert to_sample(FORMS[name], "preference").ranks == (1.0, 2.0)


def test_plain_texts_stay_texts() -> None:
    sample = to_sample(
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 1.5, "weight": 2}, "preference"
    )
    assert [(a.prompt, a.completion) for a in sample.answers] == [("2 + 2 =", " 4"), ("2 + 2 =", " 5")]
    assert (sample.margin, sample.weight, sample.kind) == (1.5, 2.0, "preference")


def test_a_prompt_of_several_turns_is_not_learned() -> None:
    row = {"messages": [USER, GOOD, USER], "chosen": GOOD, "rejected": BAD, "system": "Be kind."}
    assert [learned for _, _, learned in texts(row)[0]] == [False, False, False, False, True]


def test_conversations_that_part_go_on_learned() -> None:
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}
    assert [learned for _, _, learned in texts(row)[1]] == [False, True, False, True]


def test_rankings_are_sorted_and_may_tie() -> None:
    sample = to_sample({"prompt": "p", "answers": ["c", "a", "b"], "ranks": [2, 1, 2]}, "preference")
    assert [a.completion for a in sample.answers] == ["a", "c", "b"]
    assert sample.ranks == (1.0, 2.0, 2.0)
    assert compared(sample.ranks) == [(0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("ranks", "dense"), [([2, 3], (1, 2)), ([3, 9, 3], (1, 1, 2)), ([1.5, 4], (1, 2)), ([7, 5, 6], (1, 2, 3))]
)
def test_the_best_rank_is_1_whatever_the_row_counts_from(ranks: list[float], dense: tuple[float, ...]) -> None:
    assert to_sample({"prompt": "p", "answers": [*"abc"][: len(ranks)], "ranks": ranks}, "preference").ranks == dense


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(("value", "rank"), [(True, 1.0), (False, 2.0), ("False", 2.0), (1, 1.0)])
def test_judged_answers(key: str, value: Any, rank: float) -> None:
    sample = to_sample({"messages": [USER, GOOD, USER, BAD], key: value}, "preference")
    assert sample.ranks == (rank,)
    assert sample.answers[0].weights == (0, 0, 0, 1.0), "the last answer is the one that was judged"
    plain = to_sample({"prompt": "p", "completion": "c", key: value}, "preference")
    assert (plain.answers[0].completion, plain.ranks) == ("c", (rank,))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "p", "chosen": "a"}, "the key 'rejected' is missing"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "'rejected' is null"),
    ({"prompt": "p", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ({"prompt": [USER], "chosen": GOOD, "rejected": GOOD}, "chosen and rejected are the same"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "one answer is the beginning of another"),
    ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Add."}, BAD]}, "the prompts differ: turn 1 of 'chosen' is no answer"),
    ({"chosen": "a", "rejected": "b"}, "no conversation written with 'Human:'"),
    ({"prompt": "p", "answers": ["a"]}, "a list of 2 to 16 answers, found 1"),
    ({"prompt": "p", "answers": ["a", "b"], "ranks": [1]}, "'ranks' must be a list of 2 numbers"),
    ({"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1]}, "1 for the best"),
    ({"prompt": "p", "answers": ["a", "b"], "ranks": [1, 1]}, "all answers have the same rank"),
    ({"prompt": "p", "completion": "c", "label": "good"}, "'label' must be true or false"),
    ({"prompt": "p", "label": True}, "the key 'completion' is missing"),
    ({"prompt": [USER], "chosen": 3, "rejected": BAD}, "'chosen' must be a text, a turn or a list of turns, found a number"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "the conversation has no assistant turn"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "'margin' must be a finite number, 0 or more"),
    ({"text": "t"}, "no preference"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "why"), BROKEN, ids=[why for _, why in BROKEN])
def test_what_is_no_preference_says_why(row: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRow) as problem:
        to_sample(row, "preference")
    assert why in str(problem.value)


# Trees.


def path(tokens: list[int], start: int, stop: int | None = None) -> Encoded:
    return Encoded(np.array(tokens, np.int32), ((start, stop or len(tokens), 1.0),))


def test_the_prompt_is_cut_one_token_short() -> None:
    joined = joined_at([path([1, 2, 3, 10, 11, 9], 3, 5), path([1, 2, 3, 12], 3)])
    example = tree(
        Encoded(joined.tokens, joined.spans, split=joined.split, answers=joined.answers, labels=(1.0, 0.5, 1.0, 2.0))
    )
    assert [n.tokens.tolist() for n in example.nodes] == [[1, 2], [3, 10, 11], [3, 12]], (
        "nothing after the last learned token"
    )
    assert [n.weights.tolist() for n in example.nodes] == [[0, 0], [0, 1, 1], [0, 1]]
    assert [n.parent for n in example.nodes] == [-1, 0, 0]
    assert example.extra["ranks"].tolist() == [1, 2] + [0] * (MOST - 2)
    assert (float(example.extra["margin"]), float(example.extra["example_weights"])) == (0.5, 1.0)


def test_a_token_of_prompt_and_answer_is_not_shared() -> None:
    """A tokenizer that joins the end of the prompt with the beginning of one answer."""
    joined = joined_at([path([1, 2, 34, 10], 2), path([1, 2, 3, 12], 3)])
    assert joined.split == 1
    assert joined.tokens.tolist() == [1, 2, 34, 10, 2, 3, 12]


def test_a_prompt_of_one_token_makes_two_roots() -> None:
    joined = joined_at([path([1, 10], 1), path([1, 12, 13], 1)])
    example = tree(
        Encoded(joined.tokens, joined.spans, split=joined.split, answers=joined.answers, labels=(1.0, 0.0, 1.0, 2.0))
    )
    assert [n.parent for n in example.nodes] == [-1, -1]


def source(folder: Path, rows: list[dict[str, Any]], **more: Any) -> DataSpec:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(path=str(file), **more)


def test_each_path_is_the_conversation_that_is_served(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": [USER, GOOD, USER], "answers": ["1", "2", "3"]},
    ]
    corpus = prepare([source(tmp_path, rows)], tokenizer, 256, form=Preference())
    encoder = Encoder(tokenizer)
    batch = corpus.batch(0)
    for row in rows:
        at = [i for i, n in enumerate(batch.names) if n.endswith(f":{rows.index(row) + 1}")]
        answers = row.get("answers") or [row["chosen"]["content"], row["rejected"]["content"]]
        for leaf, answer in zip(at[1:], answers, strict=True):
            tokens = [
                t
                for s in ancestors(batch.segments, leaf)
                for t in batch.tokens[batch.segments[s].start : batch.segments[s].stop].tolist()
            ]
            assert tokens == encoder.ids(encoder.render(row["messages"]) + f"{answer}<|im_end|>")
    assert int((batch.targets >= 0).sum()) == sum(
        len(encoder.ids(f"{a}<|im_end|>")) for a in ("one two", "bread", "1", "2", "3")
    )
    assert corpus.counts[0].compared == "4 pairs"


def test_counts_of_judged_answers(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    corpus = prepare([source(tmp_path, rows)], tokenizer, 64, form=Preference(compared=False))
    assert corpus.counts[0].compared == "3 answers, 2 of them desired"


@pytest.mark.parametrize(
    ("labels", "told"), [([True, True], "2 of 2"), ([False, False], "0 of 2"), ([True, False], "")]
)
def test_answers_of_one_kind_only_are_told(labels: list[bool], told: str, tokenizer: Any, tmp_path: Path) -> None:
    """Of all sources together: one of them may well hold a single kind."""
    sources = []
    for i, label in enumerate(labels):
        (tmp_path / f"{i}").mkdir()
        sources.append(source(tmp_path / f"{i}", [{"prompt": "p", "completion": f"c{i}", "label": label}]))
    corpus = prepare(sources, tokenizer, 64, form=Preference(compared=False))
    assert isinstance(corpus.encoder.form, Preference)
    notes = corpus.encoder.form.one_kind((s.store, s.units.example) for s in corpus.sources)
    assert [note.startswith(f"data: {told} answers are desired") for note in notes] == ([True] if told else [])


def test_bad_rows_are_set_aside_with_their_line(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": f"b{i}"} for i in range(9)] + [
        {"prompt": "p", "chosen": "a", "rejected": "a"}
    ]
    corpus = prepare([source(tmp_path, rows, max_bad=0.2)], tokenizer, 64, form=Preference())
    assert (corpus.counts[0].kept, corpus.counts[0].set_aside) == (9, 1)
    assert any("rows.jsonl:10: chosen and rejected are the same" in note for note in corpus.notes)
    with pytest.raises(FettleError, match=r"rows.jsonl:10: chosen and rejected are the same"):
        prepare([source(tmp_path, rows, max_bad=0)], tokenizer, 64, form=Preference())


def test_an_answer_that_the_model_cannot_see_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a" * 2, "rejected": "xyzw" * 12},
    ]
    corpus = prepare([source(tmp_path, rows)], tokenizer, 512, form=Preference(bound=16))
    assert (corpus.counts[0].kept, corpus.counts[0].too_long) == (1, 1)
    assert any("longer than the 16 that the model sees" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("rows", "more", "why"),
    [
        ([{"text": "t"}], {}, "learns from preferences.*found the columns text"),
        ([{"prompt": "p", "completion": "c", "label": True}], {}, r"judge one answer each.*kind: kto"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], {"long": "truncate"}, "truncate would cut answers that are compared"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], {"format": "messages"}, "format: messages has none"),
    ],
)  # fmt: skip
def test_data_of_another_kind_is_refused(
    rows: list[dict[str, Any]], more: dict[str, Any], why: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(FettleError, match=why):
        prepare([source(tmp_path, rows, **more)], tokenizer, 64, form=Preference())


def test_without_an_objective_for_them_preferences_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="an objective such as dpo"):
        prepare([source(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}])], tokenizer, 64)
