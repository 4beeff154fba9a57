"""Distillation, quantization-aware training and one-bit deltas through the command line, killed and resumed as well."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fettle.quantize.linear import quantized
from fettle.stages.artifact import open_artifact
from trajectory.conftest import Fettle, trace, weights
from trajectory.test_edit_state import DIE

QAT = "edits=[{kind: lora, rank: 4}, {kind: qat, grid: {bits: 4, group: 32}, activations: {bits: 8}, cache: {bits: 8}}]"
LSQ = "edits=[{kind: lora, rank: 4}, {kind: lsq, activations: {group: tensor, static: true}}]"


def done(result: object) -> None:
    assert result.returncode == 0, result.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize(("edits", "objective"), [(QAT, "objective={kind: distill, hard: 0.2, temperature: 2.0}"), (LSQ, "objective={kind: distill, divergence: jsd, teacher: {cached: true}, top_k: 16}")], ids=["qat", "lsq"])  # fmt: skip
def test_killed_and_resumed_is_uninterrupted_and_what_is_left_is_packed(
    edits: str, objective: str, recipe: Path, fettle: Fettle, tmp_path: Path
) -> None:
    words = [edits, objective]
    done(fettle("run", str(recipe), *words, f"output={tmp_path / 'whole'}"))
    assert fettle("run", str(recipe), *words, before=DIE).returncode == -signal.SIGKILL
    done(fettle("run", str(recipe), *words, "--resume"))
    assert trace(tmp_path / "run") == trace(tmp_path / "whole") and weights(tmp_path / "run") == weights(
        tmp_path / "whole"
    )
    losses = [loss for _, loss, _ in trace(tmp_path / "run")]
    assert 0 < losses[-1] and all(size > 0 for _, _, size in trace(tmp_path / "run"))
    forest, _ = open_artifact(tmp_path / "run" / "artifact")
    assert len(quantized(forest.model)) == 14
    manifest = json.loads((tmp_path / "run" / "artifact" / "manifest.json").read_text())
    assert manifest["quantized"]["layers"] == 14 and manifest["quantized"]["bits"] < 6 and manifest["trained"] > 0


def test_a_cached_teacher_is_the_live_one_and_is_asked_once(
    recipe: Path, fettle: Fettle, tmp_path: Path, tiny_llama: Path
) -> None:
    objective = "objective={{kind: distill, top_k: 12, temperature: 1.5, teacher: {{path: {path}, dtype: float32, cached: {cached}}}}}"
    for cached in ("false", "true"):
        words = [
            objective.format(path=tiny_llama, cached=cached),
            "edits=[{kind: full}]",
            f"cache={tmp_path / 'cache'}",
        ]
        done(fettle("run", str(recipe), *words, f"output={tmp_path / cached}"))
    for (_, one, size), (_, two, size2) in zip(trace(tmp_path / "false"), trace(tmp_path / "true"), strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-9) and size == pytest.approx(size2, rel=1e-4, abs=1e-8)
    (folder,) = (tmp_path / "cache").glob("teacher-*")
    made = (folder / "ids.npy").stat().st_mtime_ns
    done(fettle("run", str(recipe), *words, "optim.lr=1e-4", f"output={tmp_path / 'again'}"))
    assert (folder / "ids.npy").stat().st_mtime_ns == made
    checked = fettle("check", str(recipe), *words, f"cache={tmp_path / 'other'}", f"output={tmp_path / 'checked'}")
    assert (
        checked.returncode == 0
        and "ready to run" in checked.stdout
        and not list((tmp_path / "other").glob("teacher-*"))
    )


def test_full_tuning_has_no_teacher_in_itself(recipe: Path, fettle: Fettle) -> None:
    refused = fettle("run", str(recipe), "objective={kind: distill}", "edits=[{kind: full}, {kind: qat}]")
    assert refused.returncode == 1 and "name the teacher by its path" in refused.stderr.replace("\n", " ")
    nothing = fettle("run", str(recipe), "edits=[{kind: qat}]")
    assert nothing.returncode == 1 and "nothing trains after qat" in nothing.stderr.replace("\n", " ")


def test_a_fine_tune_becomes_a_delta(recipe: Path, fettle: Fettle, tmp_path: Path) -> None:
    done(fettle("run", str(recipe), "optim.lr=0.02"))
    tuned, delta = tmp_path / "run", tmp_path / "delta"
    done(fettle("delta", str(tuned), "-o", str(delta), "--data", str(tmp_path / "data.jsonl"), "--steps", "6"))
    done(fettle("delta", str(tuned), "-o", str(tmp_path / "first")))
    losses = [loss for _, loss, _ in trace(delta)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    tokens = torch.arange(30)[None]

    def logits(folder: Path) -> torch.Tensor:
        forest, _ = open_artifact(folder / "artifact")
        with torch.no_grad():
            return forest.model(input_ids=tokens).logits.float()

    wanted, first, distilled = logits(tuned), logits(tmp_path / "first"), logits(delta)
    shutil.rmtree(tuned)
    assert torch.equal(logits(delta), distilled), "an artifact does not need the fine-tune"
    assert not torch.equal(first, distilled) and (first - wanted).square().mean() < wanted.square().mean()


def test_a_model_writes_its_own_data_and_learns_from_it(
    recipe: Path, fettle: Fettle, tmp_path: Path, tiny_llama: Path
) -> None:
    own = tmp_path / "own.jsonl"
    done(fettle("sample", str(tiny_llama), "-o", str(own), "--rows", "12", "--length", "24"))
    done(fettle("run", str(recipe), QAT, "objective={kind: distill}", f"data=[{{path: {own}}}]"))
    assert len(trace(tmp_path / "run")) == 8
