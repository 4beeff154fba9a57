"""What a run leaves to look at: metrics.jsonl, TensorBoard events, a progress bar, loss.png."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fettle.core.files import make_folder, new_file, writing
from fettle.models.memory import measure_peak

METRICS, BOARD = "metrics.jsonl", "tensorboard"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one an optimizer step; a torn last line is left out."""
    path = folder / METRICS
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
    return rows


class Spent:
    """Time and memory of a run, over all the processes that it takes: `resumed` is the folder of one that goes on."""

    def __init__(self, resumed: Path | None = None) -> None:
        before = (read_metrics(resumed) if resumed else []) or [{}]
        self._began = time.time() - before[-1].get("elapsed", 0.0)
        self._peak = before[-1].get("peak_bytes", 0)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its processes."""
        return time.time() - self._began

    def peak(self, device: torch.device) -> int:
        """Most bytes that one of its processes held."""
        return max(self._peak, measure_peak(device))


class Log:
    """Writes a row a step, from `start` on; rows of steps that are run again are dropped first."""

    def __init__(self, folder: Path, start: int, quiet: bool = False) -> None:
        self._path = make_folder(folder) / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= start]
        with new_file(self._path) as whole:
            whole.writelines(orjson.dumps(row) + b"\n" for row in kept)
        with writing(self._path):
            self._file = open(self._path, "ab")
        self._hook, threading.excepthook = threading.excepthook, _untold(threading.excepthook)
        with writing(folder / BOARD):
            self._board = _tensorboard(folder, start)
        self._console = Console(stderr=True, quiet=quiet)

    def row(self, values: dict[str, Any]) -> None:
        """One step's figures."""
        with writing(self._path):
            self._file.write(orjson.dumps(values) + b"\n")
            self._file.flush()
        if self._board is not None:
            with writing(self._path.with_name(BOARD)):
                for key, value in values.items():
                    if isinstance(value, float):
                        self._board.add_scalar(key, value, values["step"])

    def say(self, sentence: str) -> None:
        """A line above the progress bar."""
        self._console.print(sentence, highlight=False)

    @contextmanager
    def progress(self, start: int, steps: int) -> Iterator[Any]:
        """A progress bar; call what it gives with (step, text)."""
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("tune", total=steps, completed=start, text="")
            yield lambda step, text: bar.update(task, completed=step, text=text)

    def close(self) -> None:
        """Flush and close all files."""
        try:
            with writing(self._path):
                self._file.close()
            if self._board is not None:
                with writing(self._path.with_name(BOARD)):
                    self._board.close()
        finally:
            threading.excepthook = self._hook


def _untold(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for errors in threads that leaves out TensorBoard's, since it raises them again at the next write."""

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard"):
            before(args)

    return hook


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # the extra 'tensorboard' is not installed; metrics.jsonl has the same figures
    return SummaryWriter(str(folder / BOARD), purge_step=start + 1)


class Rate:
    """Useful tokens a second, over the last few steps."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]

    def add(self, tokens: int) -> float:
        """Count tokens; returns the rate now."""
        self._marks.append((time.perf_counter(), self._marks[-1][1] + tokens))
        del self._marks[:-20]
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / max(t1 - t0, 1e-9)

    def skip(self, seconds: float) -> None:
        """Do not count time just spent on something else."""
        self._marks = [(at + seconds, count) for at, count in self._marks]


def draw_loss(rows: list[dict[str, Any]], path: Path, unit: str = "token") -> None:
    """Loss by step with a running mean, the held-out loss where there is one, the learning rate beneath.

    `unit` is what the loss is counted in.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    steps = np.array([r["step"] for r in rows])
    loss = np.array([r["loss"] if r.get("loss") is not None else np.nan for r in rows], dtype=float)
    width = max(1, len(loss) // 30)
    sums, counts = np.cumsum(np.nan_to_num(loss)), np.cumsum(np.isfinite(loss))
    mean = (sums - np.concatenate([np.zeros(width), sums[:-width]])) / np.maximum(
        counts - np.concatenate([np.zeros(width), counts[:-width]]), 1
    )
    figure, (top, low) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=[4, 1], layout="constrained")
    top.plot(steps, loss, color="#b9c7d6" if width > 1 else "#1f4e79", lw=0.9, label="each step")
    if width > 1:
        top.plot(steps, mean, color="#1f4e79", lw=1.8, label=f"mean of {width} steps")
    if held := [(r["step"], r["validation_loss"]) for r in rows if r.get("validation_loss") is not None]:
        top.plot(*zip(*held, strict=True), color="#c2410c", lw=1.4, marker="o", ms=3.5, label="held-out")
    top.set_ylabel("loss (nats a token)" if unit == "token" else f"loss a {unit}")
    top.legend(frameon=False)
    low.plot(steps, [r["lr"] for r in rows], color="#a0522d", lw=1.2)
    low.set_ylabel("learning rate")
    low.set_xlabel("optimizer step")
    low.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in (top, low):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    with new_file(path) as handle:
        figure.savefig(handle, format="png", dpi=110)
    plt.close(figure)
