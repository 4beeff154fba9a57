"""The tasks of the quantization benchmark, each run in a process of its own: single layers, generation, quantizers.

A layer is timed cold, as it is met in a model: an arm is as many copies of the layer as the last cache cannot hold, called one
after the other. Arms take turns, so that what drifts falls on all of them.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import clock, fail, peak_memory

GRID = {"bits": 4, "group": 128, "symmetric": False}
SMALL = GRID | {"group": 32}  # what divides the rows of a model to try with
# fettle's arms, as a recipe would have them.
OURS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"kind": "rtn", "grid": {"bits": 8}},
    "int4": {"kind": "rtn", "grid": GRID},
    "w8a8": {"kind": "rtn", "grid": {"bits": 8}, "activations": {"bits": 8}},
    "nf4": {"kind": "nf4"},
}
PEERS = ("bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "torchao int4", "torchao w8a8")


def edit_of(recipe: dict[str, Any], quick: bool = False) -> Any:
    """The edit that a recipe would name so; None for nothing."""
    from pydantic import TypeAdapter

    from fettle.stages.edits import AnyEdit

    if not recipe:
        return None
    small = {"grid": SMALL} if quick and recipe.get("grid") == GRID else {}
    return TypeAdapter(AnyEdit).validate_python(recipe | small)


# Layers.


def layers(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds a call of each arm by the number of rows, one figure a round; bytes held, and what multiplied."""
    import torch

    from fettle.models.allocator import keep_pages

    keep_pages()  # as loading a model does
    torch.set_grad_enabled(False)
    outputs, inputs = job["shape"]
    torch.manual_seed(0)
    base = torch.nn.Linear(inputs, outputs, bias=False).bfloat16().requires_grad_(False)
    arms: dict[str, list[Callable[[Any], Any]]] = {}
    told: dict[str, dict[str, Any]] = {}
    for name in (*OURS, *PEERS):
        try:
            layer = _ours(base, name) if name in OURS else _peer(base, name)
            y = layer(torch.randn(1, inputs).bfloat16())  # lays the weight out
            assert y.shape == (1, outputs)
        except Exception as error:  # a peer that does not run here is listed with its reason
            if name in OURS:
                raise
            told[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
            continue
        size = _bytes(layer)
        arms[name] = [layer, *(copy.deepcopy(layer) for _ in range(job["cold"] // size))]
        told[name] = {"bytes": size, "seconds": {str(rows): [] for rows in job["rows"]}}
        if hasattr(layer, "kernel"):
            told[name]["kernels"] = {str(rows): layer.kernel(rows) for rows in job["rows"]}
    for rows in job["rows"]:
        x = torch.randn(rows, inputs).bfloat16()
        calls = {name: _enough(copies, x, job["seconds"]) for name, copies in arms.items()}
        for _ in range(job["rounds"]):
            for name, copies in arms.items():
                told[name]["seconds"][str(rows)].append(_timed(copies, x, calls[name]))
    return {"arms": told, "load": os.getloadavg()[0]}


def _ours(base: Any, name: str) -> Any:
    from fettle.models.weight import read_weight
    from fettle.quantize.linear import QuantizedLinear

    edit = edit_of(OURS[name])
    if edit is None:
        return copy.deepcopy(base)
    return QuantizedLinear(base, edit.quantize(read_weight(base)), edit, None, edit.activations)


def _peer(base: Any, name: str) -> Any:
    library, kind = name.split()
    if library == "bitsandbytes":
        return _bitsandbytes(base, kind)
    from torch.nn import Sequential
    from torchao import quantization

    held = Sequential(copy.deepcopy(base))
    quantization.quantize_(held, _torchao(quantization, kind))
    return held


def _torchao(quantization: Any, kind: str) -> Any:
    if kind == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # where its CPU kernel is

        return PrototypeInt4WeightOnlyConfig(group_size=128)
    return (
        quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.Int8DynamicActivationInt8WeightConfig()
    )


def _bitsandbytes(base: Any, kind: str) -> Any:
    import bitsandbytes as bnb
    import torch

    outputs, inputs = base.weight.shape
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(base.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(base.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


def _bytes(layer: Any) -> int:
    """Of parameters and buffers; of a tensor that wraps others, theirs."""
    tensors = [*layer.parameters(), *layer.buffers()]
    inner = [
        getattr(t, name) for t in tensors if hasattr(t, "__tensor_flatten__") for name in t.__tensor_flatten__()[0]
    ]
    plain = [t for t in tensors if not hasattr(t, "__tensor_flatten__")]
    return sum(t.numel() * t.element_size() for t in (*inner, *plain)) or layer.weight.numel()


def _enough(copies: list[Callable[[Any], Any]], x: Any, seconds: float) -> int:
    """Calls that take about `seconds`, at least each copy once."""
    _timed(copies, x, len(copies))
    return max(len(copies), int(seconds / _timed(copies, x, len(copies))))


def _timed(copies: list[Callable[[Any], Any]], x: Any, calls: int) -> float:
    began = time.perf_counter()
    for i in range(calls):
        copies[i % len(copies)](x)
    return (time.perf_counter() - began) / calls


# Generation.


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The random model of a size, and its tokenizer."""
    from benchmarks.material import make

    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, job["data"], job["size"])
    return {"parameters": sum(p.numel() for p in _opened(job).model.parameters())}


def _opened(job: dict[str, Any]) -> Any:
    from fettle.models.load import load
    from fettle.models.spec import ModelSpec

    forest = load(ModelSpec(path=str(Path(job["folder"]) / "model"), device="cpu", dtype="bfloat16"))
    forest.model.requires_grad_(False)
    return forest


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of reading a prompt and of writing, at each number of prompts; bytes of weights, and the peak."""
    import torch

    from fettle.generate.request import end_tokens
    from fettle.generate.sample import Sampling
    from fettle.generate.sample import generate as answer
    from fettle.models.memory import measure_peak, reset_peak, weight_bytes

    forest = _opened(job)
    forest.model.get_output_embeddings().weight[list(end_tokens(forest))] = 0  # so that no answer ends early
    if (edit := edit_of(OURS[job["arm"]], job["quick"])) is not None:
        edit.apply(forest.model)
    draw = torch.Generator().manual_seed(0)
    rates: dict[str, dict[str, list[float]]] = {}
    reset_peak()
    for count in job["batches"]:
        prompts = torch.randint(10, forest.config.vocab_size, (count, job["prompt"]), generator=draw).tolist()
        found: dict[str, list[float]] = {"prefill": [], "decode": []}
        for turn in range(job["turns"] + 1):
            seconds = []
            for most in (1, 1 + job["new"]):
                began = clock()
                done = answer(forest, prompts, Sampling(max_tokens=most))
                seconds.append(clock() - began)
                if any(len(one.tokens) != most for one in done):
                    fail(f"{job['arm']}: an answer ended after {[len(one.tokens) for one in done]} of {most} tokens")
            if turn:  # the first lays weights out and warms up
                found["prefill"].append(count * job["prompt"] / seconds[0])
                found["decode"].append(count * job["new"] / (seconds[1] - seconds[0]))
        rates[str(count)] = {what: statistics.median(values) for what, values in found.items()}
    return {"rates": rates, "weights": weight_bytes(forest.model), "peak": measure_peak(), "load": os.getloadavg()[0]}


# Quantizers.


def quantizer(job: dict[str, Any]) -> dict[str, Any]:
    """How long a method takes for a model, what it holds at most beside it, and how many layers fell back."""
    import torch
    from rich.console import Console

    from fettle.data import DataSpec
    from fettle.data import prepare as lay_out
    from fettle.models.memory import measure_peak, reset_peak, resident, weight_bytes
    from fettle.quantize.calibrate import Calibration
    from fettle.quantize.linear import describe

    forest, folder = _opened(job), Path(job["folder"])
    edit = edit_of(job["edit"], job["quick"])
    corpus = lay_out(
        [DataSpec(path=str(folder / "messages.jsonl"))], forest.tokenizer, job["length"], seed=0, cache=folder / "cache"
    )
    batches = [corpus.batch(i) for i in range(job["samples"])]
    with torch.no_grad():  # weights are pages of the file until somebody reads them
        forest.hidden(batches[0])
    before, dense = resident(), weight_bytes(forest.model)
    reset_peak()
    with open(os.devnull, "w") as nowhere:
        calibration = Calibration(forest, batches, console=Console(file=nowhere))
        began = clock()
        edit.calibrate(forest.model, calibration)
        seconds = clock() - began
    return {
        "seconds": seconds, "peak": max(0, measure_peak() - before), "dense": dense, "process": peak_memory(),
        "stated": calibration.need.total if calibration.need else None, "bits": describe(forest.model)["bits"],
        "tokens": sum(b.useful for b in batches), "fallbacks": len(calibration.fallbacks), "load": os.getloadavg()[0],
    }  # fmt: skip
