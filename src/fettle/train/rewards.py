"""The picture and the figures of a run that learned from rewards: what it gained, and how far it went for it.

Reward over divergence tells a policy that learns from one that cheats: where the reward rises and the answers get worse, it bends
away from what people want at some distance (Gao et al. 2022, arXiv 2210.10760); the answers themselves lie in `answers/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fettle.core.files import new_file

PICTURE = "reward.png"
NAMES = {
    "reward": "reward", "kl": "KL from the reference, nats an answer", "entropy": "entropy, nats a token",
    "clipped": "share clipped", "length": "tokens an answer", "ended": "answers that end by themselves",
    "gap": "sampler and trainer apart, nats a token", "beta": "beta", "equal_groups": "prompts whose answers are all worth the same",
    "kept_reward": "reward of the kept", "value_explained": "variance that the critic explains",
}  # fmt: skip


def phases(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each phase came to: its first row, with the mean over its steps of what they clipped."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if "phase" in row:
            found.setdefault(row["phase"], []).append(row)
    return [steps[0] | {"clipped": sum(s["clipped"] for s in steps) / len(steps)} if "clipped" in steps[0] else steps[0]
            for steps in found.values()]  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, first -> last, and the best reward); means over a tenth of the phases at either end."""
    found = phases(rows)
    if not found:
        return []
    some = max(1, len(found) // 10)
    keys = [*NAMES, *(key for key in found[-1] if key.startswith("reward_") and key != "reward_std")]
    told = []
    for key in keys:
        ends = [[row[key] for row in part if row.get(key) is not None] for part in (found[:some], found[-some:])]
        if not all(ends):
            continue
        first, last = (sum(end) / len(end) for end in ends)
        best = f", best {max(row['reward'] for row in found):.4g}" if key == "reward" else ""
        told.append((NAMES.get(key, f"reward: {key.removeprefix('reward_')}"), f"{first:.4g} -> {last:.4g}{best}"))
    return told


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward and its spread by phase, with entropy and length beneath; beside them reward over KL, dark where it is late, and
    the parts of a sum that are not the reward itself."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    found = phases(rows)
    at = np.array([row["phase"] for row in found])
    reward, spread = (np.array([row[key] for row in found], dtype=float) for key in ("reward", "reward_std"))
    figure = plt.figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[3, 2])
    top = figure.add_subplot(grid[:2, 0])
    top.fill_between(at, reward - spread, reward + spread, color="#dbe5f0", lw=0, label="one standard deviation")
    top.plot(at, reward, color="#1f4e79", lw=1.6, label="mean of a phase")
    top.set_ylabel("reward")
    top.legend(frameon=False, fontsize=8)
    low = figure.add_subplot(grid[2, 0], sharex=top)
    low.plot(at, [row["entropy"] for row in found], color="#a0522d", lw=1.2)
    low.set_ylabel("entropy\n(nats a token)", color="#a0522d", fontsize=8)
    low.set_xlabel("phase")
    low.xaxis.set_major_locator(MaxNLocator(integer=True))
    long = low.twinx()
    long.plot(at, [row["length"] for row in found], color="#5b7f3a", lw=1.2)
    long.set_ylabel("tokens\nan answer", color="#5b7f3a", fontsize=8)
    side = figure.add_subplot(grid[:, 1])
    if all(row.get("kl") is not None for row in found):
        kl = np.array([row["kl"] for row in found], dtype=float)
        side.plot(kl, reward, color="#b9c7d6", lw=0.8, zorder=1)
        side.scatter(kl, reward, c=at, cmap="Blues", vmin=at.min() - 0.4 * np.ptp(at) - 1, s=16, zorder=2)
        side.set_xlabel("KL from the reference (nats an answer)")
        side.set_ylabel("reward")
        _parts(side, found, kl)
    else:
        side.text(0.5, 0.5, "no reference, so no KL", ha="center", va="center", transform=side.transAxes)
    for axis in (top, low, side, long):
        axis.spines[["top"]].set_visible(False)
        if axis is not long:
            axis.spines[["right"]].set_visible(False)
            axis.grid(alpha=0.2)
    with new_file(path) as handle:
        figure.savefig(handle, format="png", dpi=110)
    plt.close(figure)


def _parts(axis: Any, found: Sequence[dict[str, Any]], kl: Any) -> None:
    """Every part of a sum over KL, on a scale of its own at the right; a part that is the whole reward is not drawn again."""
    names = [
        key for key in found[-1] if key.startswith("reward_") and key != "reward_std" and all(key in r for r in found)
    ]
    names = [key for key in names if any(abs(row[key] - row["reward"]) > 1e-9 for row in found)]
    if not names:
        return
    other = axis.twinx()
    for key, colour in zip(names, ("#a0522d", "#5b7f3a", "#7b4f9d", "#8a8f98"), strict=False):
        other.plot(kl, [row[key] for row in found], ".", ms=5, color=colour, label=key.removeprefix("reward_"))
    other.set_ylabel("its parts")
    other.legend(frameon=False, fontsize=7, loc="lower right")
    other.spines[["top"]].set_visible(False)
