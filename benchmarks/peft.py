"""LoRA: fettle's layer and PEFT's inside one loop; and a batch of several adapters against one adapter at a time.

    python benchmarks/peft.py                    # two cores: about 10 minutes on a quiet machine
    python benchmarks/peft.py --quick            # does it run? the figures mean nothing
    python benchmarks/peft.py --write docs/benchmarks.md

Model, forest batches, loop and optimizer are fettle's in every arm; only who puts the LoRA in differs. PEFT runs in each of
its settings, with and without dropout, and fettle is compared with each. The last line on stdout is JSON: `ratio` is the
least speed-up over any setting, `memory_ratio` the greatest share of any setting's activation memory.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peft_arms, peft_report
from benchmarks.command import arguments, workplace
from benchmarks.common import Children, emit, fail, in_turn, leave, say, serve, versions
from benchmarks.peft_arms import OURS, SETTINGS

PACKAGES = ("torch", "transformers", "peft")
DROPOUTS = (0.0, 0.1)
COUNTS = (2, 4, 8)  # of adapters
TEXTS = {"requests": 16, "length": 64, "new": 32}


def train(children: Children, pairs: int, job: dict[str, Any]) -> dict[str, Any]:
    """One dropout: what each setting saves for the backward pass, then the steps, every setting in turn."""
    saved = {str(s): children("saved", **job, setting=asdict(s)) for s in SETTINGS}
    done = iter(range(1, pairs * len(SETTINGS) + 1))

    def run(setting: peft_arms.Setting) -> dict[str, Any]:
        number = next(done)
        say(f"dropout {job['dropout']}: {setting} ({number} of {pairs * len(SETTINGS)})")
        output = children.folder / f"out-{job['dropout']}-{number}"
        return children("train", **job, setting=asdict(setting), output=output)

    runs = in_turn(pairs, {str(s): lambda s=s: run(s) for s in SETTINGS})  # type: ignore[misc]
    check(runs, job)
    return {"saved": saved, "runs": runs}


def check(runs: dict[str, list[dict[str, Any]]], job: dict[str, Any]) -> None:
    """End the benchmark where the arms did not do the same work."""
    ours = runs[OURS][0]
    for name, one in ((name, one) for name, of in runs.items() for one in of):
        if len(one["marks"]) != job["steps"] or one["trained"] != ours["trained"] or one["tokens"] != ours["tokens"]:
            fail(f"{name}: {len(one['marks'])} steps, {one['trained']} weights, tokens {one['tokens']}; not fettle's")
        if abs(one["loss"][0] - ours["loss"][0]) > 0.01 * ours["loss"][0]:
            fail(f"{name}: the first loss is {one['loss'][0]}, fettle's {ours['loss'][0]}; the start is another")


def route(children: Children, asked: Any, job: dict[str, Any]) -> dict[int, Any]:
    """By the number of adapters."""
    texts = {"requests": 8, "length": 16, "new": 4} if asked.quick else TEXTS
    found = {}
    for count in COUNTS:
        say(f"a batch of {count} adapters")
        found[count] = children("route", **job, **texts, adapters=count, pairs=max(3, asked.pairs))
    return found


def main() -> None:
    """Prepare, measure in turn, report."""
    asked = arguments(__doc__, "peft")
    with workplace(asked, __file__) as (children, where):
        job = {"folder": children.folder, "device": asked.device, "steps": asked.steps, "tokens": asked.tokens}
        say("preparing the model and the data")
        made = children("prepare", **job, data=asked.data, size=asked.size)
        trained = {p: train(children, asked.pairs, job | {"dropout": p}) for p in DROPOUTS}
        routed = route(children, asked, job)
        facts = {"machine": where, "versions": versions(*PACKAGES), "made": made}
        result = peft_report.summary(asked, facts, trained, routed)
        leave(asked, result, peft_report.section)
        emit(peft_report.line(result))


def routed_batch(job: dict[str, Any]) -> dict[str, Any]:
    """`peft_routed.route`, whose file needs torch, which the parent does not load."""
    from benchmarks import peft_routed

    return peft_routed.route(job)


TASKS = {
    "prepare": peft_arms.prepare, "train": peft_arms.train, "saved": peft_arms.saved, "route": routed_batch,
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
