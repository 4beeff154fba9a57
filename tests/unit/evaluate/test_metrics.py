"""Scores of answers, against examples worked by hand and the reference implementation of ROUGE."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.evaluate.metrics import best, contains, exact, last_number, longest_common, number, numbers, rouge


@pytest.mark.parametrize(
    ("output", "answer", "same"),
    [
        (" The  Baker.\n", "the baker", 1),
        ("ＡＢＣ", "abc", 1),
        ("北京。", "北京", 1),
        ("bakers", "baker", 0),
        ("", "x", 0),
        ("H₂O", "h2o", 1),
        ("−4", "-4", 1),
        ("5²", "52", 0),
    ],
)
def test_exact(output: str, answer: str, same: float) -> None:
    assert exact(output, answer) == same


@pytest.mark.parametrize(
    ("output", "answer", "found"),
    [
        ("It is 14.", "4", 0), ("It is 4.", "4", 1), ("Paris, of course", "paris", 1), ("comparison", "paris", 0),
        ("首都是北京市", "北京", 1), ("a+b", "+", 1), ("x", "", 0), ("_Paris_", "Paris", 1),
        ("a resumé", "resum", 0), ("который", "кот", 0), ("Straßen", "straß", 0), ("서울은", "서울", 1), ("الكتاب", "كتاب", 1),
        ("3.45", "3", 0), ("3.45", "45", 0), (".5", "5", 0), ("3.45", "3.45", 1), ("So...4.", "4", 1), ("4%, $4", "4", 1),
        ("1,400", "1", 0), ("1,400", "400", 0), ("4, 400", "4", 1), ("1,2,3", "2", 1), ("答案是4，5不对", "4", 1), ("第4章", "4", 1),
        ("-4", "4", 0), ("x = −4", "4", 0), ("-4", "-4", 1), ("10-4", "4", 1), ("Covid-19", "19", 1), ("١٤", "٤", 0),
        ("10 m²", "10", 1), ("10²", "102", 0), ("3½", "3", 0), ("3½", "31", 0), ("½", "2", 0),
        ("10⁻²", "2", 0), ("10⁻²", "10⁻²", 1), ("3⁄4", "3", 0),
        ("Born 01.05.2024 in Rome", "2024", 1), ("5.12.1990", "1990", 1), ("5.12.1990", "12", 1), ("v 1.2.3", "1.2.3", 1),
        ("100,200", "200", 0), ("1,0000", "0000", 1), ("2e-5", "5", 0),
        ("x = −4", "-4", 1), ("x = -4", "−4", 1), ("10-4 = 6", "-4", 0), ("10−4 = 6", "-4", 0), ("10-4 = 6", "4", 1),
        ("so +4", "+4", 1), ("so +4", "4", 1), ("3+4", "+4", 0), ("-0.5", "0.5", 0),
        ("it is 3.5", ".5", 0), ("it is 0.5", ".5", 1), ("it is .5", "0.5", 1), ("-.5", ".5", 0), ("Fig.4", "4", 1),
        ("It costs $5.", "$5", 1), ("$5", "5", 1), ("about 3.5%", "3.5%", 1), ("13.5%", "3.5%", 0), ("in C++.", "C++", 1),
        ("the U.S. today", "U.S.", 1), ("a - b", "-", 1), ("at 10:30", "10:30", 1), ("at 10:30", "30", 1), ("11 1 1", "1 1", 1),
    ],
)  # fmt: skip
def test_contains(output: str, answer: str, found: float) -> None:
    assert contains(output, answer) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7", 7), ("so -3.5", -3.5), ("10-3", 3), ("1,234,567.5 coins", 1234567.5), ("１２", 12), ("−4", -4),
        ("2e3", 2000), (".5", 0.5), ("none", None), ("room 12.", 12), ("1,2", 2), ("－１，２５０．５", -1250.5),
        ("The area is 10 m²", 10), ("10 cm³.", 10), ("10 ㎡", 10), ("5 kg CO₂", 5), ("x²-3", 3), ("m²", None),
        ("3½", 3.5), ("-3 ½", -3.5), ("½", 0.5), ("1,000¼ or so", 1000.25), ("1234,567½", 567.5), ("5 and -⅛", -0.125),
        ("答案是③", 3), ("⑳ or so", 20), ("③④", 4), ("1.5.2024", 2024), ("v1.2.3", 3), ("1.2.", 1.2), ("Fig.4", 4), ("是.5", 0.5),
    ],
)  # fmt: skip
def test_last_number(text: str, value: float | None) -> None:
    assert last_number(text) == value


def test_numbers_stand_in_their_order() -> None:
    assert numbers("so 3½ of ① and 1,250.5-4, then (−5)") == [3.5, 1, 1250.5, 4, -5]
    assert numbers("CO₂, none") == []


def test_number() -> None:
    assert number("The answer is 1,000.0", "1000") == 1
    assert number("The answer is 1001", "1000") == 0
    assert number("no idea", "1000") == 0


def test_best_of_several() -> None:
    assert best("exact", "four", ["4", "Four"]) == 1
    assert best("regex", "x = 12", [r"= \d{3}", r"= \d{2}$"]) == 1


@given(st.text(alphabet="abc ", max_size=60), st.text(alphabet="abc ", max_size=60))
def test_rouge_is_the_references(a: str, b: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    assert rouge(a, b) == pytest.approx(scorer.score(a, b)["rougeL"].fmeasure)


def test_rouge_sees_chinese() -> None:
    assert rouge("北京是首都", "北京是首都") == 1
    assert rouge("北京是首都", "首都是北京") == pytest.approx(2 * 2 / (5 + 5))


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=40))
def test_longest_common_is_the_tables(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert longest_common(a, b) == table[-1][-1]
