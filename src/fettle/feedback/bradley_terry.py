"""Ratings of models from comparisons of their answers.

    P(i beats j) = sigma(theta_i - theta_j)         Bradley & Terry 1952, Biometrika 39
    rating = 1000 + 400 theta / ln 10               400 points are odds of ten to one, 1000 is the mean

A tie is half a win for each. The likelihood has a maximum only where every way to cut the models into two groups has wins in both
directions (Ford 1957); where it has none, half a win is added in both directions to every pair that was compared, which for two
models is Jeffreys' prior. Models that no chain of comparisons connects are rated apart, and their ratings say nothing of each other.

Intervals resample prompts, since the comparisons of one prompt's answers go together.

Shapes: N models, M comparisons, P prompts, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fettle.core.errors import FettleError
from fettle.feedback.expand import Order

RESAMPLES = 1000
CELLS = 4_000_000  # numbers held at a time
MEAN, SCALE = 1000.0, 400 / math.log(10)
STEPS, EXACT = 100, 1e-12


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to a prompt: `score` is 1 where the first is better, 0 where the second is, 1/2 where they tie."""

    prompt: str
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Rating:
    """A model's rating with its 95% interval (None where resampled prompts do not differ), among the models of its `group`."""

    name: str
    rating: float
    low: float | None
    high: float | None
    games: int
    points: float  # wins, and half of the ties
    group: int


@dataclass(frozen=True)
class Ratings:
    """Models from the best to the worst, group by group, and what should be known of the figures."""

    rows: tuple[Rating, ...]
    notes: tuple[str, ...]


def comparisons(orders: Sequence[Order]) -> list[Comparison]:
    """All pairs of answers whose models are named and differ."""
    found = []
    for order in orders:
        for i, j in order.pairs:
            first, second = order.answers[i].source, order.answers[j].source
            if first and second and first != second:
                score = 0.5 + 0.5 * float(np.sign(order.places[j] - order.places[i]))
                found.append(Comparison(order.record.prompt_id, first, second, score))
    return found


def strengths(wins: np.ndarray) -> np.ndarray:
    """theta float64 [..., N] of greatest likelihood, with mean 0, for `wins` float64 [..., N, N] of row over column.

    Newton's method in float64, each step halved until the likelihood rises. FettleError where there is no maximum.
    """
    wins = np.asarray(wins, np.float64)
    if not rated(wins).all():
        raise FettleError(
            "bradley_terry: the likelihood has no maximum, since some models never lost to the others, or were never compared "
            "with them; add half a win in both directions to every pair that was compared"
        )
    flat = wins.reshape(-1, *wins.shape[-2:])
    games, count = flat + flat.swapaxes(1, 2), wins.shape[-1]
    theta = np.zeros(flat.shape[:2])
    value = _likelihood(flat, theta)
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
        slope = flat.sum(2) - (games * chance).sum(2)
        curve = games * chance * (1 - chance)
        hessian = np.eye(count) * curve.sum(2)[:, :, None] - curve
        scale = hessian.trace(axis1=1, axis2=2)[:, None, None] / count**2  # of the direction that has no curvature
        step = np.linalg.solve(hessian + scale, slope[..., None])[..., 0]
        for _ in range(60):
            moved = theta + step
            new = _likelihood(flat, moved)
            worse = new < value - 1e-14 * np.abs(value)
            if not worse.any():
                break
            step[worse] /= 2
        theta, value = moved - moved.mean(1, keepdims=True), new
        if (np.abs(step) <= EXACT * (1 + np.abs(theta))).all():
            break
    return theta.reshape(wins.shape[:-1])


def _likelihood(wins: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """float64 [B]: sum_ij wins_ij log sigma(theta_i - theta_j)."""
    return -(wins * np.logaddexp(0, theta[:, None, :] - theta[:, :, None])).sum((1, 2))


def rated(wins: np.ndarray) -> np.ndarray:
    """bool [...]: whether wins lead from every model to every other, so that the likelihood has a maximum."""
    return np.asarray(_reach(np.asarray(wins) > 0).all((-2, -1)))


def _reach(edges: np.ndarray) -> np.ndarray:
    """bool [..., N, N]: where one gets to along edges."""
    count = edges.shape[-1]
    reach = edges | np.eye(count, dtype=bool)
    for _ in range(max(count - 1, 1).bit_length()):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return reach


def groups(wins: np.ndarray) -> list[list[int]]:
    """The models that chains of comparisons connect; the largest group first."""
    reach = _reach((wins + wins.T) > 0)
    found: dict[bytes, list[int]] = {}
    for i, row in enumerate(reach):
        found.setdefault(row.tobytes(), []).append(i)
    return sorted(found.values(), key=lambda group: (-len(group), group[0]))


def rate(played: Sequence[Comparison], seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95) -> Ratings:
    """Ratings of all models that were compared, with intervals, and notes on what the comparisons cannot say."""
    if not played:
        raise FettleError(
            "bradley_terry: no comparisons; name the models of the answers ('source') in what is labelled"
        )
    names = sorted({name for c in played for name in (c.first, c.second)})
    index = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for c in played:
        wins[index[c.first], index[c.second]] += c.score
        wins[index[c.second], index[c.first]] += 1 - c.score
    found, notes = groups(wins), []
    if len(found) > 1:
        said = "; ".join(", ".join(names[i] for i in group) for group in found)
        notes.append(
            f"No comparison connects these {len(found)} groups, so that each is rated by itself and ratings of different groups "
            f"say nothing of each other: {said}. Compare a model of each group with one of another."
        )
    rows: list[Rating] = []
    for number, group in enumerate(found):
        own = wins[np.ix_(group, group)]
        inside = [names[i] for i in group]
        if not rated(own):
            notes.append(_unbounded(own, inside))
        theta = strengths(filled(own, own))
        edges = _intervals([c for c in played if c.first in inside], inside, own, seed, resamples, level)
        for i in np.argsort(-theta, kind="stable").tolist():
            low, high = edges[i]
            games = int(round((own + own.T)[i].sum()))
            rows.append(Rating(inside[i], _points(theta[i]), low, high, games, float(own[i].sum()), number))
    return Ratings(tuple(rows), tuple(notes))


def _unbounded(wins: np.ndarray, names: Sequence[str]) -> str:
    """A note on why the likelihood of a connected group has no maximum."""
    lost, won = wins.sum(0) > 0, wins.sum(1) > 0
    who = [f"{name} never lost" for name, any_ in zip(names, lost, strict=True) if not any_]
    who += [f"{name} never won" for name, any_ in zip(names, won, strict=True) if not any_]
    return (
        f"{', '.join(who) or 'Some models never lost to any of the others'}: comparisons alone set no bound to such a rating. "
        "Half a win is added in both directions to every pair that was compared."
    )


def filled(wins: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """`wins` [..., N, N], where their likelihood has no maximum with half a win more in both directions of what was `compared`."""
    extra = 0.5 * ((compared + compared.T) > 0)
    return wins + np.where(rated(wins), 0.0, 1.0)[..., None, None] * extra


def _points(theta: float) -> float:
    return MEAN + SCALE * float(theta)


def _intervals(
    played: Sequence[Comparison], names: Sequence[str], wins: np.ndarray, seed: int, resamples: int, level: float
) -> list[tuple[float, float] | tuple[None, None]]:
    """Percentiles of each rating over resampled prompts; none where there is one prompt, or where resamples do not differ."""
    prompts = sorted({c.prompt for c in played})
    if len(prompts) < 2:
        return [(None, None)] * len(names)
    at, index, count = {p: i for i, p in enumerate(prompts)}, {n: i for i, n in enumerate(names)}, len(names)
    places = [(index[c.first], index[c.second]) for c in played]
    where = np.array([(i * count + j, j * count + i) for i, j in places]).ravel()
    value = np.array([(c.score, 1 - c.score) for c in played]).ravel()
    owner = np.repeat([at[c.prompt] for c in played], 2)
    found = [
        strengths(filled(drawn.reshape(-1, count, count), wins))
        for drawn in resampled(owner, where, value, count**2, seed, resamples)
    ]
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [(_points(a), _points(b)) if a < b else (None, None) for a, b in zip(low, high, strict=True)]


def resampled(
    owner: np.ndarray, where: np.ndarray, value: np.ndarray, size: int, seed: int, resamples: int
) -> Iterator[np.ndarray]:
    """float64 [b, size] a piece: sums over owners drawn with replacement. Entry k adds `value[k]` at `where[k]` for `owner[k]`."""
    rng = np.random.default_rng(seed)
    many = int(owner.max()) + 1
    step = max(1, CELLS // size)
    for start in range(0, resamples, step):
        times = rng.multinomial(many, np.full(many, 1 / many), size=min(step, resamples - start))
        yield np.stack([np.bincount(where, weights=value * drawn[owner], minlength=size) for drawn in times])
