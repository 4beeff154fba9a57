"""The four verdicts on quantization, each 'holds', 'does not hold' or 'inconclusive', with what was measured.

    1  INT8 weight-only is nearly lossless                  perplexity rises by 0.5% at most
    2  low bits depend on the method                        the methods' spread of nats a token widens from 8 to 4, 3 and 2 bits
    3  activations are harder than weights                  W16A8 loses more than W8A16
    4  tuning recovers what rounding lost                   a tuned model loses less to rounding where rounding was in its training

A verdict rests on nats a token, L = log perplexity, over windows of one held-out text, which are drawn anew with replacement, the same
ones for all arms (a paired bootstrap); arms over several seeds count by their mean. It holds where the whole 95% interval
agrees, does not hold where the whole interval disagrees, and is inconclusive between, or where no arm was run for it. Of a verdict
with several comparisons each must hold, and one that does not is enough against it.

Recovery (4) is (L_rounded - L_trained) / (L_rounded - L_tuned): against a control that was tuned equally and never rounded, and that
control rounded afterwards. Against the untuned model it would be mixed up with learning the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 4_000
LOSSLESS = 0.005  # of perplexity
METHODS = ("rtn", "hqq", "awq", "gptq")
HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"
Row = dict[str, Any]
Statistic = Callable[[np.ndarray], np.ndarray]


class Losses:
    """Nats a token of every arm, on the text as it is and on texts drawn from it."""

    def __init__(self, rows: Sequence[Row], seed: int = 0) -> None:
        self.rows = {
            row["arm"]: row for row in rows if row["seed"] == min(r["seed"] for r in rows if r["arm"] == row["arm"])
        }
        counts = np.array([n for _, n in rows[0]["windows"]], dtype=np.float64)
        windows = len(counts)
        drawn = np.random.default_rng(seed).multinomial(windows, np.full(windows, 1 / windows), size=DRAWS)
        texts = np.concatenate([np.ones((1, windows)), drawn])
        self._of = {}
        for arm in self.rows:
            sums = np.mean([[nats for nats, _ in r["windows"]] for r in rows if r["arm"] == arm], axis=0)
            self._of[arm] = (texts @ sums) / (texts @ counts)

    def __getitem__(self, row: Row) -> np.ndarray:
        """[1 + DRAWS], the text itself first."""
        found: np.ndarray = self._of[row["arm"]]
        return found

    def pick(self, **wanted: Any) -> list[Row]:
        """The arms with these facts."""
        return [row for row in self.rows.values() if all(row.get(key) == value for key, value in wanted.items())]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(of the text, low, high)."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def judged(values: np.ndarray, least: float = 0.0) -> str:
    """Whether a figure is over `least`."""
    _, low, high = interval(values)
    return HOLDS if low > least else FAILS if high <= least else OPEN


def together(each: Sequence[str]) -> str:
    """One verdict of several comparisons."""
    return OPEN if not each else FAILS if FAILS in each else HOLDS if set(each) == {HOLDS} else OPEN


def said(values: np.ndarray, form: str = "+.4f") -> str:
    """A figure with its interval."""
    mean, low, high = interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All four; the first row is the full model's."""
    losses = Losses(rows)
    (full,) = losses.pick(stage=None)
    found = [
        ("INT8 weight-only is nearly lossless (perplexity +0.5% at most)", lossless(losses, full)),
        ("low bits depend on the method: the spread widens as bits fall", spreads(losses, full)),
        ("activations are harder than weights", harder(losses, full)),
        ("tuning recovers what rounding lost", recovered(losses, rows)),
    ]
    return [{"says": what, "verdict": verdict, "evidence": lines} for what, (verdict, lines) in found]


def weight_only(row: Row) -> bool:
    """Whether nothing but weights is rounded, of a model that nothing else was done to."""
    plain = not (row.get("smoothed") or row.get("outliers") or row.get("after"))
    return (
        row["stage"] == "quantize"
        and plain
        and row["bits"] is not None
        and row["activations"] is None
        and row["cache"] is None
    )


def lossless(losses: Losses, full: Row) -> tuple[str, list[str]]:
    """1: of every way to hold weights in 8 bits."""
    arms = [row for row in losses.pick(bits=8) if weight_only(row)]
    each, lines = [], []
    for row in arms:
        rise = np.exp(losses[row] - losses[full]) - 1
        each.append(judged(LOSSLESS - rise))
        lines.append(f"{row['arm']}: perplexity {100 * rise[0]:+.3f}% ({_percent(rise)}): {each[-1]}")
    return together(each), lines


def _percent(values: np.ndarray) -> str:
    _, low, high = interval(values)
    return f"{100 * low:+.3f}% to {100 * high:+.3f}%"


def spreads(losses: Losses, full: Row) -> tuple[str, list[str]]:
    """2: from the best method to the worst, at each number of bits; methods with one group, so that scales cost the same."""
    arms = [row for row in losses.rows.values() if weight_only(row) and row["name"] in METHODS]
    groups = sorted({row["group"] for row in arms}, key=str)
    each, lines = [], []
    for group in groups:
        by_bits = {
            b: [r for r in arms if r["group"] == group and r["bits"] == b]
            for b in sorted({r["bits"] for r in arms}, reverse=True)
        }
        by_bits = {b: found for b, found in by_bits.items() if len({r["name"] for r in found}) >= 3}
        wide = {}
        for bits, found in by_bits.items():
            all_of = np.stack([losses[row] for row in found])
            wide[bits] = all_of.max(0) - all_of.min(0)
            order = sorted(found, key=lambda row: losses[row][0])
            rises = ", ".join(f"{row['name']} {losses[row][0] - losses[full][0]:+.4f}" for row in order)
            lines.append(f"{bits} bits, group {group}: spread {said(wide[bits])} nats a token; {rises}")
        for more, fewer in zip(list(wide)[:-1], list(wide)[1:], strict=True):
            apart = wide[fewer] - wide[more]
            each.append(judged(apart))
            lines.append(f"wider at {fewer} bits than at {more}: {said(apart)}: {each[-1]}")
    return together(each), lines


def harder(losses: Losses, full: Row) -> tuple[str, list[str]]:
    """3: W16A8 against W8A16 decides, plain and with injected outliers; what W8A8 and smoothing come to stands beside it."""
    each, lines = [], []
    for outliers in (False, True):
        where = "with injected outliers" if outliers else "as it is"
        weights = [
            r
            for r in losses.pick(
                name="outliers+rtn" if outliers else "rtn", bits=8, activations=None, cache=None, after=None
            )
            if r["stage"] == "quantize"
        ]
        alone = [r for r in losses.pick(bits=None, activations=8, outliers=outliers) if not r["smoothed"]]
        for row in alone:
            for other in weights[:1]:
                apart = losses[row] - losses[other]
                each.append(judged(apart))
                lines.append(f"{where}, A8 a {row['by']}: W16A8 loses more than W8A16: {said(apart)}: {each[-1]}")
        both = [
            r
            for r in losses.pick(bits=8, activations=8, outliers=outliers, after=None)
            if r["stage"] == "quantize" and "rtn" in r["name"]
        ]
        for row in both:
            smoothed = "smoothed" if row["smoothed"] else "not smoothed"
            lines.append(f"{where}, W8A8 a {row['by']}, {smoothed}: {said(losses[row] - losses[full])} nats a token")
        for row in both:
            for other in [r for r in both if r["smoothed"] and not row["smoothed"] and r["by"] == row["by"]]:
                gain = losses[row] - losses[other]
                lines.append(f"{where}, A8 a {row['by']}: smoothing helps: {said(gain)}: {judged(gain)}")
    return together(each), lines


def recovered(losses: Losses, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """4: every arm that trained with rounding, beside its control tuned equally and that control rounded the same way."""
    each, lines = [], []
    for row in losses.rows.values():
        if row["stage"] != "tune" or row["bits"] is None:
            continue
        same = {key: row[key] for key in ("bits", "activations", "group", "cache")}
        for rounded in (r for r in losses.pick(stage="quantize", **same) if r["after"] in losses.rows):
            control = losses.rows[rounded["after"]]
            gain, lost = losses[rounded] - losses[row], losses[rounded] - losses[control]
            share = np.divide(gain, lost, out=np.full_like(gain, np.nan), where=lost > 0)
            over = f"; over seeds {_seeds(rows, rounded, row, control)}" if len({r["seed"] for r in rows}) > 1 else ""
            each.append(judged(gain))
            lines.append(
                f"{row['arm']} against {rounded['arm']}: {said(gain)} nats a token: {each[-1]}; {share[0]:.2f} of what rounding cost the "
                f"control '{control['arm']}' ({said(lost)}){over}"
            )
    return together(each), lines


def _seeds(rows: Sequence[Row], rounded: Row, trained: Row, control: Row) -> str:
    """The share recovered by seed."""
    nats = {(r["arm"], r["seed"]): np.log(r["perplexity"]) for r in rows}
    shares = []
    for arm, seed in nats:
        if arm == trained["arm"] and (rounded["arm"], seed) in nats and (control["arm"], seed) in nats:
            worst, best = nats[rounded["arm"], seed], nats[control["arm"], seed]
            shares.append((worst - nats[arm, seed]) / (worst - best) if worst > best else float("nan"))
    return ", ".join(f"{share:.2f}" for share in shares)
