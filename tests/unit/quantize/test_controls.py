"""What a comparison needs beside quantizers: injected outliers that change nothing, and activations rounded alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.quantize import RTN, Activations, Outliers, RoundInputs, SmoothQuant
from fettle.quantize.activations import rounded
from fettle.quantize.calibrate import Calibration
from fettle.stages.artifact import open_artifact, save_artifact

STATIC = Activations(group="tensor", static=True)


def opened(folder: Path) -> Forest:
    return load(ModelSpec(path=str(folder), dtype="float32"))


def text(seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(5, 300, 64).astype(np.int32)
    return pack([Example((Node(ids, np.ones(len(ids), np.float32)),), "text")], len(ids), 0)


def inputs(forest: Forest, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = forest.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        forest.hidden(text())
    handle.remove()
    return seen[0][0]


def error(forest: Forest, full: Forest) -> float:
    with torch.no_grad():
        return float((forest.hidden(text(3)) - full.hidden(text(3))).square().mean())


@pytest.mark.parametrize("factor", [32.0, 20.0])
def test_outliers_are_large_and_change_nothing(tiny_llama: Path, factor: float) -> None:
    plain, forest = opened(tiny_llama), opened(tiny_llama)
    Outliers(share=0.05, factor=factor).apply(forest.model)
    with torch.no_grad():
        here, there = plain.hidden(text()), forest.hidden(text())
    assert torch.equal(here, there) if factor == 32 else torch.allclose(here, there, atol=1e-5)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        sizes = inputs(forest, name).abs().amax(0) / inputs(plain, name).abs().amax(0)
        assert sorted(sizes.round().tolist())[-3:] == [factor] * 3 and sizes.round().eq(1).sum() == 61


def test_outliers_cost_a_range_of_a_tensor_and_smoothing_takes_most_of_that_back(tiny_llama: Path) -> None:
    full, found = opened(tiny_llama), {}
    for name, edits in {
        "plain": [RTN(activations=STATIC)], "outliers": [Outliers(), RTN(activations=STATIC)],
        "smoothed": [Outliers(), SmoothQuant(), RTN(activations=STATIC)],
    }.items():  # fmt: skip
        forest = opened(tiny_llama)
        for edit in edits:
            edit.calibrate(forest.model, Calibration(forest, [text(), text(1)]))
        found[name] = error(forest, full)
    assert found["outliers"] > 10 * found["plain"] and found["smoothed"] < 0.2 * found["outliers"]


@pytest.mark.parametrize("grid", [Activations(), Activations(bits=4, symmetric=False), Activations(group="tensor")])
def test_inputs_are_rounded_and_weights_are_not(tiny_llama: Path, grid: Activations) -> None:
    plain, forest = opened(tiny_llama), opened(tiny_llama)
    RoundInputs(grid=grid).apply(forest.model)
    layer, base = (f.model.model.layers[0].mlp.down_proj for f in (forest, plain))
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), base(rounded(x, grid)))
    with pytest.raises(FettleError, match="plain weights cannot do"):
        RoundInputs(grid=grid).merge(forest.model)


def test_static_ranges_are_found_kept_and_opened(tiny_llama: Path, tmp_path: Path) -> None:
    edit, forest = RoundInputs(grid=STATIC), opened(tiny_llama)
    with pytest.raises(FettleError, match="static range is found on text"):
        edit.apply(forest.model)
    calibration = Calibration(forest, [text(), text(1)])
    edit.calibrate(forest.model, calibration)
    assert len(calibration.outcomes) == 14 and all(o.error and o.error > 0 for o in calibration.outcomes.values())
    save_artifact(tmp_path / "artifact", forest, [edit], {})
    again, _ = open_artifact(tmp_path / "artifact")
    with torch.no_grad():
        assert torch.equal(again.hidden(text()), forest.hidden(text()))
