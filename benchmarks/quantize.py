"""Quantization: single layers and generation in bf16, int8, int4, W8A8 and NF4, against peers; the time of each quantizer.

    python benchmarks/quantize.py                    # two cores: about 20 minutes on a quiet machine
    python benchmarks/quantize.py --quick            # does it run? the figures mean nothing
    python benchmarks/quantize.py --only layers      # a part: layers, generate, quantizers
    python benchmarks/quantize.py --write docs/benchmarks.md

Layers are timed cold, with one thread and with all; generation is that of `fettle chat`, on a random Llama. Peers are measured
where they run on this machine, else listed with the reason. The last line on stdout is JSON; `ratio` is the least speed-up of
int8 or int4, whichever is faster, over bf16 for one row of a large layer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a benchmark must not hide a library of its name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import quantize_arms, quantize_report
from benchmarks.command import DATA, workplace
from benchmarks.common import Children, emit, in_turn, leave, say, serve, versions
from benchmarks.quantize_arms import GRID

PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao")
PARTS = ("layers", "generate", "quantizers")
SHAPES = ((4096, 4096), (4096, 11008))  # outputs, inputs: o_proj and down_proj of a 7B Llama
ROWS = (1, 8, 128)  # decode, a small batch, a prompt
COLD = 128 << 20  # bytes of an arm's copies: several times the last cache
ARMS = ("bf16", "int8", "int4", "w8a8", "nf4")
QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {"kind": "rtn", "grid": GRID}, "nf4": {"kind": "nf4"}, "hqq": {"kind": "hqq", "grid": GRID},
    "gptq": {"kind": "gptq", "grid": GRID}, "awq": {"kind": "awq", "grid": GRID},
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    import os

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", default=str(DATA), help="instruction data: the calibration text")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each arm of generation, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="the most threads")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it; default: a temporary one")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/quantize"), help="for quantize-cpu.json and pictures"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put what was found on this page")
    asked = parser.parse_args()
    if asked.quick and asked.write:
        parser.error("--write: the figures of --quick mean nothing and go on no page")
    if asked.pairs < 1:
        parser.error("--pairs: at least one is needed")
    if asked.keep and asked.keep.exists() and any(asked.keep.iterdir()):
        parser.error(f"--keep: {asked.keep} is not empty; give a new folder")
    return asked


def layers(asked: argparse.Namespace, children: Children) -> list[dict[str, Any]]:
    """Each shape with one thread and with all."""
    found = []
    for threads in sorted({1, asked.threads}):
        alone = Children(children.script, children.folder / f"threads-{threads}", threads)
        for shape in ((256, 512),) if asked.quick else SHAPES:
            say(f"layers of {shape[0]} x {shape[1]}, {threads} threads")
            job = {"shape": shape, "rows": ROWS, "rounds": 9, "seconds": 0.05, "cold": COLD}
            job |= {"rounds": 3, "seconds": 0.001, "cold": 0} if asked.quick else {}
            found.append({"shape": shape, "threads": threads, **alone("layers", **job)})
    return found


def generation(asked: argparse.Namespace, children: Children) -> dict[str, Any]:
    """Every arm in turn, each time in a fresh process."""
    size = "test" if asked.quick else "100m"
    job = {"folder": children.folder / size, "size": size, "quick": asked.quick}
    made = children("prepare", **job, data=asked.data)
    job |= {"batches": (1, 8), "turns": 1 if asked.quick else 2}
    job |= {"prompt": 32, "new": 4} if asked.quick else {"prompt": 256, "new": 64}
    pairs = 1 if asked.quick else asked.pairs

    def run(arm: str) -> dict[str, Any]:
        say(f"generation: {arm}")
        return children("generate", **job, arm=arm)

    runs = in_turn(pairs, {arm: lambda arm=arm: run(arm) for arm in ARMS})  # type: ignore[misc]
    return {"size": size, "made": made, "prompt": job["prompt"], "new": job["new"], "runs": runs}


def quantizers(asked: argparse.Namespace, children: Children) -> dict[str, Any]:
    """Every method on models of growing size."""
    samples, length = (2, 128) if asked.quick else (32, 512)
    found: dict[str, Any] = {"samples": samples, "length": length, "sizes": {}}
    for size in ("test",) if asked.quick else ("40m", "100m"):
        job = {"folder": children.folder / size, "size": size}
        made = children("prepare", **job, data=asked.data)
        found["sizes"][size] = {"made": made, "methods": {}}
        for name, edit in QUANTIZERS.items():
            say(f"quantizing {size}: {name}")
            found["sizes"][size]["methods"][name] = children(
                "quantizer", **job, edit=edit, samples=samples, length=length, quick=asked.quick
            )
    return found


def main() -> None:
    """Measure the parts that were asked for, report."""
    asked = arguments()
    with workplace(asked, __file__) as (children, where):
        measure = {"layers": layers, "generate": generation, "quantizers": quantizers}
        found = {part: measure[part](asked, children) for part in PARTS if part in asked.only}
        result = quantize_report.summary(asked, {"machine": where, "versions": versions(*PACKAGES)}, found)
        leave(asked, result, quantize_report.section)
        emit(quantize_report.line(result))


TASKS = {
    "layers": quantize_arms.layers, "prepare": quantize_arms.prepare, "generate": quantize_arms.generate,
    "quantizer": quantize_arms.quantizer,
}  # fmt: skip

if __name__ == "__main__" and not serve(TASKS):
    main()
