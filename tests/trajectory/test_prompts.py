"""Soft prompts through the real command line: checked, trained, killed, resumed bit for bit, kept plain, opened, used."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fettle.generate import Sampling, generate
from fettle.stages.artifact import open_artifact
from trajectory.conftest import Fettle, trace, weights

# What is trained is more than what is kept: the encoder is in the checkpoints and not in the artifact.
PREFIX = "edits=[{kind: prefix_tuning, tokens: 4, hidden: 16}]"
EDITS = [
    PREFIX,
    "edits=[{kind: p_tuning, tokens: 4, hidden: 8, dropout: 0.2}]",
    "edits=[{kind: hybrid_prompt, template: '<soft:2> Count the stones <soft:2>'}, {kind: lora, rank: 2}]",
]
KILLED = """
import os, signal, fettle.train.checkpoint as c
save = c.save
def deadly(folder, step, *rest):
    done = save(folder, step, *rest)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
c.save = deadly
"""


@pytest.mark.parametrize("edits", [EDITS[0], *(pytest.param(e, marks=pytest.mark.slow) for e in EDITS[1:])])
def test_killed_and_resumed_is_uninterrupted(edits: str, recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    whole = fettle("run", str(recipe), edits, f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    died = fettle("run", str(recipe), edits, before=KILLED)
    assert died.returncode == -signal.SIGKILL
    done = fettle("run", str(recipe), edits, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4" in done.stderr.replace("\n", " ")
    assert (trace(tmp_path / "run"), weights(tmp_path / "run")) == (
        trace(tmp_path / "whole"),
        weights(tmp_path / "whole"),
    )
    losses = [loss for _, loss, _ in trace(tmp_path / "run")]
    assert losses[-1] < losses[0]
    _is_plain_and_works(tmp_path / "run" / "artifact")


def _is_plain_and_works(artifact: Path) -> None:
    kept = load_file(artifact / "edits.safetensors")
    assert [key for key in kept if "fettle_prompt" in key] == ["0/fettle_prompt.plain"]
    forest, edits = open_artifact(artifact)
    front = forest.model.fettle_prompt
    assert front.encoder is None and torch.equal(front.plain, kept["0/fettle_prompt.plain"])
    prompts = [forest.tokenizer.encode(text) for text in ("Count 1.", "Count the red stones.")]
    together = generate(forest, prompts, Sampling(max_tokens=6))
    for one, tokens in zip(together, prompts, strict=True):
        assert generate(forest, [tokens], Sampling(max_tokens=6))[0].tokens == one.tokens
    front.enabled = False
    assert [c.logps for c in generate(forest, prompts, Sampling(max_tokens=6))] != [c.logps for c in together]
    assert edits[0].tensors(forest.model)


def test_check_says_what_trains_and_whether_the_texts_fit(recipe: Path, fettle: Fettle) -> None:
    good = fettle("check", str(recipe), PREFIX)
    assert good.returncode == 0 and "ready to run" in good.stdout + good.stderr, good.stderr
    long = fettle("check", str(recipe), "edits=[{kind: prompt_tuning, tokens: 500}]")
    assert long.returncode == 1
    assert "examples are longer than 12 tokens, all that the model sees" in " ".join(
        (long.stdout + long.stderr).split()
    )
    twice = fettle("check", str(recipe), "edits=[{kind: prompt_tuning}, {kind: p_tuning_v2}]")
    assert twice.returncode == 1 and "a model takes one soft prompt" in " ".join(twice.stderr.split())
