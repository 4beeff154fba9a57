"""What every benchmark shares: children to measure in, turns, statistics, memory, the matmul peak, a header, a page.

A benchmark is a script with tasks. The parent imports no torch and measures nothing: each measurement is a task in a
process of its own, so that none inherits the memory, the warmed kernels or the threads of another:

    def main(): ...                         # benchmark = Children(__file__, folder, threads); benchmark("ours", steps=8)
    if __name__ == "__main__" and not serve({"ours": ours, "theirs": theirs}):
        main()
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

Task = Callable[[dict[str, Any]], Any]
ROOT = Path(__file__).resolve().parent.parent

# Dense bf16 peaks of the makers' data sheets, FLOP/s, by a part of the name that the driver reports.
DATA_SHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


# Children.


def serve(tasks: Mapping[str, Task]) -> bool:
    """Run one task where the command line says `--child JOB RESULT`; whether it did."""
    if sys.argv[1:2] != ["--child"]:
        return False
    job = json.loads(Path(sys.argv[2]).read_text())
    result = tasks[job.pop("task")](job)
    Path(sys.argv[3]).write_text(json.dumps(result))
    return True


class Children:
    """Runs tasks of `script`, each in a fresh process of `threads` threads; what they print goes to `folder`/logs."""

    def __init__(self, script: str | Path, folder: Path, threads: int) -> None:
        self.script, self.folder, self.threads = Path(script), folder, threads
        self.count = 0
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def __call__(self, task: str, **job: Any) -> Any:
        """The task's result. Ends the benchmark with the end of the task's output where it fails."""
        self.count += 1
        stem = self.folder / "logs" / f"{self.count:02d}-{task}"
        asked, answered, said = (stem.with_suffix(end) for end in (".job.json", ".result.json", ".log"))
        asked.write_text(json.dumps({"task": task, **job}, default=str))
        with open(said, "w") as log:
            done = subprocess.run(
                [sys.executable, str(self.script), "--child", str(asked), str(answered)],
                stdout=log, stderr=subprocess.STDOUT, env=self._environment(), check=False,
            )  # fmt: skip
        if done.returncode or not answered.exists():
            fail(f"{task} failed ({done.returncode}); the end of {said}:\n{said.read_text()[-3000:]}")
        return json.loads(answered.read_text())

    def _environment(self) -> dict[str, str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        caches = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.folder / "datasets")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
        return os.environ | threads | caches | quiet


def in_turn(pairs: int, arms: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each arm once, `pairs` times over: A B A B ... What drifts (clock, heat, a neighbour) then falls on both."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for _ in range(pairs):
        for name, measure in arms.items():
            found[name].append(measure())
    return found


def take_turns(
    children: Children, pairs: int, job: dict[str, Any], settings: Mapping[str, Any],
    check: Callable[[str, dict[str, Any], Any], None], name: str = "fettle",
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """fettle, and TRL at each of some settings, in turn; check(side, run, setting) ends the benchmark where a run is not what was asked."""
    numbers = count(1)

    def ours() -> dict[str, Any]:
        number = next(numbers)
        say(f"{name}: measurement {number} of {pairs} of each side")
        run = children("run_fettle", **job | {"output": f"{job['output']}/{name}-{number}"})
        check("fettle", run, None)
        return run

    def theirs(setting: Any) -> dict[str, Any]:
        run = children("run_trl", **job, setting=asdict(setting))
        check("TRL", run, setting)
        return run

    return in_turn(pairs, {"fettle": ours} | {arm: partial(theirs, setting) for arm, setting in settings.items()})


def fastest(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """TRL's setting of the least time a step, as its fields; ends the benchmark where none trained."""
    timed = [row for row in found if "seconds" in row]
    if not timed:
        fail(f"TRL trained with none of its settings: {json.dumps(found)}")
    return dict(min(timed, key=lambda row: row["seconds"])["setting"])


def play_off(children: Children, job: dict[str, Any], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fastest setting after the two fastest were timed once more: a noisy moment in a few steps must not choose.

    The lesser of both times stays in `found`.
    """
    first = fastest(found)
    others = [row for row in found if "seconds" in row and row["setting"] != first]
    if not others:
        return first
    for again in children("calibrate", **job, settings=[fastest(others), first]):
        row = next(row for row in found if row["setting"] == again["setting"])
        row["seconds"] = min(row["seconds"], again.get("seconds", row["seconds"]))
    return fastest(found)


def say(sentence: str) -> None:
    """A line about how far the benchmark is; stdout is kept for the result."""
    print(f"[{time.strftime('%H:%M:%S')}] {sentence}", file=sys.stderr, flush=True)


def fail(sentence: str) -> NoReturn:
    """End the benchmark: its figures would be wrong or there are none."""
    print(sentence, file=sys.stderr)
    raise SystemExit(1)


# Statistics.


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the least and the most of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ",.0f") -> str:
        """'median (low - high)'."""
        return f"{self.median:{form}} ({self.low:{form}} - {self.high:{form}})"

    def plain(self) -> dict[str, float]:
        """As JSON writes it."""
        return asdict(self)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of the quotients of neighbours: measurement i of ours over measurement i of theirs."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def steady(marks: Sequence[float], tokens: Sequence[int], warmup: int) -> float:
    """Tokens a second after `warmup` steps. marks[i]: the time at which step i ended; tokens[i]: what it held.

    The clock runs from the end of the last warm-up step to the end of the last step, so that reading data, logging
    and whatever else lies between two steps is counted.
    """
    if not 1 <= warmup < len(marks) == len(tokens):
        raise ValueError(
            f"{len(marks)} marks, {len(tokens)} counts and {warmup} warm-up steps leave nothing to measure"
        )
    return sum(tokens[warmup:]) / (marks[-1] - marks[warmup - 1])


def closeness(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How far two curves lie apart, as a share of the second: the mean and the largest over the steps."""
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return {"mean": statistics.fmean(apart), "largest": max(apart)}


# Inside a child.


def clock(cuda: bool = False) -> float:
    """Seconds, once all that was asked of the GPU is done."""
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(cuda: bool = False) -> int:
    """The most bytes that this process held: resident (VmHWM), or allocated on the GPU."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the peak of resident memory is read from /proc/self/status, which only Linux has")


def matmul_peak(job: dict[str, Any]) -> dict[str, Any]:
    """The most FLOP/s that a square matrix product reaches here, in the dtype that fettle takes by default."""
    import torch

    from fettle.models.load import pick_device, pick_dtype

    device = pick_device(job["device"])
    dtype = pick_dtype("auto", device)
    cuda = device.type == "cuda"
    best: dict[int, float] = {}
    for size in (4096, 8192, 16384) if cuda else (1024, 2048, 3072):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        times: list[float] = []
        until = time.perf_counter() + job["seconds"]
        while len(times) < 4 or time.perf_counter() < until:
            began = clock(cuda)
            torch.mm(a, b, out=out)
            times.append(clock(cuda) - began)
        best[size] = 2 * size**3 / min(times)
    return {"dtype": str(dtype).removeprefix("torch."), "flops": max(best.values()), "by_size": best}


# Where and with what.


def machine(threads: int) -> dict[str, Any]:
    """The hardware, as far as the system tells."""
    cpus = _lines("/proc/cpuinfo")
    name = next((line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in cpus if line.startswith("flags")), [])
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": f"{name}, {len(os.sched_getaffinity(0))} cores", "threads": threads,
        "bf16_units": sorted({"avx512_bf16", "amx_bf16"} & set(flags)), "memory_gib": round(memory / 2**20, 1),
        "gpu": gpu_name(), "system": f"{platform.system()} {platform.release()}", "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def gpu_name() -> str | None:
    """What nvidia-smi calls the first GPU; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0].strip() if found else None


def versions(*packages: str) -> dict[str, str]:
    """Of Python, fettle (with its commit) and the packages that are installed."""
    found = {"python": platform.python_version(), "fettle": f"{metadata.version('fettle')} ({_commit()})"}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        commit, changed = (
            subprocess.run([*git, *rest], capture_output=True, text=True, check=True).stdout.strip()
            for rest in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "src", "benchmarks"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return commit + (", changed" if changed else "")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# What is left to read.


def heading(result: Mapping[str, Any]) -> str:
    """The command, the date, the hardware and the versions of a result, as a page begins with them."""
    where = result["machine"]
    gpu = f"{where['gpu']}; " if result["device"] == "cuda" else ""
    return (
        f"`{result['command']}`, {result['date']}. {gpu}{where['cpu']}, {where['threads']} threads, {where['memory_gib']} GiB; "
        f"{where['system']}; load before: {where['load']}. "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + "."
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` on a page. Ends the benchmark where they are missing."""
    before, opened, rest = page.read_text().partition(f"<!-- {name} -->")
    _, closed, after = rest.partition(f"<!-- /{name} -->")
    if not opened or not closed:
        fail(f"{page}: has no place '<!-- {name} --> ... <!-- /{name} -->' for the figures")
    page.write_text(f"{before}{opened}\n{text.strip()}\n{closed}{after}")


def leave(
    asked: argparse.Namespace,
    result: dict[str, Any],
    section: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Write the JSON and the picture, print the section, put both on the page that was asked for."""
    asked.output.mkdir(parents=True, exist_ok=True)
    stem = f"{result['benchmark']}-{result['device']}"
    (asked.output / f"{stem}.json").write_text(json.dumps(result, indent=1))
    picture = asked.output / f"{stem}.png"
    if draw is not None:
        draw(result, picture)
    text = section(result)
    print(text + "\n")
    say(f"wrote {asked.output / stem}.json" + (" and .png" if draw is not None else ""))
    if asked.write is not None:
        fill(asked.write, stem, text)
        if draw is not None:
            shutil.copy(picture, asked.write.parent / picture.name)
        say(f"filled '{stem}' in {asked.write}")


def emit(result: dict[str, Any]) -> None:
    """The result as one line of JSON, the last on stdout."""
    print(json.dumps(result), flush=True)
