"""The tasks of the SFT benchmark, each run in a process of its own: prepare both sides, train with fettle, train with TRL.

The steps are fettle's: which examples an optimizer step holds is asked of fettle's own corpus, and TRL is given the same
examples in the same steps, tokenized and masked by its own code (`prepare_trl`), laid out in its own ways:

    padded            the step's examples as rows of one batch, padded to the longest
    packed            the step's examples in one row, no padding, each seeing itself only (padding-free)
    packed, one size  the same, the row filled up to the step's size, so that every step has one shape
    wrapped           the same without borders: examples see the ones before them, which is another training
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.common import fail, peak_memory

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
    fresh = sides.plain_model(folder)
    return {
        "shape": {"full": Shape.of(fresh).plain(), "lora": Shape.of(fresh, adapter).plain()},
        "parameters": sum(p.numel() for p in fresh.parameters()), "adapter": adapter,
        "vocabulary": len(forest.tokenizer), "fill": corpus.fill(), "dtype": str(forest.model.dtype).removeprefix("torch."),
        "row": corpus.length, "optim": stage.optim.model_dump(),  # type: ignore[attr-defined]
    }  # fmt: skip


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
        model=sides.plain_model(folder),
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
    """fettle's run; also its tokens and learned tokens a step."""
    columns = {name: name for name in ("loss", "lr", "tokens", "learned")}
    return sides.run_recipe(job, _recipe(job, Path(job["output"])), columns)


def _recipe(job: dict[str, Any], output: Path) -> Path:
    folder = Path(job["folder"])
    rest = {
        "data": [{"path": str(folder / "messages.jsonl")}],
        "optim": {"lr": job["lr"][job["mode"]], "steps": job["steps"], "warmup": 0},
        "cache": str(folder / "cache"),  # filled while preparing: both sides find their tokens ready
    }
    if job["tokens"] is not None:
        rest["batch"] = {"tokens": job["tokens"]}
    return sides.write_recipe(job, output, EDITS[job["mode"]], rest)


# TRL's side.


def train(job: dict[str, Any], setting: Setting, steps: int, enough: sides.Enough) -> dict[str, Any]:
    """Train with SFTTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    folder, cuda = Path(job["folder"]), sides.on_cuda(job)
    marks: list[float] = []
    sizes, examples = _laid_out(folder, setting, steps)
    trainer = sides.in_steps(SFTTrainer, sizes, cuda)(
        model=sides.trained_model(folder, setting, job["mode"] == "lora"), args=_config(job, setting, steps),
        train_dataset=Dataset.from_list(examples), processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[sides.stopwatch(marks, cuda, enough)],
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "marks": marks, "peak": peak_memory(cuda), "loss": [row["loss"] for row in logged],
        "lr": [row["learning_rate"] for row in logged], "counted": [row["num_tokens"] for row in logged],
    }  # fmt: skip


def _laid_out(folder: Path, setting: Setting, steps: int) -> tuple[list[int], list[dict[str, Any]]]:
    """How many rows each step holds, and the rows: TRL's own tokens, in the columns that its packing writes."""
    made = json.loads((folder / "trl.json").read_text())
    wanted = json.loads((folder / "steps.json").read_text())[:steps]
    in_steps = [[made[str(example["row"])] for example in step] for step in wanted]
    if setting.layout == "padded":
        return [len(step) for step in in_steps], [row for step in in_steps for row in step]
    rows = []
    for step in in_steps:
        joined = {key: [value for row in step for value in row[key]] for key in ("input_ids", "labels")}
        sizes = {"seq_lengths": [len(row["input_ids"]) for row in step]} if setting.layout != "wrapped" else {}
        rows.append(joined | sizes)
    return [1] * steps, rows


def _config(job: dict[str, Any], setting: Setting, steps: int) -> Any:
    from trl import SFTConfig

    fixed, packed = setting.layout in ("packed, one size", "wrapped"), setting.layout != "padded"
    return SFTConfig(
        **sides.optimizer(job, job["lr"][job["mode"]], steps), per_device_train_batch_size=1, max_length=job["row"],
        packing=packed, packing_strategy="wrapped" if setting.layout == "wrapped" else "bfd",
        pad_to_multiple_of=job["row"] if fixed else None, dataset_kwargs={"skip_prepare_dataset": True},
        bf16=setting.precision != "fp32", use_liger_kernel=setting.liger,
    )  # fmt: skip
