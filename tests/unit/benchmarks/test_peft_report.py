"""What the PEFT benchmark makes of its measurements."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks.peft_report import line, section, summary

FACTS: dict[str, Any] = {
    "machine": {"cpu": "a", "threads": 2, "gpu": None, "memory_gib": 1.0, "system": "b", "load": 0.1},
    "versions": {"torch": "2"}, "made": {"parameters": 40_000_000, "row": 2048, "dtype": "bfloat16"},
}  # fmt: skip
ASKED = argparse.Namespace(
    warmup=1, quick=False, device="cpu", data="x/data.json", size="40m", pairs=2, steps=4
)  # fmt: skip


def run(step: float, peak: int = 100) -> dict[str, Any]:
    """Four steps; the first, which warms up, takes long, and one of the others too."""
    marks = [9.0, 9.0 + step, 9.0 + 2 * step, 29.0 + 3 * step]
    return {"marks": marks, "loss": [2.0, 1.0, 1.0, 1.0], "peak": peak, "trained": 7}


def result(fast: float, saved: int) -> dict[str, Any]:
    """fettle takes 1 s and saves 80; one setting of PEFT takes 2 s and saves 200, the other as given."""
    runs = {"fettle": [run(1.0), run(2.0)], "slow": [run(2.0), run(4.0)], "best": [run(fast), run(2 * fast)]}
    one = {"saved": {"fettle": 80, "slow": 200, "best": saved}, "runs": runs}
    timed = {"together": [1.0, 1.0, 2.0], "alone": [3.0, 2.0, 8.0]}
    return summary(ASKED, FACTS, {0.0: one}, {2: {"apart": 0.0, "read": timed, "answer": timed}})


@pytest.mark.parametrize(
    ("fast", "saved", "met"),
    [
        (1.2, 80, True),  # faster, and no larger
        (1.0, 100, True),  # no slower, and a fifth less
        (1.1, 90, False),  # better at both, by too little
        (0.9, 200, False),  # much less memory does not pay for time
        (2.0, 79, False),  # nor time for memory
    ],
)
def test_every_setting_counts_and_both_figures(fast: float, saved: int, met: bool) -> None:
    found = result(fast, saved)
    assert found["ratio"] == pytest.approx(min(fast, 2.0)) and found["memory_ratio"] == 80 / min(saved, 200)
    told = line(found)
    assert found["met"] is told["met"] is told["lora"]["0.0"]["best"]["met"] is met
    assert told["lora"]["0.0"]["slow"]["met"] and told["batches"] == {"2": {"read": 3.0, "answer": 3.0}}


def test_the_section_tells_every_setting() -> None:
    text = section(result(1.2, 80))
    assert "| PEFT, best | 1.800 (1.200 - 2.400) |" in text and "**1.20 (1.20 - 1.20)** | **1.00**" in text
    assert "The least speed-up is 1.20" in text and "mean nothing" not in text
