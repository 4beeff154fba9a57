"""Comparing quantizers: what an arm becomes, what verdicts say of figures that are known, what the figures of two models mean."""

from __future__ import annotations

import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.evaluate import Perplexity, evaluate
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import Full
from fettle.quantize import NF4, QAT, RTN, Activations, Grid, KVCache, LLMInt8, RoundInputs, SmoothQuant
from fettle.stages import quantizers
from fettle.stages.compare import read_arms
from fettle.stages.fidelity import fidelity
from fettle.stages.findings import method, said_bits
from fettle.stages.planned import plan_bits
from fettle.stages.quantizers import compare_quantizers
from fettle.stages.quantizers_page import draw_bits, draw_layers, rise, tables
from fettle.stages.recipes import recipe_file
from fettle.stages.verdicts import FAILS, HOLDS, OPEN, Losses, verdicts

WINDOWS, TOKENS = 60, 100
NOISE = np.random.default_rng(0).normal(0, 0.5, WINDOWS)  # of a text, the same for all arms


def row(arm: str, nats: float, seed: int = 0, jitter: float = 0.002, **facts: Any) -> dict[str, Any]:
    """A row whose arm loses `nats` a token more than 1.5 would say, window by window with a little noise of its own."""
    own = np.random.default_rng(zlib.crc32(arm.encode()) + seed).normal(0, jitter, WINDOWS)
    sums = (1.5 + nats + NOISE + own - own.mean()) * TOKENS
    usual = {
        "stage": "quantize", "name": "rtn", "bits": 4, "activations": None, "by": None, "cache": None, "group": 64, "symmetric": True,
        "smoothed": False, "outliers": False, "after": None, "bits_packed": 4.3, "bits_all": 5.0, "model_bytes": 2**20, "kl": 0.1,
        "kl_p99": 1.0, "agreement": 0.9, "speed": {"prefill": 100.0, "decode": 10.0}, "speed_full": {"prefill": 50.0, "decode": 5.0},
        "seconds": 3.0, "peak_bytes": 2**28, "fallbacks": {}, "kernels": {"int4": 3}, "errors": {"model.layers.0.mlp.up_proj": 0.01},
    }  # fmt: skip
    windows = [[float(s), TOKENS] for s in sums]
    perplexity = math.exp(sum(sums) / (WINDOWS * TOKENS))
    return usual | facts | {"arm": arm, "seed": seed, "windows": windows, "perplexity": perplexity}


FULL = row("full precision", 0.0, jitter=0.0, stage=None, name="", bits=None, bits_packed=None, group=None, speed_full=None, seconds=None, errors={})  # fmt: skip


def judged(*rows: dict[str, Any]) -> list[str]:
    return [verdict["verdict"] for verdict in verdicts([FULL, *rows])]


def test_int8_is_lossless_up_to_half_a_percent() -> None:
    assert judged(row("a", 0.001, bits=8))[0] == HOLDS
    assert judged(row("a", 0.02, bits=8))[0] == FAILS
    assert judged(row("a", 0.00499, bits=8, jitter=0.05))[0] == OPEN
    assert judged(row("a", 0.001, bits=8), row("b", 0.02, bits=8))[0] == FAILS  # one that is not is enough
    assert judged(row("a", 0.02, bits=8, activations=8))[0] == OPEN  # not of weights alone: nothing was asked
    assert judged(row("a", 0.02, bits=8, outliers=True))[0] == OPEN


def methods(spreads: dict[int, float]) -> list[dict[str, Any]]:
    return [
        row(f"{name} {bits}", 0.01 + at * width / 2, bits=bits, name=name)
        for bits, width in spreads.items()
        for at, name in enumerate(("gptq", "awq", "rtn"))
    ]


def test_the_spread_of_methods_widens_or_not() -> None:
    assert judged(*methods({8: 0.001, 4: 0.02, 3: 0.1, 2: 0.5}))[1] == HOLDS
    assert judged(*methods({8: 0.001, 4: 0.2, 3: 0.1, 2: 0.5}))[1] == FAILS
    assert judged(*methods({8: 0.1, 4: 0.1003}))[1] == OPEN
    assert judged(row("a", 0.1, bits=4), row("b", 0.2, bits=2))[1] == OPEN  # one method has no spread


def test_activations_are_harder_or_not() -> None:
    weights = row("w8a16", 0.001, bits=8)
    harder = row("w16a8", 0.05, name="round_inputs", bits=None, activations=8, by="token")
    easier = row("w16a8", 0.0, name="round_inputs", bits=None, activations=8, by="token", jitter=1e-5)
    assert judged(weights, harder)[2] == HOLDS and judged(weights, easier)[2] == FAILS and judged(harder)[2] == OPEN
    both = [
        row("both", 0.1, bits=8, activations=8, by="static"),
        row("smooth", 0.02, bits=8, activations=8, by="static", name="smoothquant+rtn", smoothed=True),
    ]
    lines = verdicts([FULL, weights, harder, *both])[2]["evidence"]
    assert any("A8 a static: smoothing helps: +0.08" in line and line.endswith(HOLDS) for line in lines)


def test_recovery_is_measured_against_an_equally_tuned_control() -> None:
    control = row("tuned", -0.5, stage="tune", name="full", bits=None)
    rounded = row("tuned then", -0.3, activations=8, after="tuned")
    trained = row("qat", -0.45, stage="tune", name="full+qat", activations=8)
    verdict = verdicts([FULL, control, rounded, trained])[3]
    assert verdict["verdict"] == HOLDS and "0.75 of what rounding cost the control 'tuned'" in verdict["evidence"][0]
    # better than the untuned model, and yet it recovered nothing: it only learned the text
    worse = verdicts([FULL, control, rounded, row("qat", -0.29, stage="tune", name="full+qat", activations=8)])[3]
    assert worse["verdict"] == FAILS
    seeds = [row(r["arm"], nats, 1, **{k: r[k] for k in ("stage", "name", "bits", "activations", "after")}) for r, nats in ((control, -0.5), (rounded, -0.3), (trained, -0.4))]  # fmt: skip
    line = verdicts([FULL, control, rounded, trained, *seeds])[3]["evidence"][0]
    assert line.endswith("over seeds 0.75, 0.50")


def test_arms_are_paired_by_the_windows_of_one_text() -> None:
    """The text's own spread is many times the difference, and drops out."""
    losses = Losses([FULL, row("a", 0.01)])
    apart = losses[losses.rows["a"]] - losses[FULL]
    assert apart[0] == pytest.approx(0.01, abs=1e-9) and np.ptp(apart[1:]) < 0.01 < np.ptp(losses[FULL][1:])
    change, low, high = rise(row("a", 0.01), FULL)
    assert low is not None and high is not None and low < change < high and change == pytest.approx(math.expm1(0.01))


def test_a_row_says_what_was_rounded() -> None:
    w8a8 = method([SmoothQuant(), RTN(activations=Activations(group="tensor", static=True))])
    assert said_bits(w8a8) == "W8A8" and w8a8["by"] == "static" and w8a8["name"] == "smoothquant+rtn"
    assert said_bits(method([RoundInputs()])) == "W16A8" and method([RoundInputs()])["bits"] is None
    assert said_bits(method([NF4(), KVCache(bits=4)])) == "W4A16KV4" and method([NF4()])["group"] == 64
    assert (
        said_bits(method([Full(), QAT(cache=Grid(bits=8))])) == "W4A16KV8" and said_bits(method([LLMInt8()])) == "W8A8"
    )
    assert said_bits(method([Full()])) == "W16A16"


def test_tables_and_pictures(tmp_path: Path) -> None:
    rows = [FULL, *methods({8: 0.001, 4: 0.02}), row("w8a8", 0.1, activations=8, by="token")]
    console = Console(file=io.StringIO(), width=140)
    for shown in tables(rows):
        console.print(shown)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        all(r["arm"] in told for r in rows)
        and "W4A8 token" in told
        and "2.00x, 2.00x" in told
        and "0.up_proj 0.01" in told
    )
    draw_bits(rows, tmp_path / "bits.png")
    draw_layers(rows, tmp_path / "layers.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("bits.png", "layers.png"))


# Figures of two models.


def test_figures_are_those_of_the_definitions(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("The baker sells bread in the morning and cakes in the afternoon. " * 12)
    spec = Perplexity(path=str(tmp_path / "held.txt"), context=48)
    full, forest = (load(ModelSpec(path=str(tiny_llama), dtype="float32")) for _ in range(2))
    for f in (full, forest):
        with torch.no_grad():
            f.model.lm_head.weight.mul_(20)
    RTN(grid=Grid(bits=3, group=32)).apply(forest.model)
    found = fidelity(forest, full, spec)
    (result,) = evaluate(forest, [spec], progress=False).results
    assert found["perplexity"] == pytest.approx(result.main[1].mean, rel=1e-6)
    assert sum(n for _, n in found["windows"]) == result.about["tokens"]
    same = fidelity(full, full, spec)
    assert same["kl"] == same["kl_p99"] == 0 and same["agreement"] == 1 and 0 < found["agreement"] < 1
    assert 0 < found["kl"] < found["kl_p99"]
    p, q = (_logits(f, spec).double().log_softmax(-1) for f in (full, forest))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@torch.no_grad()
def _logits(forest: Any, spec: Perplexity) -> torch.Tensor:
    """Of every scored token, by transformers' own forward pass."""
    from fettle.evaluate.perplexity import windows_of

    rows, _ = windows_of(forest, spec)
    return torch.cat([forest.model(torch.tensor([w.tokens])).logits[0, -w.scored - 1 : -1] for w in rows])


# Arms.


RECIPE = {
    "kind": "quantize", "model": "fettle/tiny", "edits": [{"kind": "rtn"}], "calibration": {"data": [{"path": "rows.jsonl"}], "seed": 3},
    "evaluate": [{"kind": "perplexity", "path": "held.txt"}], "output": "unused",
}  # fmt: skip


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(RECIPE | changes))
    return file


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be run, by arm and seed."""
    plans: dict[str, Any] = {}

    def instead(arm: str, seed: int, plan: Any, *_: Any) -> dict[str, Any]:
        plans[f"{arm}/{seed}"] = plan
        return FULL if plan is None else row(arm, 0.01, seed)

    monkeypatch.setattr(quantizers, "_ran", instead)
    monkeypatch.setattr(quantizers, "header", lambda *_: {})
    return plans


def test_every_arm_that_ships_is_a_recipe(ran: dict[str, Any], tmp_path: Path) -> None:
    arms = read_arms(recipe_file("quantizers.yaml"))
    found = compare_quantizers(written(tmp_path), arms, tmp_path / "out", seeds=2, console=Console(file=io.StringIO()))
    assert len(ran) == 1 + 2 * len(arms) and len(found["verdicts"]) == 4
    for method_name in ("rtn", "hqq", "awq", "gptq"):
        grids = [ran[f"{method_name} {bits}/0"]["edits"][0]["grid"] for bits in (8, 4, 3, 2)]
        assert len({(g["group"], g["symmetric"], g["scale"]) for g in grids}) == 1
    plain, tuned = ran["gptq 4/1"], ran["tuned/1"]
    assert plain["calibration"]["seed"] == 4 and plain["seed"] == 1 and plain["evaluate"] == []
    assert tuned["kind"] == "tune" and tuned["data"] == [{"path": "rows.jsonl"}] and "calibration" not in tuned
    assert ran["tuned then w4a8/0"]["after"] == "tuned" and ran["full precision/0"] is None


def test_what_makes_no_sense_is_told_before_anything_runs(ran: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str, arms: dict[str, list[str]], **changes: Any) -> None:
        with pytest.raises(FettleError, match=message):
            compare_quantizers(written(tmp_path, **changes), arms, tmp_path / "out")
        assert not ran

    refused("arm 'b': unknown key 'edits.0.grd'", {"a": [], "b": ['edits=[{"kind": "rtn", "grd": {}}]']})
    refused(
        "arm 'b': after: there is no arm 'tined' before it: did you mean 'tuned'", {"tuned": [], "b": ['after="tined"']}
    )
    refused("after: there is no arm 'later' before it", {"b": ['after="later"'], "later": []})
    refused("needs a held-out text; add", {"a": []}, evaluate=[])


def test_a_plan_is_a_recipe_that_keeps_to_its_budget(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"The baker sells {i} cakes and bread in the morning. " * 4} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changes = {
        "model": {"path": str(tiny_llama), "dtype": "float32"}, "edits": [{"kind": "smoothquant"}, {"kind": "gptq", "grid": {"group": 32}}],
        "calibration": {"data": [{"path": str(tmp_path / "rows.jsonl"), "format": "text"}], "samples": 6, "length": 64},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    recipe, output = written(tmp_path, **changes), tmp_path / "mixed.yaml"
    layers, bits = plan_bits(recipe, 4.0, output, choices=(2, 3, 4, 8), rows=2)
    from fettle.stages.pipeline import load_recipe

    (stage,) = load_recipe(output).stages
    assert [edit.kind for edit in stage.edits] == ["smoothquant"] + ["gptq"] * len(set(bits.values()))
    assert {name: e.grid.bits for e in stage.edits[1:] for name in e.targets} == bits and len(bits) == len(layers) == 14
    assert all(e.grid.group == 32 for e in stage.edits[1:])
    with pytest.raises(FettleError, match="is there already"):
        plan_bits(recipe, 4.0, output)
    with pytest.raises(FettleError, match="a plan needs one quantizer with a grid"):
        plan_bits(written(tmp_path, edits=[{"kind": "nf4"}]), 4.0, tmp_path / "other.yaml")
