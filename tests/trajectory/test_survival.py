"""A run that is killed, ended, damaged or out of disk goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fettle.core.errors import FettleError
from fettle.core.files import read_json, verify
from trajectory.conftest import Fettle, command, trace, weights

DIE = """
import os, signal
calls = 0
def deadly(call):
    def wrapped(*a, **k):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*a, **k)
    return wrapped
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
"""


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Where the uninterrupted run's trace and weights are kept, once they are known."""
    return {}


@pytest.fixture
def expected(whole: dict[str, tuple], recipe: Path, fettle: Fettle, tmp_path: Path) -> tuple:
    """Trace and weights of the uninterrupted run."""
    if "run" not in whole:
        done = fettle("run", str(recipe), f"output={tmp_path / 'whole'}")
        assert done.returncode == 0, done.stderr
        whole["run"] = trace(tmp_path / "whole"), weights(tmp_path / "whole")
    return whole["run"]


def finish(fettle: Fettle, recipe: Path, folder: Path, expected: tuple) -> str:
    done = fettle("run", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr
    assert (trace(folder), weights(folder)) == expected
    assert not list((folder / "checkpoints").glob(".*")), "nothing half-written is left"
    return done.stderr


@pytest.mark.parametrize("at", [5, 6, 7, pytest.param(13, marks=pytest.mark.slow)])
def test_killed_at_a_sync_or_rename(at: int, fettle: Fettle, recipe: Path, tmp_path: Path, expected: tuple) -> None:
    died = fettle("run", str(recipe), before=DIE.format(at=at))
    assert died.returncode == -signal.SIGKILL
    finish(fettle, recipe, tmp_path / "run", expected)


@pytest.mark.slow
def test_killed_at_every_sync_and_rename(fettle: Fettle, recipe: Path, tmp_path: Path, expected: tuple) -> None:
    at = 1
    while True:
        folder = tmp_path / f"run{at}"
        died = fettle("run", str(recipe), f"output={folder}", before=DIE.format(at=at))
        if died.returncode == 0:
            break
        assert died.returncode == -signal.SIGKILL, died.stderr
        done = fettle("run", str(recipe), f"output={folder}", "--resume")
        assert done.returncode == 0, done.stderr
        assert (trace(folder), weights(folder)) == expected, f"killed at call {at}"
        at += 1
    assert at > 30


@pytest.mark.slow
def test_killed_at_twenty_random_moments(recipe: Path, fettle: Fettle, tmp_path: Path, expected: tuple) -> None:
    rng = random.Random(0)
    for i in range(20):
        folder = tmp_path / f"run{i}"
        child = subprocess.Popen(
            command("run", str(recipe), f"output={folder}"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while not (folder / "metrics.jsonl").exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.0))
        child.kill()
        child.wait()
        done = fettle("run", str(recipe), f"output={folder}", "--resume")
        assert done.returncode == 0, done.stderr
        assert (trace(folder), weights(folder)) == expected


TERM = """
import os, signal, fettle.train.loop as loop
step, save = loop.run_step, loop._save
def at(function, number):
    def found(job, now, *rest):
        if now == number and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return function(job, now, *rest)
    return found
"""


@pytest.mark.parametrize(
    ("where", "after"),
    [("run_step = at(step, 2)", 3), ("run_step = at(step, 7)", 8), ("_save = at(save, 8)", 8)],
    ids=["a step", "the last step", "the last step's checkpoint"],
)
def test_sigterm_saves_and_has_its_own_exit_code(
    where: str, after: int, recipe: Path, fettle: Fettle, tmp_path: Path, expected: tuple
) -> None:
    """In the last step too: nothing that follows begins, and a resumed run has its figures although it takes no step."""
    stopped = fettle("run", str(recipe), "checkpoint.every=100", before=f"{TERM}loop.{where}")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert f"SIGTERM: stopped after step {after}; saved; go on with --resume" in " ".join(stopped.stderr.split())
    assert not (tmp_path / "run" / "artifact").exists()
    finish(fettle, recipe, tmp_path / "run", expected)
    facts = read_json(tmp_path / "run" / "artifact" / "manifest.json")
    assert facts["last"]["step"] == 8 and facts["last"]["loss"] == trace(tmp_path / "run")[-1][1]


def test_a_damaged_newest_checkpoint_is_named_and_stepped_over(
    recipe: Path, fettle: Fettle, tmp_path: Path, expected: tuple
) -> None:
    died = fettle("run", str(recipe), before="import fettle.stages.tune as t\nt.save_artifact = lambda *a: 1 / 0")
    assert died.returncode != 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    said = finish(fettle, recipe, tmp_path / "run", expected)
    assert (
        "step-00000008" in said
        and "damaged" in said
        and "stepped over" in said
        and "resuming after step 6" in said.replace("\n", " ")
    )


def test_a_full_disk_keeps_the_checkpoint_before(recipe: Path, fettle: Fettle, tmp_path: Path, expected: tuple) -> None:
    full = """
import resource, signal, fettle.train.checkpoint as c
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = c.save
def limited(folder, step, *rest):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    return save(folder, step, *rest)
c.save = limited
"""
    died = fettle("run", str(recipe), before=full)
    assert died.returncode == 1
    assert "step-00000006: the checkpoint could not be written" in died.stderr and "--resume" in died.stderr
    verify(tmp_path / "run" / "checkpoints" / "step-00000004")
    finish(fettle, recipe, tmp_path / "run", expected)


def test_only_the_newest_are_kept_and_a_run_is_not_overwritten(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    assert fettle("run", str(recipe)).returncode == 0
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = fettle("run", str(recipe))
    assert again.returncode == 1 and "holds a run already" in again.stderr


@pytest.mark.parametrize("finished", [False, True])
def test_resuming_with_another_recipe_or_other_data_is_refused(
    finished: bool, recipe: Path, fettle: Fettle, tmp_path: Path
) -> None:
    failing = "" if finished else "import fettle.stages.tune as t\nt.save_artifact = lambda *a: 1 / 0"
    assert (fettle("run", str(recipe), before=failing).returncode == 0) is finished
    other = fettle("run", str(recipe), "optim.lr=1e-3", "--resume")
    assert other.returncode == 1 and "another recipe (optim.lr: 0.005 then, 0.001 now)" in other.stderr
    data = tmp_path / "data.jsonl"
    whole = data.read_text()
    data.write_text(whole.replace("Count 3.", "Count 4."))
    changed = fettle("run", str(recipe), "--resume")
    assert changed.returncode == 1 and "other data" in changed.stderr and "data.jsonl' has changed" in changed.stderr
    data.write_text(whole)
    done = fettle("run", str(recipe), "--resume")
    assert done.returncode == 0, done.stderr


def test_what_follows_the_artifact_is_made_up_for(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    text = tmp_path / "held.txt"
    text.write_text("one two three four five six")
    words = ("run", str(recipe), f"evaluate=[{{kind: perplexity, path: {text}}}]")
    kill = "import os\ndef kill(*a, **k): os.kill(os.getpid(), 9)\nimport fettle.stages.tune as t\n"
    assert fettle(*words, before=kill + "t.evaluate = kill").returncode == -signal.SIGKILL
    folder = tmp_path / "run"
    assert not (folder / "evaluation").exists() and "## Evaluation" not in (folder / "report.md").read_text()
    assert fettle(*words, "--resume", before=kill + "t.write_report = kill").returncode == -signal.SIGKILL
    assert (folder / "evaluation" / "results.json").exists()
    assert "## Evaluation" not in (folder / "report.md").read_text()
    done = fettle(*words, "--resume", before=kill + "t.evaluate = kill")
    assert done.returncode == 0, done.stderr
    assert (folder / "loss.png").exists()
    report = (folder / "report.md").read_text()
    assert "## Evaluation" in report and "perplexity" in report and "useful tokens/s" in report


def test_a_run_whose_every_loss_is_not_finite_has_a_report(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    done = fettle("run", str(recipe), "optim.lr=1e30", "optim.warmup=0", "not_finite=skip")
    assert done.returncode == 0, done.stderr
    assert "-> not finite" in (tmp_path / "run" / "report.md").read_text()


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def full(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def after(call, size):
    def wrapped(*a, **k):
        full(size)
        return call(*a, **k)
    return wrapped
"""
PLACES = {
    "data": ("import fettle.stages.tune as t; t.prepare = after(t.prepare, 300)", "/cache/"),
    "metrics": ("import fettle.train.log as l; l.Log.row = after(l.Log.row, 300)", "metrics.jsonl"),
    "artifact": ("import fettle.stages.tune as t; t.save_artifact = after(t.save_artifact, 4000)", "/artifact"),
    "report": ("import fettle.stages.tune as t; t.write_report = after(t.write_report, 300)", "/loss.png"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    place: str, recipe: Path, fettle: Fettle, tmp_path: Path, expected: tuple
) -> None:
    code, name = PLACES[place]
    died = fettle("run", str(recipe), before=LIMIT + code)
    said = died.stderr.replace("\n", "")
    assert died.returncode == 1 and "Traceback" not in said, died.stderr
    assert f"{tmp_path}/run" in said and name in said and "cannot be written (File too large); make room" in said
    finish(fettle, recipe, tmp_path / "run", expected)
    assert (tmp_path / "run" / "report.md").exists()


def test_an_output_below_a_file_is_one_sentence(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    died = fettle("run", str(recipe), f"output={tmp_path / 'data.jsonl' / 'x'}")
    assert died.returncode == 1 and "Traceback" not in died.stderr
    assert "data.jsonl/x" in died.stderr and "cannot be written (Not a directory)" in died.stderr


def test_a_signal_to_one_of_two_processes_stops_both(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            command("run", str(recipe), "checkpoint.every=100", before=f"{TERM}loop.run_step = at(step, 2)"), text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [child.communicate(timeout=60)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2, said
    assert all("SIGTERM: stopped after step 3; saved" in " ".join(text.split()) for text in said)
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_verify_is_what_finds_damage(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match="no such file"):
        verify(tmp_path)
