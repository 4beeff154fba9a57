"""Screening: what labelers are held against, position bias, gates; and the report that tells it."""

from __future__ import annotations

import io

import numpy as np
import orjson
import pytest
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.files import write_json
from fettle.feedback.report import report
from fettle.feedback.screening import alphas, judgements, screen, share
from unit.feedback.makers import question, ranking, records, verdict

PROMPTS = [f"p{i}" for i in range(40)]


def sitting(labeler: str, right: float, seed: int) -> list[dict]:
    """Rankings of two answers, of which the first is the better one, right in a share of the prompts."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt in PROMPTS:
        ranks = [1, 2] if rng.random() < right else [2, 1]
        rows.append(
            ranking(ranks, prompt, labeler, shown=rng.permutation(2).tolist(), seconds=float(rng.integers(5, 15)))
        )
    return rows


def test_judgements_do_not_depend_on_the_order_of_answers() -> None:
    one = ranking([1, 2, 2])
    other = one | {"answers": one["answers"][::-1], "ranks": [2, 2, 1]}
    a, b = (dict(judgements(r)) for r in records(one, other))
    assert a == b and sorted(a.values()) == [0, 1, 1]  # type: ignore[type-var]
    assert list(judgements(records(ranking([], skipped=True))[0])) == []
    assert list(judgements(records(question("so", question={"ask": "Why?", "type": "text"}))[0])) == []


def test_who_guesses_falls_below_the_gate() -> None:
    said = records(*sitting("researcher", 1.0, 0), *sitting("good", 0.9, 1), *sitting("guess", 0.5, 2))
    worst, best = screen(said, trusted=["researcher"])
    assert (worst.labeler, worst.passes, best.labeler, best.passes) == ("guess", False, "good", True)
    assert worst.basis == "trusted" and worst.compared == 40 and worst.agreement is not None
    assert worst.agreement.low is not None and worst.agreement.low < 0.5 < (worst.agreement.high or 0)
    assert best.seconds is not None and 5 <= best.seconds < 15


def test_gold_comes_before_a_trusted_labeler_and_that_before_the_others() -> None:
    rows = [*sitting("a", 1.0, 0), *sitting("b", 0.0, 1)]
    gold = records(*[ranking([2, 1], p, "gold") for p in PROMPTS[:10]])
    assert {s.labeler: (s.basis, s.passes) for s in screen(records(*rows), gold=gold)} == {
        "a": ("gold", False),
        "b": ("gold", True),
    }
    assert {s.labeler: (s.basis, s.compared) for s in screen(records(*rows), gold=gold)}["a"] == ("gold", 10)
    assert {s.labeler: s.basis for s in screen(records(*rows))} == {"a": "others", "b": "others"}
    elsewhere = records(*rows, ranking([1, 2], "far", "c"))
    assert {s.labeler: (s.basis, s.passes) for s in screen(elsewhere, trusted=["a"])} == {
        "b": ("trusted", False),
        "c": ("", None),
    }
    with pytest.raises(FettleError, match="no record is by the trusted labeler 'aa'"):
        screen(elsewhere, trusted=["aa"])


def test_position_bias_is_seen() -> None:
    """A labeler who takes what is shown first, whatever it is; another with three answers who takes the last."""
    first = [
        ranking([1, 2] if i % 2 else [2, 1], p, "first", shown=[0, 1] if i % 2 else [1, 0])
        for i, p in enumerate(PROMPTS)
    ]
    last = [ranking([3, 2, 1], p, "last", shown=[0, 1, 2]) for p in PROMPTS[:5]]
    fair = [ranking([1, 2], p, "fair", shown=[0, 1] if i % 2 else [1, 0]) for i, p in enumerate(PROMPTS)]
    found = {s.labeler: s.first for s in screen(records(*first, *last, *fair))}
    assert found["first"] is not None and found["first"].mean == 1 and (found["first"].low or 0) > 0.9
    assert found["last"] is not None and found["last"].mean == 0
    assert found["fair"] is not None and found["fair"].mean == 0.5


def test_alpha_of_rankings_does_not_hang_on_the_names_of_answers() -> None:
    """By hand for two labelers and pairs counted both ways: n_+1 = n_-1, so that chance is a half and alpha = 1 - D_o / D_e."""
    rows = [*sitting("a", 1.0, 0), *[ranking([1, 2] if i < 30 else [2, 1], p, "b") for i, p in enumerate(PROMPTS)]]
    ((name, level, alpha),) = alphas(records(*rows))
    n = 4 * len(PROMPTS)  # values: two labelers, two directions
    assert (name, level, alpha.units) == ("ranking", "ordinal", 40)
    assert alpha.alpha == pytest.approx(1 - (n - 1) * (2 * 20) / (2 * (n / 2) ** 2), abs=1e-12)


def test_every_kind_has_an_alpha_of_its_own_level() -> None:
    rows = []
    for labeler in ("a", "b"):
        for i, p in enumerate(PROMPTS[:6]):
            rows += [
                question(i % 2 == 0, p, labeler), verdict(["not", "unsure", "violated"][i % 3], p, labeler),
                question(1 + i, p, labeler, question={"ask": "How good?", "type": "scale"}),
                question(i / 2, p, labeler, question={"ask": "How long?", "type": "number"}),
            ]  # fmt: skip
    assert {(name, level): a.alpha for name, level, a in alphas(records(*rows))} == {
        ("Helpful?", "nominal"): 1, ("rules", "ordinal"): 1, ("How good?", "ordinal"): 1, ("How long?", "interval"): 1,
    }  # fmt: skip


def test_the_report(tmp_path) -> None:
    rows = [
        *sitting("a", 0.9, 0),
        *sitting("b", 0.8, 1),
        question(True),
        question(False, "p2"),
        verdict("violated", answer="b"),
    ]
    found = report(records(*rows, ranking([], "px", "a", skipped=True)))
    out = io.StringIO()
    found.print(Console(file=out, width=80, color_system=None))
    said = out.getvalue()
    assert "84 records (81 ranking, 2 question, 1 rule) on 41 prompts; 1 skipped" in said
    for part in (
        "labelers",
        "agreement beyond chance",
        "ratings (Bradley-Terry)",
        "what labelers said",
        "violated: No insults.",
    ):
        assert part in said
    assert found.ratings is not None and [r.name for r in found.ratings.rows] == ["A", "B"]
    values = {(f.about, f.source): f.score.mean for f in found.findings}
    assert values == {("Helpful?", "A"): 0.5, ("violated: No insults.", "B"): 1.0}
    write_json(tmp_path / "report.json", found.to_json())
    assert orjson.loads((tmp_path / "report.json").read_bytes())["prompts"] == 41


def test_a_report_of_answers_without_models_says_so() -> None:
    bare = ranking([1, 2]) | {"answers": [{"text": "x"}, {"text": "y"}]}
    found = report(records(bare))
    assert found.ratings is None and any("do not name their models" in note for note in found.notes)


def test_prompts_that_are_all_half_right_leave_room_for_others() -> None:
    """Mixed hits, alike in every prompt: no resample varies, and yet there is an interval."""
    found = share([(prompt, hit) for prompt in "abcd" for hit in (0.0, 1.0)])
    assert found is not None and found.mean == 0.5 and found.n == 4 and found.low < 0.4 and found.high > 0.6
