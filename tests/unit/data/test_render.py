"""The worker that renders templates: no escape, no resource without a bound, fast enough not to matter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fettle.core import FettleError
from fettle.data import render
from fettle.data.render import Job, Worker
from fettle.data.render import worker as shared

ATTACKS = {
    "long string": "{{ 'a' * 500000000 }}",
    "long string of a variable": "{{ x * 500000000 }}",
    "doubling": "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "long output": "{% for i in range(90000) %}{{ x * 100000 }}{% endfor %}",
    "long range": "{% for i in range(10**9) %}a{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "quiet nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% set q = j %}{% endfor %}{% endfor %}done",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{{ n ** (n ** n) }}",
    "shift": "{{ (n ** 99999999) | string | length }}",
    "list": "{{ ([0] * 900000000) | length }}",
    "padding": "{{ '%999999999d' % 1 }}",
    "padding by format": "{{ '{:999999999d}'.format(1) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "indent": "{{ 'a\nb' | indent(999999999) }}",
    "replace": "{{ ('a' * 9999) | replace('a', 'a' * 99999) }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "lipsum": "{{ lipsum(n=100000, html=False) }}",
    "sorting": "{% for i in range(99999) %}{% set q = range(99999) | sort | list %}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "attribute filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(x) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "change messages": "{{ messages.append(1) }}{{ messages | length }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "raise": "{{ raise_exception('no') }}",
    "generator": "{{ (messages | map(attribute='__class__') | list)[0] }}",
    "self": "{{ self.__init__.__globals__ }}",
    "deep list": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
}
STOPPED = {"long string", "power", "nested ranges", "endless macro", "quiet nested ranges", "long output", "doubling"}
SECRETS = ("root:", "uid=", "<class", "<module", "built-in", "__builtins__")


@pytest.fixture(scope="module")
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end(worker: Worker, name: str) -> None:
    attack = ATTACKS[name]
    context = {"x": "a", "n": 9, "messages": [{"role": "user", "content": "hello"}]}
    worker.render([Job("{{ x }}", context)])  # started
    began = time.monotonic()
    try:
        found = worker.render([Job(attack, context), Job("{{ x }}!", context)])
    except FettleError as error:
        assert "not valid Jinja" in str(error)
    else:
        assert not any(secret in found[0].text for secret in SECRETS), found[0].text[:200]
        assert len(found[0].text) < 64 << 20
        if name in STOPPED:
            assert re.search("does not end within|memory|without end|Range too big", found[0].error), found[0].error
        assert found[1].text == "a!", "the job after the attack is answered as if nothing had happened"
    assert time.monotonic() - began < 60  # 2 s of the worker's processor time, on a machine that does other things too


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="the limits of a process are read from /proc")
def test_the_kernel_bounds_the_process(worker: Worker) -> None:
    worker.render([Job("a", {})])
    lines = Path(f"/proc/{worker.process_id}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max address space"] == [str(256 << 20)] * 2
    assert limits["Max open files"] == limits["Max file size"] == ["0", "0"]
    assert int(limits["Max cpu time"][0]) < 1000


def test_syntax_errors_name_their_line(worker: Worker) -> None:
    with pytest.raises(FettleError, match="not valid Jinja: line 2"):
        worker.render([Job("a\n{% if %}", {}), Job("b", {})])
    assert worker.render([Job("b", {})])[0].text == "b"


def test_strict_refuses_missing_and_null(worker: Worker) -> None:
    jobs = [
        Job("{{ a }}", {}, strict=True),
        Job("{{ a }}", {"a": None}, strict=True),
        Job("{{ a }}", {"a": 0}, strict=True),
        Job("{{ a }}", {}),
    ]
    missing, null, zero, lenient = worker.render(jobs)
    assert "'a' is undefined" in missing.error and "null" in null.error
    assert zero.text == "0" and lenient.text == "" and not lenient.error


def test_prefixes(worker: Worker) -> None:
    template = "{% for m in messages %}<{{ m }}>{% endfor %}{% if add_generation_prompt %}<a{% endif %}"
    (found,) = worker.render(
        [Job(template, {"messages": ["u", "a", "v"]}, [(1, False), (1, True), (2, True), (0, False)])]
    )
    assert found.text == "<u><a><v>"
    assert found.cuts == [3, 5, "<u><a><a", 0]


def test_generation_block_in_a_macro_is_refused(worker: Worker) -> None:
    template = "{% macro say(m) %}({% generation %}{{ m }}{% endgeneration %}){% endmacro %}start {{ say('x') }}"
    assert "generation block inside a macro" in worker.render([Job(template, {})])[0].error


def test_the_present_can_be_fixed() -> None:
    worker = Worker("2025-01-01T12:00:00")
    try:
        assert worker.render([Job("{{ strftime_now('%d %b %Y') }}", {})])[0].text == "01 Jan 2025"
    finally:
        worker.close()


def test_one_process_renders_all(worker: Worker, tokenizer) -> None:
    jobs = [Job(tokenizer.chat_template, {"messages": [{"role": "user", "content": str(i)}]}) for i in range(2000)]
    worker.render(jobs[:1])
    before = worker.process_id
    assert all(f"user\n{i}<" in made.text for i, made in enumerate(worker.render(jobs)))
    assert worker.process_id == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_worker_of_its_own() -> None:
    kept = shared("2025-01-01T12:00:00")
    before = kept.render([Job("{{ x }}", {"x": 1})])[0].text, kept.process_id
    child = os.fork()
    if not child:
        os._exit(0 if kept.process_id is None and kept.render([Job("{{ x }}", {"x": 2})])[0].text == "2" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (kept.render([Job("{{ x }}", {"x": 1})])[0].text, kept.process_id) == before


INTERRUPTED = """
import os, signal, threading, time
from fettle.data.render import Job, Worker
told = []
signal.signal(signal.SIGINT, lambda *_: told.append(1))
worker = Worker()
slow = "{% for i in range(2000) %}{% for j in range(500) %}{% endfor %}{% endfor %}done"
for moment in (0.02, 0.05):  # while it starts, and while it renders
    threading.Timer(moment, os.killpg, (0, signal.SIGINT)).start()
    before = worker.process_id
    found = worker.render([Job(slow, {})])[0]
    while not told:
        time.sleep(0.01)
    told.clear()
    print(found.text or found.error, worker.process_id == (before or worker.process_id))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="a system without process groups")
def test_a_signal_of_the_terminal_does_not_reach_the_worker() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, start_new_session=True
    )
    assert (done.stdout, done.stderr) == ("done True\ndone True\n", "")


def test_a_process_that_does_not_start_or_stops_reading_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Worker()
    try:
        made.render([Job("a", {})])
        os.kill(made.process_id or 0, signal.SIGSTOP)
        monkeypatch.setattr(render, "STALLED", 0.3)
        with pytest.raises(FettleError, match="no sign of life for 0.3 s"):
            made.render([Job("{{ x }}", {"x": "a" * (1 << 20)})])
        for script, said in (("exec sleep 60", "no sign of life for"), ("exit 5", r"does not start \(code 5\)")):
            command = tmp_path / "python"
            command.write_text(f"#!/bin/sh\n{script}\n")
            command.chmod(0o755)
            monkeypatch.setattr(sys, "executable", str(command))
            monkeypatch.setattr(render, "STALLED", 0.3 if "sleep" in script else 60.0)
            with pytest.raises(FettleError, match=said):
                made.render([Job("a", {})])
    finally:
        made.close()
