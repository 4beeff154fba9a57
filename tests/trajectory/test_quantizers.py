"""`fettle quantize compare` through the command line: arms in processes of their own, one that fails, one that begins from another."""

from __future__ import annotations

import json
from pathlib import Path

from small import rows
from trajectory.conftest import Fettle

RECIPE = """
model: {{path: {model}, dtype: float32}}
edits: [{{kind: rtn}}]
calibration: {{data: [{{path: {data}, format: text}}], samples: 6, length: 64}}
evaluate: [{{kind: perplexity, path: {held}, context: 48}}]
output: {output}
"""
ARMS = """
int4: {edits: [{kind: gptq, grid: {bits: 4, group: 32}}, {kind: kv_cache, bits: 4}]}
wrong: {edits: [{kind: rtn, grid: {bits: 4, group: 7}}]}
tuned: {kind: tune, edits: [{kind: full}], optim: {lr: 1.0e-3, steps: 2}, batch: {tokens: 128}}
tuned then: {after: tuned, edits: [{kind: rtn}]}
"""


def test_arms_are_measured_alike(fettle: Fettle, tmp_path: Path, tiny_llama: Path) -> None:
    sentence = "The baker sells {} cakes and bread in the morning. "
    data = rows(tmp_path / "text.jsonl", [{"text": sentence.format(i) * 4} for i in range(40)])
    (tmp_path / "held.txt").write_text("".join(sentence.format(i) for i in range(90, 99)) * 3)
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.format(model=tiny_llama, data=data, held=tmp_path / "held.txt", output=tmp_path / "run")
    )
    (tmp_path / "arms.yaml").write_text(ARMS)
    words = (
        "quantize", "compare", str(tmp_path / "recipe.yaml"), "--arms", str(tmp_path / "arms.yaml"), "-o", str(tmp_path / "out"),
    )  # fmt: skip
    done = fettle(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    by_arm = {row["arm"]: row for row in found["rows"]}
    assert (
        list(by_arm) == ["full precision", "int4", "tuned", "tuned then"]
        and "7 does not divide" in found["failed"]["wrong"]
    )
    full, int4 = by_arm["full precision"], by_arm["int4"]
    assert (
        full["kl"] == 0
        and int4["kl"] > 0
        and int4["model_bytes"] < full["model_bytes"]
        and (int4["bits"], int4["cache"]) == (4, 4)
    )
    assert len(int4["errors"]) == 14 and int4["speed"]["decode"] > 0 and int4["peak_bytes"] > 2**20
    assert by_arm["tuned then"]["after"] == "tuned" and by_arm["tuned"]["perplexity"] < full["perplexity"]
    assert {"model", "text", "tokenizer", "calibration", "versions", "machine"} == set(found["header"])
    assert all((tmp_path / "out" / name).stat().st_size > 3000 for name in ("bits.png", "layers.png"))
    before = (tmp_path / "out" / "int4" / "seed-0" / "row.json").stat().st_mtime_ns
    assert fettle(*words, "--only", "int4").returncode == 0
    assert (tmp_path / "out" / "int4" / "seed-0" / "row.json").stat().st_mtime_ns == before
    other = fettle(*words, "calibration.samples=5", "--only", "int4")
    assert other.returncode == 1 and "holds another run" in other.stderr
