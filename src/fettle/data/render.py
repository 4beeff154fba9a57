"""Templates rendered apart: a process that the kernel bounds, kept alive, so that a hostile template costs a second and not the run."""

from __future__ import annotations

import atexit
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fettle.core.errors import FettleError

STALLED = 60.0  # seconds without a sign of life, from the start on: far over what the worker's own limits allow
REASONS = {
    3: "the template needs more than 256 MiB of memory",
    -24: "the template does not end within 2 seconds of processor time",
}


@dataclass(frozen=True)
class Job:
    """One rendering: a template, its variables, and the prefixes of `messages` wanted beside it, as (stop, generation prompt)."""

    template: str
    context: dict[str, Any]
    cuts: Sequence[tuple[int, bool]] = ()
    strict: bool = False  # whether a variable that is missing or null is an error


@dataclass(frozen=True)
class Rendering:
    """`error` says why there is no text. A cut is a length where the text begins with that prefix, else the prefix itself."""

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)  # the template's own generation blocks, in characters
    cuts: list[int | str] = field(default_factory=list)
    error: str = ""


class Worker:
    """The rendering process. It starts with the first job, and again after a job that ended it."""

    def __init__(self, now: str | None = None) -> None:
        self.now = now  # what strftime_now stands for; None: the present
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def process_id(self) -> int | None:
        """The number of the process that renders, while there is one."""
        return self._process.pid if self._process else None

    def render(self, jobs: Sequence[Job], context: dict[str, Any] | None = None) -> list[Rendering]:
        """Every job's rendering, in order; `context` is shared by all. FettleError where a template is no Jinja at all."""
        done: list[Rendering] = []
        with self._lock:
            while len(done) < len(jobs):
                done += self._some(jobs[len(done) :], context or {})
        return done

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            script = Path(__file__).with_name("worker.py")
            command = [sys.executable, "-I", "-X", "utf8", str(script)]
            # a session of its own, so that a Ctrl-C in the terminal is this process's alone to answer
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            try:
                _Frames(self._process).next()  # it says so when it is ready
            except (EOFError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    self.close()
                    raise _silent() from None
                code = self._process.wait()
                self.close()
                raise FettleError(
                    f"the process that renders templates does not start (code {code}); its own words are above"
                ) from None
        return self._process

    def _some(self, jobs: Sequence[Job], context: dict[str, Any]) -> list[Rendering]:
        """The renderings up to the end, or up to the job that ended the process."""
        templates = list(dict.fromkeys(job.template for job in jobs))
        number = {template: i for i, template in enumerate(templates)}
        listed = [
            {"template": number[j.template], "context": j.context, "cuts": list(j.cuts), "strict": j.strict}
            for j in jobs
        ]
        request = orjson.dumps(
            {"templates": templates, "jobs": listed, "context": context, "now": self.now}, default=str
        )
        process = self._start()
        frames = _Frames(process)
        done: list[Rendering] = []
        fatal = ""
        try:
            frames.write(struct.pack("<I", len(request)) + request)
            while len(done) < len(jobs):
                answer = orjson.loads(frames.next())
                fatal = fatal or (answer["error"] if answer.get("fatal") else "")
                done.append(_rendering(answer))
        except TimeoutError:
            self.close()
            raise _silent() from None
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.close()
            done.append(Rendering(error=REASONS.get(code, f"the template stops its process (code {code})")))
        if fatal:
            raise FettleError(f"the template is not valid Jinja: {fatal}")
        return done


def _silent() -> FettleError:
    """No template can do that, since its processor time is bounded: it is the machine."""
    return FettleError(
        f"the process that renders templates gave no sign of life for {STALLED:g} s; is the machine too busy? try again"
    )


class _Frames:
    """Frames through a process's pipes, with a bound on silence."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self.input, self.output = process.stdin.fileno(), process.stdout.fileno()
        self.data, self.at = b"", 0
        os.set_blocking(self.input, False)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            _await(self.input, selectors.EVENT_WRITE)
            view = view[os.write(self.input, view) :]

    def next(self) -> bytes:
        head = self._take(4)
        return self._take(struct.unpack("<I", head)[0])

    def _take(self, size: int) -> bytes:
        if len(self.data) - self.at < size:
            parts, have = [self.data[self.at :]], len(self.data) - self.at
            while have < size:
                parts.append(self._read())
                have += len(parts[-1])
            self.data, self.at = b"".join(parts), 0
        self.at += size
        return self.data[self.at - size : self.at]

    def _read(self) -> bytes:
        _await(self.output, selectors.EVENT_READ)
        piece = os.read(self.output, 1 << 20)
        if not piece:
            raise EOFError
        return piece


def _await(pipe: int, event: int) -> None:
    """Wait until a pipe can be read or written. TimeoutError after STALLED seconds."""
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, event)
        deadline = time.monotonic() + STALLED
        while not ready.select(max(deadline - time.monotonic(), 0)):
            if time.monotonic() >= deadline:
                raise TimeoutError


def _rendering(answer: dict[str, Any]) -> Rendering:
    if "error" in answer:
        return Rendering(error=answer["error"])
    return Rendering(answer["text"], [(a, b) for a, b in answer["spans"]], answer["cuts"])


_workers: dict[str | None, Worker] = {}


def _forget() -> None:
    """After a fork: the child must not speak through its parent's pipes, nor end its parent's process."""
    for made in _workers.values():
        if made._process:
            made._process.returncode = 0
            for pipe in (made._process.stdin, made._process.stdout):
                if pipe:
                    pipe.close()
        made._process, made._lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def worker(now: str | None = None) -> Worker:
    """The one worker of this process for a given present."""
    if now not in _workers:
        _workers[now] = Worker(now)
        atexit.register(_workers[now].close)
    return _workers[now]
