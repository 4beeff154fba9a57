"""Rewards: what each kind says of answers, sums with their parts, and everything that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fettle.core.config import validate
from fettle.core.errors import FettleError
from fettle.core.spec import Spec
from fettle.feedback.functions import FUNCTIONS, reward_function
from fettle.feedback.rewards import (
    AnyReward,
    FunctionReward,
    LengthReward,
    MetricReward,
    NumberReward,
    RegexReward,
    Reward,
    RulesReward,
    SumReward,
    Term,
)  # fmt: skip
from fettle.feedback.rules import Rule

TALK = [{"role": "user", "content": "How much is 2 + 2?"}]


class Holder(Spec):
    """A part of a recipe with a reward."""

    reward: AnyReward


def reward_of(data: dict[str, Any]) -> Reward:
    return validate(Holder, {"reward": data}, "r.yaml").reward  # type: ignore[no-any-return]


def test_a_number_is_verified_however_it_is_written() -> None:
    answers = ["It is 4.", "4", "two and two is five: 5", "**4.0**", "2 + 2 = 4", "four", "1,250.50 or -3", "４"]
    found = NumberReward().score([TALK] * 8, answers, answer=["4", 4, "4", 4.0, ["5", "4"], "4", "-3", "4"])
    assert found == [1, 1, 0, 1, 1, 0, 1, 1]


SURE = [
    "4", 4, 4.0, 1e22, "-3", "\u22123", "$1,250.50", "６００", "72 apples", "The answer is 72.", "答案：10", "x=5", "**4.0**", r"\boxed{72}",
    "48/2 = 24 in May, 48+24 = <<48+24=72>>72\n#### 72", "#### 1,000", ["4", "four, or 4"],
    "a 5/5 = 1\n#### 18\nThe answer is: 18", "7 (7.0)", "7（7.0）", "x = 18 = 18.0", "½", "3½", "-3 ½", "③", "答案是③",
    "10 m²", "12 cm³", "5 kg CO₂", "$5/kg", "5/day", "5: five", "12 km/h",
]  # fmt: skip
UNSURE = [
    "1/2", r"\frac{3}{4}", "km/2", "10²", "10⁻³", "2^10", "x^2", "√2", r"\sqrt{2}", "101₂", "12,34", "1 000", "1,000,00", "3:30",
    "10-5", "3–5", "2 or 3", "48/2 = 24", "so 24\n#### 1/2", ["4", "1/2"],
    "10 ²", "½²", "1⁄2", "7 (8)", "18\n19",
    "5/5", "2 + 2", "2-2", "2×2", "2 x 2", "2^{2}", "3:3", "2,2", "111 111", "(2, 2)", "1.1.1", "C2H2", "2 feet 2 inches", r"\frac{2}{2}",
]  # fmt: skip


@pytest.mark.parametrize(("reference", "sure"), [(r, True) for r in SURE] + [(r, False) for r in UNSURE])
def test_a_right_answer_is_one_number(reference: Any, sure: bool) -> None:
    """Of two numbers, or of a part of an expression, the last would count as right: 'It is 2.' for 1/2."""
    why = NumberReward().lack({"answer": reference})
    assert why is None if sure else why is not None and "'answer' is not one plain number in '" in why


def test_length_is_free_within_bounds() -> None:
    found = LengthReward(least=2, most=4, per=2).score(["p"] * 5, ["", "one", "one two", "1 2 3 4", "一二三四五 six"])
    assert found == [-1, -0.5, 0, 0, -1]
    assert LengthReward(most=None).score(["p"], ["word " * 1000]) == [0]


def test_patterns_metrics_and_functions() -> None:
    assert RegexReward(pattern=r"^\d+$", absent=-1).score(["p"] * 2, ["42", "a 42"]) == [1, -1]
    assert MetricReward().score(["p"] * 2, ["Paris.", "Lyon"], answer=["paris", ["Paris", "lyon"]]) == [1, 1]
    assert MetricReward(metric="contains", column="city").score(["p"], ["It is Paris"], city=["Paris"]) == [1]
    assert FunctionReward(name="json").score(["p"] * 2, ['{"a": 1}', "{a}"]) == [1, 0]
    assert FunctionReward(name="varied").score(["p"] * 3, ["a b c d", "a b c a b c a b c", "a"]) == [1, 3 / 7, 1]


def test_functions_of_the_users_own_that_fail_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def bare(prompts, answers):\n    return [1.0 for _ in answers]\n\n\n"
        "def broken(prompts, answers, **columns):\n    return [1 / 0 for _ in answers]\n"
    )
    ask = lambda name: FunctionReward(name=f"{tmp_path}/mine.py:{name}").score(["p"], ["a"], answer=["4"])  # noqa: E731
    with pytest.raises(FettleError, match=r"'answer'\); write it as def bare\(prompts, answers, \*\*columns\)"):
        ask("bare")
    with pytest.raises(FettleError, match=r"mine\.py:broken': .*/mine\.py:6: ZeroDivisionError: division by zero"):
        ask("broken")


def test_functions_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def brevity(prompts, answers, **columns):\n    return [-len(a) * k for a, k in zip(answers, columns['k'])]\n"
        "def nan(prompts, answers, **columns):\n    return [float('nan')] * len(answers)\n"
        "def few(prompts, answers, **columns):\n    return [1.0]\n"
        "def text(prompts, answers, **columns):\n    return ['high'] * len(answers)\n"
    )
    assert FunctionReward(name=f"{file}:brevity").score(["p", "q"], ["ab", "abc"], k=[1, 2]) == [-2, -6]
    for name, said in (
        ("nan", "the reward is nan for the answer 'ab' to 'How much is 2 + 2?'"), ("few", "1 rewards for 2 answers"),
        ("text", "expected a number for each answer, found ['high', 'high']"), ("brevitee", "did you mean 'brevity'?"),
    ):  # fmt: skip
        with pytest.raises(FettleError) as error:
            FunctionReward(name=f"{file}:{name}").score([TALK, TALK], ["ab", "abc"])
        assert said in str(error.value) and name in str(error.value)
    for name in ("vareid", f"{tmp_path}/other.py:f", "no.such.module:f"):
        with pytest.raises(FettleError, match="reward function"):
            FunctionReward(name=name).score(["p"], ["a"])


def test_a_registered_name_is_taken_once() -> None:
    def f(prompts: Any, answers: Any, **columns: Any) -> list[float]:
        return [2.0] * len(answers)

    try:
        assert reward_function("twos")(f) is f and FunctionReward(name="twos").score(["p"], ["a"]) == [2]
        with pytest.raises(FettleError, match="the name is taken"):
            reward_function("twos")(lambda *a, **k: [])
    finally:
        FUNCTIONS.pop("twos", None)


def test_a_sum_and_its_parts() -> None:
    inner = SumReward(terms=(Term(weight=2, reward=LengthReward(most=1, per=1)), Term(reward=RegexReward(pattern="4"))))
    both = SumReward(
        terms=(
            Term(reward=NumberReward()),
            Term(weight=0.5, reward=inner),
            Term(weight=-1, reward=RegexReward(pattern="x")),
        )
    )
    found = both.scores(["p"] * 2, ["4", "it is x"], answer=[4, 4])
    assert found.parts == {"number": [1, 0], "length": [0, -2], "regex": [1, 0], "regex_2": [0, 1]}
    assert found.total == [1 + 0.5 * (0 + 1) - 0, 0 + 0.5 * (-4 + 0) - 1]
    assert both.score(["p"] * 2, ["4", "it is x"], answer=[4, 4]) == found.total
    assert both.score([], [], answer=[]) == []


def test_recipes_say_all_of_it() -> None:
    data = {
        "kind": "sum",
        "terms": [{"weight": 0.5, "reward": {"kind": "length", "most": 80}}, {"reward": {"kind": "number"}}],
    }
    found = reward_of(data)
    assert isinstance(found, SumReward) and isinstance(found.terms[1].reward, NumberReward)
    assert reward_of(found.model_dump(mode="json")) == found
    judged = {"kind": "judge", "judge": {"engine": "big"}}
    both = reward_of(
        {
            "kind": "sum",
            "terms": [{"reward": {"kind": "model", "path": "runs/rm"}}, {"reward": judged}, {"reward": judged}],
        }
    )
    assert (both.models(), both.engines()) == (("runs/rm",), ("big",))


@pytest.mark.parametrize(("data", "said"), [
    ({"kind": "nmber"}, "r.yaml: reward: unknown kind 'nmber': did you mean 'number'?"),
    ({"kind": "sum", "terms": [{"reward": {"kind": "length", "mots": 3}}]}, "unknown key 'reward.terms.0.reward.mots': did you mean 'most'?"),
    ({"kind": "sum", "terms": []}, "reward.terms"),
    ({"kind": "regex", "pattern": "("}, "'(' is not a regular expression"),
    ({"kind": "length", "least": 5, "most": 4}, "no length is at least 5 and at most 4"),
    ({"kind": "rules", "rules": [{"says": "Be kind."}]}, "the rule 'Be kind.' has no pattern (forbids, requires), so a 'judge' is needed"),
    ({"kind": "rules", "rules": [{"says": "x", "forbids": "["}]}, "'[' is not a regular expression"),
])  # fmt: skip
def test_mistakes_in_a_recipe(data: dict[str, Any], said: str) -> None:
    with pytest.raises(FettleError) as error:
        reward_of(data)
    assert said in str(error.value)


@pytest.mark.parametrize(("facts", "said"), [
    ({}, "needs the column 'answer' of the data, which has no columns but the prompt"),
    ({"anwser": ["4"]}, "needs the column 'answer' of the data: did you mean 'anwser'?"),
    ({"answer": [None]}, "the row has no 'answer', for the answer '4' to 'How much is 2 + 2?'"),
    ({"answer": ["four"]}, "'answer' has no number in 'four'"),
    ({"answer": ["4", "5"]}, "2 answer for 1 answers"),
])  # fmt: skip
def test_columns_that_are_not_as_they_should_be(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(FettleError) as error:
        NumberReward().score([TALK], ["4"], **facts)
    assert said in str(error.value)


def test_rules_by_patterns_and_weights() -> None:
    rules = RulesReward(rules=(
        Rule(says="No shouting.", forbids=r"!|\b[A-Z]{4,}\b"), Rule(says="Ends with a full stop.", requires=r"\.\s*$", weight=3),
    ))  # fmt: skip
    assert rules.score(["p"] * 4, ["All good.", "All GOOD.", "All good", "No!"]) == [1, 0.75, 0.25, 0]
    assert rules.engines() == ()
