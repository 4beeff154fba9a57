"""Generation: fettle's engine and transformers.generate in turn, on the same model, requests, lengths of answers and dtype.

    python benchmarks/generate.py                    # two cores: about 15 minutes on a quiet machine
    python benchmarks/generate.py --quick            # does it run? the figures mean nothing
    python benchmarks/generate.py --write docs/benchmarks.md

The requests are the questions of a data file, their answers as long as the answers in the file (`uneven`), or all of one
length (`even`); no token ends one. At most 16 run at once. transformers gets the fastest of its settings, found first: dynamic
or static cache, eager or sdpa attention (on a GPU flash attention too, where it is installed), requests in their order or by
the length of their prompts. Each measurement is a process of its own. The last line on stdout is JSON; `ratio` is the worst
of the models with uneven lengths.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import generate_arms
from benchmarks.command import arguments, shown, workplace
from benchmarks.common import Children, Spread, emit, fail, heading, in_turn, leave, ratios, say, serve, table, versions
from benchmarks.generate_arms import LOADS, settings

PACKAGES = ("torch", "transformers")
ALIKE = 0.97  # share of tokens, in float32, up to which a text must be the other side's; random weights come near ties


def measure(children: Children, asked: argparse.Namespace, job: dict[str, Any]) -> list[dict[str, Any]]:
    """One model: the texts, transformers' best setting, then the pairs of each load."""
    size = job["size"]
    say(f"{size}: comparing texts, looking for transformers' fastest setting")
    alike = children("alike", **job, load="uneven")["share"]
    if alike < ALIKE:
        fail(f"{size}: only {alike:.1%} of the tokens are written alike in float32")
    search = job | {"first": asked.search, "load": "uneven"}
    tried = [children("run_transformers", **search, setting=s) for s in settings(asked.device)]
    best = max((row for row in tried if "error" not in row), key=lambda row: row["rate"])["setting"]
    say(f"{size}: transformers' fastest is {', '.join(best.values())}")
    found = []
    for load in LOADS:
        say(f"{size}, {load}: {asked.pairs} pairs")
        arms = {
            "fettle": partial(children, "run_fettle", **job, load=load),
            "transformers": partial(children, "run_transformers", **job, load=load, setting=best),
        }
        runs = in_turn(asked.pairs, arms)
        found.append({"size": size, "load": load, "alike": alike, "tried": tried, "best": best, "runs": runs})
    return found


def summary(asked: argparse.Namespace, facts: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures of a run, as JSON can hold them."""
    rows = []
    for one in found:
        rates, peaks, shares = (
            {name: [run[key] for run in runs] for name, runs in one["runs"].items()} for key in ("rate", "peak", "busy")
        )
        rows.append({
            **{key: one[key] for key in ("size", "load", "alike", "tried", "best")},
            "tokens_per_second": {name: Spread.of(values).plain() for name, values in rates.items()},
            "ratio": ratios(rates["fettle"], rates["transformers"]).plain(),
            "peak_bytes": {name: Spread.of(values).plain() for name, values in peaks.items()},
            "memory_ratio": ratios(peaks["fettle"], peaks["transformers"]).plain(),
            "processor_share": min(min(values) for values in shares.values()),
        })  # fmt: skip
    uneven = [row for row in rows if row["load"] == "uneven"]
    return {
        "benchmark": "generate", "date": time.strftime("%Y-%m-%d"), "quick": asked.quick, "device": asked.device,
        "command": shown("benchmarks/generate.py"), "data": Path(asked.data).name, "pairs": asked.pairs, **facts,
        "ratio": min(row["ratio"]["median"] for row in uneven),
        "memory_ratio": max(row["memory_ratio"]["median"] for row in rows), "rows": rows,
    }  # fmt: skip


def section(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = []
    for row in result["rows"]:
        rate, peak = row["tokens_per_second"], row["peak_bytes"]
        sides = ("fettle", "transformers")
        lines.append([
            f"{row['size']}, {row['load']}: tokens/s", *(Spread(**rate[k]).text() for k in sides),
            f"**{Spread(**row['ratio']).text('.2f')}**",
        ])  # fmt: skip
        lines.append([
            f"{row['size']}, {row['load']}: peak memory, MiB", *(f"{peak[k]['median'] / 2**20:,.0f}" for k in sides),
            Spread(**row["memory_ratio"]).text(".2f"),
        ])  # fmt: skip
    models = [row for row in result["rows"] if row["load"] == "uneven"]
    tried = [
        [", ".join(row["setting"].values()), *(_tried(one, i) for one in models)]
        for i, row in enumerate(models[0]["tried"])
    ]
    long = result["lengths"]
    least = min(row["processor_share"] for row in result["rows"])
    alike = min(row["alike"] for row in result["rows"])
    parts = [
        heading(result),
        f"{result['requests']} requests of {result['data']}, 16 at once, {result['dtype']}, greedy, {result['pairs']} pairs. "
        f"Answers: uneven, {long['least']} to {long['most']} tokens, median {long['median']}; even, {result['even']}. The processes had at least {least:.0%} of the "
        f"processor time that their threads could have had. In float32 {alike:.1%} of the tokens are alike.",
        table(["median (least - most)", "fettle", "transformers, its best setting", "fettle / transformers"], lines),
        table(
            ["transformers' settings, tokens/s over two batches", *(f"{row['size']}, uneven" for row in models)], tried
        ),
    ]
    if result["quick"]:
        parts.insert(0, "**--quick: these figures mean nothing.**")
    return "\n\n".join(parts)


def _tried(row: dict[str, Any], index: int) -> str:
    one = row["tried"][index]
    text = one.get("error") or f"{one['rate']:,.0f}"
    return f"**{text}**" if one["setting"] == row["best"] else text


def main() -> None:
    """Prepare, compare texts, find transformers' best setting, measure in turn, report."""
    asked = arguments(__doc__, "generate")
    asked.search = 16 if asked.quick else 32
    with workplace(asked, __file__) as (children, where):
        sizes = ["test"] if asked.quick else ["fettle/tiny", asked.size]
        job: dict[str, Any] = {"folder": children.folder, "device": asked.device}
        made = children(
            "prepare", **job, data=asked.data, size=sizes[-1], sizes=sizes, count=24 if asked.quick else 128
        )
        found = [row for size in sizes for row in measure(children, asked, job | {"size": size})]
        facts = {"machine": where, "versions": versions(*PACKAGES), **made}
        result = summary(asked, facts, found)
        leave(asked, result, section)
        rows = {
            f"{row['size']}, {row['load']}": {
                "ratio": {k: round(v, 3) for k, v in row["ratio"].items()}, "memory_ratio": round(row["memory_ratio"]["median"], 3),
                "tokens_per_second": {k: round(v["median"], 1) for k, v in row["tokens_per_second"].items()},
            }
            for row in result["rows"]
        }  # fmt: skip
        emit({k: result[k] for k in ("benchmark", "quick", "device", "ratio", "memory_ratio")} | rows)


TASKS = {
    "prepare": generate_arms.prepare, "alike": generate_arms.alike, "run_fettle": generate_arms.run_fettle,
    "run_transformers": generate_arms.run_transformers,
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
