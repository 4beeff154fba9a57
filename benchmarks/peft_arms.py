"""The tasks of the PEFT benchmark, each run in a process of its own: prepare, train with one side's LoRA, count what it saves.

Training is fettle's loop with its forest batches and optimizer in every arm; what differs is who puts the LoRA in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import clock

RANK, ALPHA, LR = 8, 16, 2e-3  # the rate is high: the weights are random, and the curves must have something to fall
OURS = "fettle"


@dataclass(frozen=True)
class Setting:
    """One way to put a LoRA into the model."""

    side: str  # OURS or 'peft'
    weights: str = "float32"  # what the adapter computes with; its masters are float32 in any case
    autocast: bool = False  # the forward pass under torch.autocast, as trainers for PEFT run it

    def __str__(self) -> str:
        return self.side if self.side == OURS else f"{self.weights} adapters" + (", autocast" if self.autocast else "")


SETTINGS = (Setting(OURS), Setting("peft"), Setting("peft", "bfloat16"), Setting("peft", autocast=True))


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The random model, and the tokens of the data, which all arms find ready."""
    from benchmarks.material import make

    make(Path(job["folder"]), job["data"], job["size"])
    forest = opened(job)
    corpus = _corpus(job, forest)
    return {
        "parameters": sum(p.numel() for p in forest.model.parameters()), "row": corpus.length, "fill": corpus.fill(),
        "dtype": str(forest.model.dtype).removeprefix("torch."),
    }  # fmt: skip


def opened(job: dict[str, Any], dtype: str = "bfloat16") -> Any:
    """The model, frozen."""
    from fettle.models.load import load
    from fettle.models.spec import ModelSpec

    forest = load(ModelSpec(path=str(Path(job["folder"]) / "model"), device=job["device"], dtype=dtype))
    forest.model.requires_grad_(False)
    return forest


def _corpus(job: dict[str, Any], forest: Any) -> Any:
    from fettle.data import DataSpec, prepare
    from fettle.stages.tune import BatchSpec

    folder = Path(job["folder"])
    data = [DataSpec(path=str(folder / "messages.jsonl"))]
    return prepare(data, forest.tokenizer, job["tokens"] or BatchSpec().tokens, seed=0, cache=folder / "cache")


# Training.


def train(job: dict[str, Any]) -> dict[str, Any]:
    """All steps with one setting: when each ended, its loss, the peak of memory from the first step on."""
    from fettle.models.memory import measure_peak, reset_peak
    from fettle.train import Job, OptimSpec, fit
    from fettle.train.log import read_metrics

    forest, setting = opened(job), Setting(**job["setting"])
    cuda = forest.device.type == "cuda"
    trained = inject(forest, setting, job["dropout"])
    corpus, folder = _corpus(job, forest), Path(job["output"])
    marks: list[float] = []
    reset_peak()
    fit(Job(
        model=forest, objective=_objective(forest, setting), batches=corpus,  # type: ignore[arg-type]
        optim=OptimSpec(lr=LR, steps=job["steps"], warmup=0), steps=job["steps"], folder=folder, quiet=True,
        on_row=lambda row: marks.append(clock(cuda)),
    ))  # fmt: skip
    rows = read_metrics(folder)
    return {
        "marks": marks, "loss": [row["loss"] for row in rows], "tokens": [row["tokens"] for row in rows],
        "trained": trained, "peak": measure_peak(forest.device),
    }  # fmt: skip


def saved(job: dict[str, Any]) -> int:
    """Bytes that the forward pass over the first batch leaves for the backward pass, weights apart."""
    import torch

    from fettle.models.memory import saved_bytes

    forest, setting = opened(job), Setting(**job["setting"])
    inject(forest, setting, job["dropout"])
    forest.model.train()
    batch, objective = _corpus(job, forest).batch(0), _objective(forest, setting)
    torch.manual_seed(0)
    return saved_bytes(forest.model, lambda: objective(forest, batch).sum)


def inject(forest: Any, setting: Setting, dropout: float) -> int:
    """Put the LoRA in, starting at the same numbers whoever's it is; returns how many weights train."""
    import peft  # in every arm, so that no process is smaller for lacking a library

    from fettle.peft import LoRA

    if setting.side == OURS:
        LoRA(rank=RANK, alpha=ALPHA, dropout=dropout).apply(forest.model)
    else:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        peft.get_peft_model(forest.model, config, autocast_adapter_dtype=setting.weights == "float32")
    named = [(name, p) for name, p in forest.model.named_parameters() if p.requires_grad]
    _start([p for name, p in named if name.endswith(".a") or ".lora_A." in name])
    return sum(p.numel() for _, p in named)


def _start(downs: Sequence[Any]) -> None:
    """Fill every A in the order of the model; every B is zero."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    for a in downs:
        uniform = torch.rand(a.shape, generator=numbers) * 2 - 1
        a.data.copy_(uniform / math.sqrt(a.shape[1]))


def _objective(forest: Any, setting: Setting) -> Callable[[Any, Any], Any]:
    import torch

    from fettle.objectives import SFT

    sft = SFT()

    def loss(model: Any, batch: Any) -> Any:
        with torch.autocast(forest.device.type, torch.bfloat16) if setting.autocast else nullcontext():
            return sft(model, batch)

    return loss
