"""The tasks of the SFT benchmark, each run in a process of its own: prepare both sides, train with fettle, train with TRL.

The steps are fettle's: which examples an optimizer step holds is asked of fettle's own corpus, and TRL is given the same
examples in the same steps, tokenized and masked by its own code (`prepare_trl`), laid out in its own ways:

    padded            the step's examples as rows of one batch, padded to the longest
    packed            the step's examples in one row, no padding, each seeing itself only (padding-free)
    packed, one size  the same, the row filled up to the step's size, so that every step has one shape
    wrapped           the same without borders: examples see the ones before them, which is another training
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import clock, fail, peak_memory

EDITS: dict[str, list[dict[str, Any]]] = {"lora": [{"kind": "lora", "rank": 8}], "full": [{"kind": "full"}]}


@dataclass(frozen=True)
class Setting:
    """How TRL trains."""

    layout: str  # 'padded', 'packed', 'packed, one size', 'wrapped'
    precision: str  # 'bf16': weights and arithmetic; 'mixed': float32 weights, bf16 arithmetic; 'fp32'
    attention: str = "sdpa"
    liger: bool = False

    @property
    def same_training(self) -> bool:
        """Whether each example is trained on by itself, as in fettle."""
        return self.layout != "wrapped"

    def __str__(self) -> str:
        words = [self.layout, self.precision, *([self.attention] if self.attention != "sdpa" else [])]
        return ", ".join([*words, *(["liger"] if self.liger else [])])


# Preparing.


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The material, the steps as fettle will make them, and the LoRA weights that both sides start from.

    Writes steps.json: for each step the examples it holds, each {row, tokens, learned}; `learned` are positions of targets.
    A conversation that the chat template cuts into several examples ends the benchmark: TRL would not cut it.
    """
    from benchmarks.flops import Shape
    from benchmarks.material import make
    from fettle.core.batch import IGNORE
    from fettle.export import export
    from fettle.stages import load_recipe

    folder = Path(job["folder"])
    make(folder, job["data"], job["size"])
    stage = load_recipe(_recipe(job | {"mode": "lora"}, folder / "prepare")).stages[0]
    forest, edits = stage.open(None)  # type: ignore[attr-defined]
    corpus = stage.corpus(forest)  # type: ignore[attr-defined]
    steps = []
    for index in range(job["steps"]):
        batch = corpus.batch(index)
        examples = []
        for segment, name in zip(batch.segments, batch.names, strict=True):
            if not name:
                continue
            if "#" in name:
                fail(f"{name}: the chat template cuts this conversation into several examples, which TRL does not do")
            aims = batch.targets[segment.start : segment.stop - 1]
            examples.append({
                "row": int(name.rsplit(":", 1)[1]) - 1,
                "tokens": batch.tokens[segment.start : segment.stop].tolist(),
                "learned": ((aims != IGNORE).nonzero().flatten() + 1).tolist(),
            })  # fmt: skip
        steps.append(examples)
    (folder / "steps.json").write_text(json.dumps(steps))
    adapter = sum(p.numel() for p in forest.model.parameters() if p.requires_grad)
    export(forest, edits, folder / "adapter", "peft")
    fresh = _plain_model(folder)
    return {
        "shape": {"full": Shape.of(fresh).plain(), "lora": Shape.of(fresh, adapter).plain()},
        "parameters": sum(p.numel() for p in fresh.parameters()), "adapter": adapter,
        "vocabulary": len(forest.tokenizer), "fill": corpus.fill(), "dtype": str(forest.model.dtype).removeprefix("torch."),
        "row": corpus.length, "optim": stage.optim.model_dump(),  # type: ignore[attr-defined]
    }  # fmt: skip


def _plain_model(folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True, **how)


def prepare_trl(job: dict[str, Any]) -> dict[str, int]:
    """TRL's own tokens and labels of every example used, by assistant_only_loss; written to trl.json as {row: ...}."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = Path(job["folder"])
    rows = sorted({example["row"] for step in json.loads((folder / "steps.json").read_text()) for example in step})
    talks = [json.loads(line) for line in (folder / "messages.jsonl").read_text().splitlines()]
    plain = [{"messages": [{k: m[k] for k in ("role", "content")} for m in talks[row]["messages"]]} for row in rows]
    trainer = SFTTrainer(
        model=_plain_model(folder),
        args=SFTConfig(
            output_dir=str(folder / "trl"), assistant_only_loss=True, max_length=job["row"], report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(plain),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    made = trainer.train_dataset
    found = {row: {key: made[i][key] for key in ("input_ids", "labels")} for i, row in enumerate(rows)}
    (folder / "trl.json").write_text(json.dumps(found))
    return {"examples": len(made)}


# fettle's side.


def run_fettle(job: dict[str, Any]) -> dict[str, Any]:
    """What `fettle run recipe.yaml` does, and a stopwatch pressed when a step's row is logged."""
    import torch

    from fettle import stages
    from fettle.train import log, loop

    cuda = torch.cuda.is_available() and job["device"] != "cpu"
    marks: list[float] = []

    class Watched(log.Log):
        def row(self, values: dict[str, Any]) -> None:
            super().row(values)
            marks.append(clock(cuda))

    loop.Log = Watched  # type: ignore[misc]
    output = Path(job["output"])
    recipe = _recipe(job, output)
    before = 0 if cuda else peak_memory()  # the run sets the kernel's own high-water mark back to what is held then
    stages.run(stages.load_recipe(recipe))
    rows = log.read_metrics(output)
    return {
        "marks": marks, "peak": max(before, peak_memory(cuda)), "lr": [r["lr"] for r in rows],
        "loss": [r["loss"] for r in rows], "tokens": [r["tokens"] for r in rows], "learned": [r["learned"] for r in rows],
    }  # fmt: skip


def _recipe(job: dict[str, Any], output: Path) -> Path:
    """The recipe of a side of the benchmark; what it does not name is fettle's default."""
    folder = Path(job["folder"])
    path = folder / f"{output.name}.yaml"
    recipe = {
        "model": {"path": str(folder / "model"), "device": job["device"]},
        "edits": EDITS[job["mode"]],
        "data": [{"path": str(folder / "messages.jsonl")}],
        "optim": {"lr": job["lr"][job["mode"]], "steps": job["steps"], "warmup": 0},
        "cache": str(folder / "cache"),  # filled while preparing: both sides find their tokens ready
        "output": str(output),
    }
    if job["tokens"] is not None:
        recipe["batch"] = {"tokens": job["tokens"]}
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


# TRL's side.


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """All steps with one setting."""
    return _train(job, Setting(**job["setting"]), job["steps"])


def calibrate(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds a step of each setting, the mean of up to `timed` steps after `warmup` ones.

    A setting whose mean stands 1.25 times over the best of the others is given up: it will not be chosen.
    """
    import torch

    found: list[dict[str, Any]] = []
    best, warmup = float("inf"), job["warmup"]

    def mean(marks: Sequence[float]) -> float:
        return (marks[-1] - marks[warmup - 1]) / (len(marks) - warmup)

    def hopeless(marks: Sequence[float]) -> bool:
        return len(marks) > warmup and mean(marks) > 1.25 * best

    for setting in (Setting(**s) for s in job["settings"]):
        try:
            marks = _train(job, setting, warmup + job["timed"], hopeless)["marks"]
            found.append({"setting": asdict(setting), "seconds": mean(marks), "steps": len(marks) - warmup})
            best = min(best, mean(marks)) if setting.same_training else best
        except Exception as error:  # whatever does not run here is no candidate, and is listed with its reason
            found.append(
                {"setting": asdict(setting), "error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _train(
    job: dict[str, Any], setting: Setting, steps: int, enough: Callable[[Sequence[float]], bool] = lambda marks: False
) -> dict[str, Any]:
    """Train with SFTTrainer; `enough` may end the run early, by the times at which steps ended."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    folder = Path(job["folder"])
    cuda = torch.cuda.is_available() and job["device"] != "cpu"
    marks: list[float] = []
    groups, examples = _laid_out(folder, setting, steps)

    class InSteps(SFTTrainer):
        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(
                self.train_dataset, batch_sampler=groups, collate_fn=self.data_collator, pin_memory=cuda
            )
            return self.accelerator.prepare(loader)

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            marks.append(clock(cuda))
            control.should_training_stop = control.should_training_stop or enough(marks)

    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = _plain_model(folder, dtype=dtype, attn_implementation=setting.attention)
    if job["mode"] == "lora":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    trainer = InSteps(
        model=model, args=_config(job, setting, steps, cuda), train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Stopwatch()],
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "marks": marks, "peak": peak_memory(cuda), "loss": [row["loss"] for row in logged],
        "lr": [row["learning_rate"] for row in logged], "counted": [row["num_tokens"] for row in logged],
    }  # fmt: skip


def _laid_out(folder: Path, setting: Setting, steps: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Which rows a step holds, and the rows: TRL's own tokens, in the columns that its packing writes."""
    made = json.loads((folder / "trl.json").read_text())
    wanted = json.loads((folder / "steps.json").read_text())[:steps]
    in_steps = [[made[str(example["row"])] for example in step] for step in wanted]
    if setting.layout == "padded":
        rows = [row for step in in_steps for row in step]
        ends = [sum(map(len, in_steps[: i + 1])) for i in range(steps)]
        return [list(range(end - len(step), end)) for end, step in zip(ends, in_steps, strict=True)], rows
    rows = []
    for step in in_steps:
        joined = {key: [value for row in step for value in row[key]] for key in ("input_ids", "labels")}
        sizes = {"seq_lengths": [len(row["input_ids"]) for row in step]} if setting.layout != "wrapped" else {}
        rows.append(joined | sizes)
    return [[i] for i in range(steps)], rows


def _config(job: dict[str, Any], setting: Setting, steps: int, cuda: bool) -> Any:
    """SFTConfig: fettle's optimizer, schedule and clipping; for the rest what is fastest."""
    from trl import SFTConfig

    ours, fixed = job["optim"], setting.layout in ("packed, one size", "wrapped")
    packed = setting.layout != "padded"
    return SFTConfig(
        output_dir=str(job["output"]), max_steps=steps, per_device_train_batch_size=1, max_length=job["row"],
        packing=packed, packing_strategy="wrapped" if setting.layout == "wrapped" else "bfd",
        pad_to_multiple_of=job["row"] if fixed else None,
        dataset_kwargs={"skip_prepare_dataset": True}, bf16=setting.precision != "fp32",
        learning_rate=job["lr"][job["mode"]], lr_scheduler_type=ours["schedule"], warmup_steps=0,
        weight_decay=ours["weight_decay"], adam_beta1=ours["betas"][0], adam_beta2=ours["betas"][1],
        adam_epsilon=ours["eps"], max_grad_norm=ours["clip"],
        optim="adamw_torch_fused", gradient_checkpointing=False, use_liger_kernel=setting.liger,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
        dataloader_pin_memory=cuda, seed=0,
    )  # fmt: skip
