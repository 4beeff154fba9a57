"""The two sides of a benchmark of training: `fettle run` with a stopwatch, and TRL's trainers with fettle's optimizer.

All of it runs in a child. A setting of TRL is a frozen dataclass with `precision` ('bf16': weights and arithmetic; 'mixed':
float32 weights, bf16 arithmetic; 'fp32'), and `attention` where that can be chosen.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import clock, peak_memory

Enough = Callable[[Sequence[float]], bool]  # whether a run may end, by the times at which its steps ended
Train = Callable[
    [dict[str, Any], Any, int, Enough], dict[str, Any]
]  # (job, setting, steps, enough) -> {"marks": times, ...}


def on_cuda(job: dict[str, Any]) -> bool:
    """Whether the job runs on a GPU."""
    import torch

    return torch.cuda.is_available() and job["device"] != "cpu"


def plain_model(folder: Path, **how: Any) -> Any:
    """The model of the folder as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True, **how)


# fettle's side.


def write_recipe(job: dict[str, Any], output: Path, edits: list[dict[str, Any]], rest: dict[str, Any]) -> Path:
    """The recipe of a run, beside what it reads; what it does not name is fettle's default."""
    folder = Path(job["folder"])
    path = folder / f"{output.name}.yaml"
    model = {"path": str(folder / "model"), "device": job["device"], "dtype": job.get("dtype", "auto")}
    recipe = {"model": model, "edits": edits, "output": str(output), **rest}
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


def run_recipe(job: dict[str, Any], recipe: Path, figures: dict[str, str]) -> dict[str, Any]:
    """What `fettle run recipe.yaml` does, and a stopwatch pressed when a step's row is logged.

    `figures` are named after the columns of metrics.jsonl that they hold, a value a step.
    """
    from fettle import stages
    from fettle.train import log, loop

    cuda = on_cuda(job)
    marks: list[float] = []

    class Watched(log.Log):
        def row(self, values: dict[str, Any]) -> None:
            super().row(values)
            marks.append(clock(cuda))

    loop.Log = Watched  # type: ignore[misc]
    before = 0 if cuda else peak_memory()  # the run sets the kernel's own high-water mark back to what is held then
    stages.run(stages.load_recipe(recipe))
    rows = log.read_metrics(Path(job["output"]))
    found = {name: [row[column] for row in rows] for name, column in figures.items()}
    return {"marks": marks, "peak": max(before, peak_memory(cuda)), **found}


# TRL's side.


def trained_model(folder: Path, setting: Any, lora: bool = True) -> Any:
    """The model in the setting's type and attention, with the LoRA that both sides start from."""
    import torch
    from peft import PeftModel

    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = plain_model(folder, dtype=dtype, attn_implementation=getattr(setting, "attention", "sdpa"))
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True) if lora else model


def optimizer(job: dict[str, Any], lr: float, steps: int) -> dict[str, Any]:
    """Arguments of any of TRL's configs: fettle's optimizer, schedule and clipping; for the rest what is fastest."""
    ours, cuda = job["optim"], on_cuda(job)
    return {
        "output_dir": str(job["output"]), "max_steps": steps, "learning_rate": lr, "lr_scheduler_type": ours["schedule"],
        "warmup_steps": 0, "weight_decay": ours["weight_decay"], "adam_beta1": ours["betas"][0], "adam_beta2": ours["betas"][1],
        "adam_epsilon": ours["eps"], "max_grad_norm": ours["clip"], "optim": "adamw_torch_fused",
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": not cuda, "dataloader_pin_memory": cuda, "seed": 0,
    }  # fmt: skip


def stopwatch(marks: list[float], cuda: bool, enough: Enough) -> Any:
    """A callback that notes when each step ended, and ends the run where that is `enough`."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            marks.append(clock(cuda))
            control.should_training_stop = control.should_training_stop or enough(marks)

    return Stopwatch()


def in_steps(trainer: type, sizes: Sequence[int], cuda: bool) -> type:
    """The trainer with its rows in their order, so many in each step."""
    from torch.utils.data import DataLoader

    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    groups = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    class InSteps(trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(
                self.train_dataset, batch_sampler=groups, collate_fn=self.data_collator, pin_memory=cuda
            )
            return self.accelerator.prepare(loader)

    return InSteps


def trl_tasks(kind: type, train: Train) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The tasks of TRL's side, whose settings are of that kind: all steps with one of them, and the search for the fastest."""
    return {
        "run_trl": lambda job: train(job, kind(**job["setting"]), job["steps"], lambda marks: False),
        "calibrate": lambda job: _calibrate(job, [kind(**fields) for fields in job["settings"]], train),
    }


def _calibrate(job: dict[str, Any], settings: Iterable[Any], train: Train) -> list[dict[str, Any]]:
    """Seconds a step of each setting, the mean of up to `timed` steps after `warmup` ones.

    A setting whose mean stands 1.25 times over the best of the others is given up: it will not be chosen. One that is another
    training (`same_training`) is no such best.
    """
    import torch

    found: list[dict[str, Any]] = []
    best, warmup = float("inf"), job["warmup"]

    def mean(marks: Sequence[float]) -> float:
        return (marks[-1] - marks[warmup - 1]) / (len(marks) - warmup)

    def hopeless(marks: Sequence[float]) -> bool:
        return len(marks) > warmup and mean(marks) > 1.25 * best

    for setting in settings:
        try:
            marks = train(job, setting, warmup + job["timed"], hopeless)["marks"]
            found.append({"setting": asdict(setting), "seconds": mean(marks), "steps": len(marks) - warmup})
            best = min(best, mean(marks)) if getattr(setting, "same_training", True) else best
        except Exception as error:  # whatever does not run here is no candidate, and is listed with its reason
            found.append(
                {"setting": asdict(setting), "error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found
