"""The process that renders templates nobody vouches for: a script, run alone, that imports nothing of fettle.

It reads frames of jobs from stdin and writes one frame an answer to stdout; a frame is four bytes of length and JSON.
The first frame, an empty one, says that it is ready.
The kernel bounds its memory, its processor time for each job and its files, so that no template can outlast them:
an operator in C that never comes back ends the process, and the parent names the job.
"""

from __future__ import annotations

import codecs
import json
import os
import pprint  # noqa: F401  (Jinja imports these late, when no file can be opened any more)
import random  # noqa: F401
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug
import orjson
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # a system without limits: the parent's clock alone bounds a job
    resource = None  # type: ignore[assignment]

MEMORY = 256 << 20  # bytes of address space, everything counted
SECONDS = 1.0  # processor time of one job before it is told to stop; the kernel ends it within two
LONGEST = 32 << 20  # characters of a rendering
OUT_OF_MEMORY, FLUSH = 3, 0.02


class TooSlow(BaseException):
    """A job used up its processor time."""


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the model says, as transformers' templates mark it."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written: list[str] = []
        self.found: list[tuple[int, str]] = []

    def parse(self, parser: Any) -> nodes.Node:
        """A block whose body is called, so that its text is known."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        self.found.append((sum(map(len, self.written)), text))
        return text


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise jinja2.exceptions.TemplateError(message)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's escapes for HTML, as chat templates expect it."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Namespace(jinja2.utils.Namespace):
    """A namespace that takes no name with an underscore before it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a namespace takes no name that begins with an underscore, found '{name}'"
            )


class Dictionary:
    """`dict` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        """dict.fromkeys."""
        return dict.fromkeys(*args, **kwargs)


def no_null(value: Any) -> Any:
    """What a row's template prints, which must not be null."""
    if value is None:
        raise jinja2.exceptions.TemplateError("it prints a column that is null")
    return value


def environment(now: str | None, strict: bool) -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives a chat template; `now` (ISO) stands for the present where it is given.

    `strict` is for templates over a row's columns: a column that is missing or null is an error, not an empty text.
    """
    rules: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "finalize": no_null} if strict else {}
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], **rules
    )

    def strftime_now(format: str) -> str:
        return (datetime.fromisoformat(now) if now else datetime.now()).strftime(format)

    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    return env


def render(template: jinja2.Template, context: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character spans of its generation blocks."""
    tracker: Any = template.environment.extensions[Generation.identifier]
    tracker.written, tracker.found = [], []
    size = 0
    for part in template.generate(context):
        tracker.written.append(part)
        size += len(part)
        if size > LONGEST:
            raise MemoryError
    text = "".join(tracker.written)
    spans = []
    for start, said in tracker.found:
        if text[start : start + len(said)] != said:
            raise jinja2.exceptions.TemplateError(
                "a generation block inside a macro, a filter or a set: its place cannot be known"
            )
        spans.append((start, start + len(said)))
    return text, spans


def answer(template: jinja2.Template, job: dict[str, Any]) -> dict[str, Any]:
    """The whole rendering, and each prefix asked for: its length where the whole begins with it, else its text."""
    context = job["context"]
    text, spans = render(template, context)
    cuts: list[Any] = []
    for stop, prompt in job["cuts"]:
        part, _ = render(template, context | {"messages": context["messages"][:stop], "add_generation_prompt": prompt})
        cuts.append(len(part) if text.startswith(part) else part)
    return {"text": text, "spans": spans, "cuts": cuts}


@contextmanager
def bounded() -> Iterator[None]:
    """Processor time for one job: a signal at SECONDS, and the end of the process at the next whole second but one."""
    if resource is None:
        yield
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def too_slow(*_: Any) -> None:
    """The handler of the job's timer."""
    raise TooSlow


def work(job: dict[str, Any], compiled: dict[tuple[str, bool], Any], now: str | None) -> dict[str, Any]:
    """One job's answer, or its error as a half sentence."""
    try:
        with bounded():
            source, strict = job["template"], job["strict"]
            template = compiled.get((source, strict))
            if template is None:
                if len(compiled) > 64:
                    compiled.clear()
                template = compiled[source, strict] = environment(now, strict).from_string(source)
            return answer(template, job)
    except TooSlow:
        return {"error": f"the template does not end within {SECONDS:g} second of processor time"}
    except RecursionError:
        return {"error": "the template calls itself without end"}
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno} of the template: {error.message}", "fatal": True}
    except jinja2.TemplateError as error:
        return {"error": f"the template refuses it: {error.message}"}
    except Exception as error:
        return {"error": f"the template fails: {type(error).__name__}: {error}"[:400]}


def confine() -> None:
    """Give up memory, files and processes that rendering does not need."""
    if resource is None:
        return
    datetime.now().astimezone()  # reads the time zone, and the next line the codecs, while files can be opened
    for codec in ("unicode_escape", "ascii", "latin-1"):
        codecs.lookup(codec)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    signal.signal(signal.SIGVTALRM, too_slow)


def main() -> None:
    """Answer frames until stdin closes."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    compiled: dict[tuple[str, bool], Any] = {}
    confine()
    sink.write(struct.pack("<I", 0))  # an empty frame: ready
    sink.flush()
    while len(head := source.read(4)) == 4:
        request = orjson.loads(source.read(struct.unpack("<I", head)[0]))
        flushed = time.monotonic()
        for job in request["jobs"]:
            job["template"] = request["templates"][job["template"]]
            job["context"] |= request["context"]
            try:
                data = orjson.dumps(work(job, compiled, request["now"]), default=str)
            except MemoryError:
                sink.flush()
                os._exit(OUT_OF_MEMORY)
            except TypeError as error:
                data = orjson.dumps({"error": f"the template's text cannot be written ({error})"})
            sink.write(struct.pack("<I", len(data)) + data)
            if time.monotonic() - flushed > FLUSH:
                sink.flush()
                flushed = time.monotonic()
        sink.flush()


if __name__ == "__main__":
    main()
