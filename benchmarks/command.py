"""The command line that benchmarks of training share, and the folder that one works in."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import ROOT, Children, fail, gpu_name, machine, say
from benchmarks.material import SIZES

DATA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"


def arguments(doc: str, name: str, data: Path = DATA) -> argparse.Namespace:
    """The command line of the benchmark `name`, which reads `data`. What depends on the device is filled in."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", default=str(data), help=f"data such as {data.name}")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of each side, in turn")
    parser.add_argument("--steps", type=int, help="optimizer steps of a measurement; default: 8 on a CPU, 40 on a GPU")
    parser.add_argument(
        "--warmup", type=int, help="of these, steps that do not count; default: 2 on a CPU, 10 on a GPU"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size", choices=sorted(SIZES), help="of the model; default: 40m on a CPU, 1b on a GPU")
    parser.add_argument("--tokens", type=int, help="of a step; default: fettle's own on a CPU, 16384 on a GPU")
    parser.add_argument("--quick", action="store_true", help="a few steps of a very small model, to see that it runs")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it; default: a temporary one")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks") / name, help=f"for {name}-<device>.json and pictures"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put what was found on this page")
    asked = parser.parse_args()
    if asked.device == "auto":
        asked.device = "cuda" if gpu_name() else "cpu"
    cuda = asked.device == "cuda"
    if asked.quick:
        asked.pairs, asked.steps, asked.warmup = 1, 3, 1
        asked.size, asked.tokens = asked.size or "test", asked.tokens or 1024
    asked.size = asked.size or ("1b" if cuda else "40m")
    asked.tokens = asked.tokens or (16384 if cuda else None)
    asked.steps, asked.warmup = asked.steps or (40 if cuda else 8), asked.warmup or (10 if cuda else 2)
    if asked.quick and asked.write:
        parser.error("--write: the figures of --quick mean nothing and go on no page")
    if not 1 <= asked.warmup < asked.steps:
        parser.error(f"--warmup: {asked.warmup} of {asked.steps} steps leave nothing to measure")
    if asked.pairs < 1:
        parser.error("--pairs: at least one pair is needed")
    if asked.keep and asked.keep.exists() and any(asked.keep.iterdir()):
        parser.error(f"--keep: {asked.keep} is not empty; give a new folder")
    return asked


def shown(script: str) -> str:
    """The command line without the page that it writes to and the folder that it works in."""
    words = sys.argv[1:]
    drop = {i + k for i, word in enumerate(words) if word in ("--write", "--keep", "--output") for k in (0, 1)}
    return shlex.join(["python", script, *(word for i, word in enumerate(words) if i not in drop)])


@contextmanager
def workplace(asked: argparse.Namespace, script: str) -> Iterator[tuple[Children, dict]]:
    """Children that work in a folder which goes in the end (unless --keep), and the machine. Ends where there is no data."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no child outlives it
    if not Path(asked.data).exists():
        fail(f"{asked.data}: no such file; name one with --data")
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="fettle-bench-"))
    try:
        where = machine(asked.threads)
        if where["load"] > 0.5 and not asked.quick:
            say(f"the load average is {where['load']}: something else runs here, and the figures will suffer from it")
        yield Children(Path(script).resolve(), folder.resolve(), asked.threads), where
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
