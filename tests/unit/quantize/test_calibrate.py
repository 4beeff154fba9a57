"""The calibration driver: what a method sees and when, what is kept of it, what falls back and is told."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models.forest import Forest
from fettle.models.weight import read_weight
from fettle.peft import LoRA
from fettle.quantize import AWQ, GPTQ, HQQ, NF4, RTN, Activations, Grid, LayerDistill, SmoothQuant, ZeroQuant, calibrate
from fettle.quantize.calibrate import Calibration
from fettle.quantize.linear import QuantizedLinear, quantized
from fettle.quantize.moments import output_error

GRID = Grid(bits=4, symmetric=False, group=16)
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": 64,
}  # fmt: skip


def build(seed: int = 0) -> Forest:
    """A random model whose norms have a few large channels, as those of trained models do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = (1.2 * torch.randn(32)).exp()
    return Forest(model.eval().requires_grad_(False))


def batches(count: int = 4, length: int = 64) -> list[Batch]:
    rng = np.random.default_rng(0)

    def text(n: int) -> Example:
        return Example((Node(rng.integers(3, 60, n).astype(np.int32), np.ones(n, np.float32)),), "x")

    return [pack([text(40), text(15)], length, 0) for _ in range(count)]


def run(forest: Forest, *edits: Any, rows: list[Batch] | None = None, **settings: Any) -> list[Calibration]:
    made = []
    for place, edit in enumerate(edits):
        made.append(Calibration(forest, rows or batches(), place=place, console=Console(quiet=True), **settings))
        edit.calibrate(forest.model, made[-1])
    return made


@torch.no_grad()
def hidden(forest: Forest, rows: list[Batch]) -> Tensor:
    return torch.cat([forest.hidden(b)[:55] for b in rows])


def error(edits: list[Any], seeds: int = 2) -> float:
    """How far quantized models' states are from the plain ones', on text that they were not calibrated on."""
    rows, found = batches(12), 0.0
    for seed in range(seeds):
        forest = build(seed)
        before = hidden(forest, rows[8:])
        run(forest, *edits, rows=rows[:8])
        found += float((hidden(forest, rows[8:]) - before).square().mean() / before.square().mean())
    return found


@pytest.mark.parametrize(
    ("edit", "most"),
    [
        (GPTQ(grid=GRID), 0.75), (GPTQ(grid=GRID, act_order=False), 0.85), (AWQ(grid=GRID, samples=4), 0.65),
        (AWQ(grid=GRID, search="layer"), 0.75), (AWQ(grid=GRID, search="layer", weighted=True), 0.8), (HQQ(grid=GRID), 0.95),
        (ZeroQuant(grid=GRID, activations=None, distill=LayerDistill(steps=60, lr=1e-3)), 0.9),
    ],
    ids=lambda value: str(value.model_dump(exclude_defaults=True, exclude={"grid"})) + value.kind if hasattr(value, "kind") else None,
)  # fmt: skip
def test_every_method_leaves_the_model_nearer_than_round_to_nearest(edit: Any, most: float, nearest: float) -> None:
    share = error([edit]) / nearest
    print(f"{edit.kind}: {share:.2f} of round to nearest's error")
    assert share < most


@pytest.fixture(scope="module")
def nearest() -> float:
    return error([RTN(grid=GRID)])


@pytest.mark.parametrize("activations", [Activations(bits=6), Activations(bits=8, group="tensor", static=True)], ids=["token", "static"])  # fmt: skip
def test_smoothing_makes_activations_easier(activations: Activations) -> None:
    rounding = RTN(grid=Grid(bits=8), activations=activations)
    share = error([SmoothQuant(), rounding]) / error([rounding])
    print(f"smoothquant before rtn, A{activations.bits}: {share:.2f} of the error")
    assert share < 0.8


def test_true_sequential_the_moments_of_a_layer_are_those_after_the_layers_before_it() -> None:
    rows, forest = batches(), build()
    plain = build()
    inputs: dict[str, list[Tensor]] = {}

    def watched(model: nn.Module, name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: inputs.setdefault(name, []).append(args[0].detach().reshape(-1, args[0].shape[-1])[:55])
        )

    seen: dict[str, Tensor] = {}
    put = calibrate.Unit.put

    def spy(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        seen[name] = self.seen(name).second
        return put(self, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.Unit, "put", spy)
        run(forest, GPTQ(grid=GRID), rows=rows)
    assert list(seen)[:5] == [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")]  # fmt: skip
    # what layer 1's MLP was given, once all before it is packed and it is not
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        packed = forest.model.get_submodule(f"model.layers.1.{name}")
        parent, _, key = f"model.layers.1.{name}".rpartition(".")
        setattr(forest.model.get_submodule(parent), key, plain.model.get_submodule(f"model.layers.1.{name}"))
        assert isinstance(packed, QuantizedLinear)
    handle = watched(forest.model, "model.layers.1.mlp.up_proj")
    hidden(forest, rows)
    handle.remove()
    x = torch.cat(inputs["model.layers.1.mlp.up_proj"])
    assert torch.allclose(seen["model.layers.1.mlp.up_proj"], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_what_is_told_of_a_layer_is_its_error_on_the_text() -> None:
    forest, rows = build(), batches()
    dense = {n: read_weight(m).clone() for n, m in forest.model.named_modules() if type(m) is nn.Linear}
    (made,) = run(forest, RTN(grid=GRID), rows=rows)
    assert set(made.outcomes) == set(quantized(forest.model)) and not made.fallbacks
    name = "model.layers.0.self_attn.q_proj"  # the first, whose input nothing has changed
    x: list[Tensor] = []
    forest.model.get_submodule(name).register_forward_pre_hook(lambda _, args: x.append(args[0].reshape(-1, 32)[:55]))
    hidden(forest, rows)
    second = torch.cat(x).T @ torch.cat(x)
    rounded = forest.model.get_submodule(name).dequantized()
    wanted = output_error(dense[name], rounded, second).sum() / output_error(dense[name], 0 * rounded, second).sum()
    assert made.outcomes[name].tokens == 4 * 55, "padding does not count"
    assert made.outcomes[name].error == pytest.approx(float(wanted), rel=1e-3)


def test_on_disk_and_in_memory_are_the_same_and_nothing_stays(tmp_path: Path) -> None:
    one, two = build(), build()
    run(one, GPTQ(grid=GRID))
    run(two, GPTQ(grid=GRID), states=tmp_path / "states")
    for name, layer in quantized(one.model).items():
        assert torch.equal(layer.dequantized(), two.model.get_submodule(name).dequantized())
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize(
    "edits", [(GPTQ(grid=GRID),), (AWQ(grid=GRID, samples=2, points=5),), (SmoothQuant(), GPTQ(grid=GRID)), (ZeroQuant(grid=GRID, distill=LayerDistill(steps=3)),)],
    ids=lambda edits: "+".join(e.kind for e in edits),
)  # fmt: skip
def test_a_killed_run_goes_on_behind_the_last_block_bit_for_bit(edits: tuple[Any, ...], tmp_path: Path) -> None:
    whole = build()
    run(whole, *edits)
    stopped = build()
    with pytest.MonkeyPatch.context() as patch:
        plain, calls = calibrate.Unit.outputs, [0]

        def dies(self: Any, j: int) -> Any:
            calls[0] += self.name == "model.layers.1"
            if calls[0] > 3:
                raise KeyboardInterrupt
            return plain(self, j)

        patch.setattr(calibrate.Unit, "outputs", dies)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, *edits, kept=tmp_path / "kept")
    done = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors"))
    assert done == [f"kept/0-{edits[0].kind}/0001.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        again, worked = build(), []
        plain_unit = calibrate.Unit.moments
        patch.setattr(
            calibrate.Unit, "moments", lambda self, *a, **k: worked.append(self.name) or plain_unit(self, *a, **k)
        )
        made = run(again, *edits, kept=tmp_path / "kept")
    assert "model.layers.0" not in worked[:1]
    with torch.no_grad():
        ids = torch.arange(3, 30)[None]
        assert torch.equal(again.model(ids).logits, whole.model(ids).logits)
    packed = quantized(again.model)
    assert set(packed) == set(quantized(whole.model)) == {o for c in made for o in c.outcomes}
    for name, layer in packed.items():
        assert torch.equal(layer.packed.codes, whole.model.get_submodule(name).packed.codes)


def test_it_says_what_memory_it_takes_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    forest, said = build(), Console(record=True, quiet=False, file=io.StringIO(), width=400)
    calibration = Calibration(forest, batches(), console=said)
    GPTQ(grid=GRID).calibrate(forest.model, calibration)
    assert calibration.need is not None and calibration.need.states == 220 * 32 * 4, "no padding is kept"
    assert "220 tokens" in said.export_text()
    monkeypatch.setattr(calibrate, "available", lambda device: 1 << 10)
    fresh = build()
    with pytest.raises(
        FettleError, match=r"calibration: it takes .* lower calibration.samples .* calibration.disk: true"
    ):
        run(fresh, GPTQ(grid=GRID))
    assert not quantized(fresh.model)


class Experts(nn.Module):
    """Two linear experts, of which a router sends nothing to the second."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([plain, copy.deepcopy(plain)])

    def forward(self, x: Tensor) -> Tensor:
        self.experts[1](x[:, :0])
        return self.experts[0](x)


def test_experts_that_saw_too_few_tokens_are_rounded_and_told() -> None:
    forest = build()
    layer = forest.model.model.layers[0]
    layer.mlp = Experts(layer.mlp)
    said = Console(record=True, file=io.StringIO(), width=400)
    calibration = Calibration(forest, batches(), console=said)
    GPTQ(grid=GRID, targets=(r".*experts.*", "q_proj")).calibrate(forest.model, calibration)
    fell = {o.layer: o for o in calibration.fallbacks}
    assert set(fell) == {f"model.layers.0.mlp.experts.1.{n}_proj" for n in ("gate", "up", "down")}
    assert all(o.tokens == 0 and o.error is None and "saw 0 tokens" in o.fallback for o in fell.values())
    assert (
        "experts.1.down_proj: saw 0 tokens of the text, under gptq.least (32): rounded to nearest" in said.export_text()
    )
    layer = forest.model.get_submodule("model.layers.0.mlp.experts.1.up_proj")
    assert torch.isfinite(layer.dequantized()).all()


def test_a_moment_that_cannot_be_factored_falls_back_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x, **_: (x, torch.tensor(1)))
    forest = build()
    (made,) = run(forest, GPTQ(grid=GRID, targets="down_proj"))
    assert len(made.fallbacks) == 2 and all("not positive definite" in o.fallback for o in made.fallbacks)
    nearest = build()
    RTN(grid=GRID, targets="down_proj").apply(nearest.model)
    for name, layer in quantized(forest.model).items():
        assert torch.equal(layer.packed.codes, nearest.model.get_submodule(name).packed.codes)


def test_refusals_are_sentences_and_leave_the_model_as_it_was() -> None:
    with pytest.raises(FettleError, match="gptq: model.layers.0.self_attn.q_proj: group: 7 does not divide rows of 32"):
        run(build(), GPTQ(grid=Grid(group=7)))
    with pytest.raises(FettleError, match="awq: model.layers.0.self_attn.q_proj: group: 7 does not divide rows of 32"):
        run(build(), AWQ(grid=Grid(group=7)))
    for edit in (GPTQ(grid=GRID), AWQ(grid=GRID), HQQ(grid=GRID), RTN(grid=GRID)):
        broken = build()
        broken.model.model.layers[0].self_attn.q_proj.weight[0, 0] = torch.nan
        with pytest.raises(FettleError, match="not finite"):
            run(broken, edit)
    for edit in (GPTQ(), AWQ(), SmoothQuant(), ZeroQuant(distill=LayerDistill())):
        with pytest.raises(FettleError, match=f"{edit.kind} looks at text; put it into a stage of kind: quantize"):
            edit.apply(build().model)
    forest = build()
    NF4(targets="q_proj").apply(forest.model)
    with pytest.raises(FettleError, match="q_proj quantized already"):
        run(forest, GPTQ(grid=GRID))
    assert len(quantized(forest.model)) == 2
    forest = build()
    LoRA(rank=2, targets="v_proj").apply(forest.model)
    with pytest.raises(FettleError, match="put awq before it"):
        run(forest, AWQ(grid=GRID))
    with pytest.raises(FettleError, match="no batch"):
        Calibration(build(), [])


def test_what_cannot_be_scaled_is_listed() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    )
    (made,) = run(Forest(model.eval().requires_grad_(False)), AWQ(grid=GRID, samples=2, points=4))
    assert set(made.left) == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}
    assert all(why.startswith("not scaled: no norm or layer") for why in made.left.values())


MEASURE = """
import io, json, sys, numpy as np, torch
from rich.console import Console
from fettle.core.batch import Example, Node, pack
from fettle.models import memory
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.quantize import GPTQ, Grid
from fettle.quantize.calibrate import Calibration

torch.set_num_threads(1)
forest = load(ModelSpec(path=sys.argv[1], dtype="float32"))
forest.model.requires_grad_(False)
rng = np.random.default_rng(0)
rows = [pack([Example((Node(rng.integers(3, 60, 512).astype(np.int32), np.ones(512, np.float32)),), "x")], 512, 0) for _ in range(13)]
edit = GPTQ(grid=Grid(bits=4), targets=("k_proj",))
forest.hidden(rows[0])  # what the libraries and one block's pass hold for good is there
made = Calibration(forest, rows[1:], console=Console(file=io.StringIO()))
start = memory.resident()
memory.reset_peak()
edit.calibrate(forest.model, made)
print(json.dumps({"grown": memory.measure_peak() - start, "need": made.need.total, "states": made.need.states}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a resettable peak is Linux's")
def test_it_holds_the_activations_of_one_block(tmp_path: Path, tokenizer: Any) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=1, intermediate_size=128,
        vocab_size=len(tokenizer),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print({key: f"{value / 2**20:.1f} MiB" for key, value in found.items()})
    assert found["states"] == 12 * 512 * 512 * 4
    assert found["grown"] < found["need"] + (12 << 20) < 5 * found["states"], "those of all six would not fit"
