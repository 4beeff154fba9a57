"""Quantizing through the command line: killed in the middle and resumed, it is what it would have been, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from small import rows
from trajectory.conftest import Fettle, weights

RECIPE = """
model: {{path: {model}, dtype: float32}}
edits: {edits}
calibration: {{data: [{{path: {data}, format: text}}], samples: 6, length: 64, disk: true}}
output: {output}
"""
DIE = """
import os, signal, fettle.quantize.calibrate as calibrate
moments = calibrate.Unit.moments
def deadly(self, *args, **kwargs):
    if self.name == 'model.layers.1':
        os.kill(os.getpid(), signal.SIGKILL)
    return moments(self, *args, **kwargs)
calibrate.Unit.moments = deadly
"""
EDITS = {
    "gptq": "[{kind: gptq, grid: {bits: 4, group: 16, symmetric: false}}]",
    "smoothed": "[{kind: smoothquant}, {kind: awq, samples: 2, points: 4, grid: {bits: 4, group: 16, symmetric: false}}]",
}


@pytest.mark.parametrize("name", EDITS)
def test_killed_and_resumed_is_uninterrupted(name: str, fettle: Fettle, tmp_path: Path, tiny_llama: Path) -> None:
    data = rows(tmp_path / "text.jsonl", [{"text": f"The baker sells {i} cakes and bread in the morning. " * 4} for i in range(40)])  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_llama, edits=EDITS[name], data=data, output=tmp_path / "run"))
    whole = fettle("quantize", str(file), f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0 and "beside the model" in whole.stderr, whole.stderr
    assert fettle("quantize", str(file), before=DIE).returncode == -signal.SIGKILL
    refused = fettle("quantize", str(file))
    assert refused.returncode == 1 and "holds a run already; go on with --resume" in refused.stderr
    other = fettle("quantize", str(file), "calibration.samples=5", "--resume")
    assert other.returncode == 1 and "calibration.samples: 6 then, 5 now" in other.stderr
    again = fettle("quantize", str(file), "--resume")
    assert again.returncode == 0, again.stderr
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    findings = [json.loads((tmp_path / run / "findings.json").read_text())["row"] for run in ("run", "whole")]
    assert findings[0]["worst"] == findings[1]["worst"] and findings[0]["left_alone"] == findings[1]["left_alone"]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"artifact", "cache", "findings.json", "report.md"}
