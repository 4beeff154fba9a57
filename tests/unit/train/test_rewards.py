"""The picture of a run that learned from rewards: what of a sum is drawn beside the total."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from fettle.train import rewards


def rows(**more: float) -> list[dict[str, Any]]:
    return [
        {"step": i + 1, "phase": i + 1, "reward": 0.1 * i, "reward_std": 0.2, "kl": 0.5 * i, "entropy": 1.0, "length": 9.0}
        | {key: factor * i for key, factor in more.items()}
        for i in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "drawn"),
    [
        ({}, []),
        ({"reward_model": 0.1, "reward_true": -0.2}, ["true"]),  # the model's part is the whole reward
        ({"reward_a": 0.3, "reward_b": -0.2}, ["a", "b"]),
    ],
)
def test_parts_that_are_not_the_reward_itself_are_drawn(
    more: dict[str, float], drawn: list[str], tmp_path: Path
) -> None:
    figure, axis = plt.subplots()
    rewards._parts(axis, rows(**more), [row["kl"] for row in rows()])
    lines = [line.get_label() for other in figure.axes[1:] for line in other.get_lines()]
    plt.close(figure)
    assert lines == drawn
    rewards.draw(rows(**more), tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 10_000
