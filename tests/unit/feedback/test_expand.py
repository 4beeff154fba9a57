"""Records to preference data: pairs by prompt, ties, majorities, single answers; read back by the reader of preferences."""

from __future__ import annotations

from itertools import combinations
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import FettleError
from fettle.data.formats import to_sample
from fettle.data.read import read
from fettle.feedback.expand import labels, orders, pairs, rankings, write_rows
from unit.feedback.makers import question, ranking, records, verdict


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_k_answers_give_every_pair_that_does_not_tie(raw: list[int]) -> None:
    places = sorted(set(raw))
    ranks = [places.index(r) + 1 for r in raw]
    found = {(p.chosen, p.rejected) for p in pairs(records(ranking(ranks)))}
    name = [f"answer {'abcdef'[i]}" for i in range(len(ranks))]
    better = {(name[i], name[j]) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]}
    assert found == better
    assert len(better) == comb(len(ranks), 2) - sum(a == b for a, b in combinations(ranks, 2))


def test_pairs_of_a_prompt_stand_together_in_the_order_of_the_prompts() -> None:
    found = pairs(
        records(
            ranking([1, 2], "p1"),
            ranking([2, 1], "p2"),
            ranking([2, 1, 3], "p1", "bo"),
            ranking([], "p3", skipped=True),
        )
    )
    assert [p.prompt_id for p in found] == ["p1"] * 4 + ["p2"]


def test_each_labelers_pairs_or_the_majoritys() -> None:
    said = records(ranking([1, 2]), ranking([1, 2], labeler="bo"), ranking([2, 1], labeler="cy"))
    assert [(p.chosen[-1], p.labelers) for p in pairs(said)] == [("a", ("ada",)), ("a", ("bo",)), ("b", ("cy",))]
    (most,) = pairs(said, majority=True)
    assert (most.chosen[-1], most.votes, most.labelers) == ("a", (2, 1), ("ada", "bo"))
    assert pairs(said[1:], majority=True) == []  # one against one


@given(st.lists(st.sampled_from([(1, 2), (2, 1), (1, 1)]), min_size=1, max_size=7))
def test_a_majority_is_more_than_half_of_all_who_compared(ranks: list[tuple[int, int]]) -> None:
    said = records(*(ranking([*places], labeler=f"l{i}") for i, places in enumerate(ranks)))
    for better, places in (("a", (1, 2)), ("b", (2, 1))):
        found = [pair for pair in pairs(said, majority=True) if pair.chosen[-1] == better]
        assert len(found) == (2 * ranks.count(places) > len(ranks))
        assert all(pair.votes == (ranks.count(places), ranks.count(places[::-1])) for pair in found)


SAYS = st.sampled_from(["not", "unsure", "violated", "skipped", "never reached"])


@given(st.lists(st.tuples(SAYS, SAYS, SAYS), min_size=2, max_size=4))
def test_answers_are_compared_and_desired_by_the_rules_that_were_judged(table: list[tuple[str, str, str]]) -> None:
    """Of ada, against a count by hand; bo names all three rules."""
    rows = [verdict("violated", answer="z", rule=f"r{k}", labeler="bo") for k in range(3)]
    for answer, said in zip("abcd", table, strict=False):
        for k, one in enumerate(said):
            if one != "never reached":
                row = verdict(one, answer=answer, rule=f"r{k}")
                rows.append(row if one != "skipped" else {**row, "verdict": None, "skipped": True})
    cost, better, desired = {"not": 0.0, "unsure": 0.5, "violated": 1.0}, set(), {}
    for one, mine in zip("abcd", table, strict=False):
        for other, theirs in zip("abcd", table, strict=False):
            both = [(cost[m], cost[t]) for m, t in zip(mine, theirs, strict=True) if m in cost and t in cost]
            if sum(m for m, _ in both) < sum(t for _, t in both):
                better.add((one, other))
        if "violated" in mine or set(mine) == {"not"}:
            desired[one] = "violated" not in mine
    said_of = records(*rows)
    ada = [record for record in said_of if record.labeler == "ada"]
    if any("not" in row or "unsure" in row or "violated" in row for row in table):
        found = [row for row in labels(said_of, "rules") if row["labelers"] == ["ada"]]
        assert {row["completion"][-1]: row["label"] for row in found} == desired
    if better:
        assert sorted((p.chosen[-1], p.rejected[-1]) for p in pairs(ada, "rules")) == sorted(better)
        ranked = [list(zip(row["answers"], row["ranks"], strict=True)) for row in rankings(ada, "rules")]
        ordered = [(a[-1], b[-1]) for row in ranked for a, i in row for b, j in row if i < j]
        assert sorted(ordered) == sorted(better)


def test_what_is_said_of_single_answers_is_an_order_too() -> None:
    scale = {"ask": "How good?", "type": "scale"}
    said = records(
        question(6, answer="a", question=scale), question(2, answer="b", question=scale), question(6, answer="c", question=scale),
        question(7, answer="a", labeler="bo", question=scale),
    )  # fmt: skip
    assert {(p.chosen[-1], p.rejected[-1]) for p in pairs(said, "How good?")} == {("a", "b"), ("c", "b")}
    rules = records(
        verdict("not", answer="a"), verdict("unsure", answer="a", rule="Short."), verdict("violated", answer="b"),
        verdict("not", answer="b", rule="Short."), verdict("not", answer="c"), verdict("not", answer="c", rule="Short."),
    )  # fmt: skip
    assert [r["ranks"] for r in rankings(rules, "rules")] == [[2, 3, 1]]


def test_rankings_leave_out_what_prefers_nothing() -> None:
    assert [r["ranks"] for r in rankings(records(ranking([1, 3, 3]), ranking([1, 1], "p2")))] == [[1, 2, 2]]


def test_labels_of_single_answers() -> None:
    said = records(question(True), question(False, answer="b"), question(None, answer="c", skipped=True))
    assert [(r["completion"][-1], r["label"]) for r in labels(said, "Helpful?")] == [("a", True), ("b", False)]
    rules = records(
        verdict("not", answer="a"), verdict("not", answer="a", rule="Short."), verdict("violated", answer="b"),
        verdict("unsure", answer="b", rule="Short."), verdict("unsure", answer="c"),
    )  # fmt: skip
    assert [(r["completion"][-1], r["label"]) for r in labels(rules, "rules")] == [("a", True), ("b", False)]


def test_what_is_not_there_is_told() -> None:
    said = records(
        ranking([1, 2]), question(True), question(3, answer="b", question={"ask": "How good?", "type": "scale"})
    )
    with pytest.raises(FettleError, match="no record compares answers by 'Helpfull\\?'; did you mean 'Helpful\\?'"):
        orders(said, "Helpfull?")
    with pytest.raises(FettleError, match="no record compares answers by 'rules'"):
        orders(said, "rules")
    with pytest.raises(FettleError, match="'How good\\?' is no question of yes or no"):
        labels(said, "How good?")
    with pytest.raises(FettleError, match="no record judges a single answer by 'rules'; known: Helpful\\?"):
        labels(said, "rules")


def test_the_reader_of_preferences_reads_what_is_written(tmp_path: Path) -> None:
    talk = {"prompt": None, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    said = records(
        ranking([2, 1, 2]), ranking([1, 2], "p2") | talk, question(True), question(False, "p2", answer="b") | talk
    )
    made = {"pairs": [p.row() for p in pairs(said)], "rankings": rankings(said), "labels": labels(said, "Helpful?")}
    for name, rows in made.items():
        path = tmp_path / f"{name}.jsonl"
        assert write_rows(path, rows) == len(rows)
        samples = [to_sample(row.value, "preference") for row in read(str(path)) if row.value is not None]
        assert [len(s.answers) for s in samples] == {"pairs": [2, 2, 2], "rankings": [3, 2], "labels": [1, 1]}[name]
        if name == "pairs":
            assert [s.answers[0].completion or s.answers[0].messages[-1]["content"] for s in samples] == [
                "answer b",
                "answer b",
                "answer a",
            ]
    with pytest.raises(FettleError, match=r"rows go to a file that ends in \.jsonl"):
        write_rows(tmp_path / "rows.json", [])
