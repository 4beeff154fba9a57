"""The tasks of the DPO benchmark, each run in a process of its own: prepare both sides, train with fettle, train with TRL.

The steps are fettle's: which pairs an optimizer step holds is asked of fettle's own corpus, and TRL is given the same pairs in the
same steps. TRL renders and tokenizes them by its own code (`prepare_trl`), but for the line feed that the chat template writes
behind an answer, which fettle does not learn. TRL pads, and its padding-free layout is switched off in this version; what is left
to choose is how many pairs go through the model at a time, with their gradients summed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import clock, peak_memory


@dataclass(frozen=True)
class Setting:
    """How TRL trains."""

    pairs: int | None  # that go through the model at a time; None: all of a step
    precision: str  # 'bf16': weights and arithmetic; 'fp32'
    attention: str = "sdpa"

    def __str__(self) -> str:
        many = "all pairs" if self.pairs is None else f"{self.pairs} pair{'s' if self.pairs > 1 else ''}"
        return f"{many} at a time, {self.precision}" + (f", {self.attention}" if self.attention != "sdpa" else "")


# Preparing.


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The material, the steps as fettle will make them, and the LoRA weights that both sides start from.

    Writes steps.json: for each step the pairs it holds, each {row, prompt, chosen, rejected} in tokens.
    """
    from benchmarks.material import make_pairs
    from fettle.export import export
    from fettle.stages import load_recipe

    folder = Path(job["folder"])
    make_pairs(folder, job["data"], job["size"])
    stage = load_recipe(_recipe(job, folder / "prepare")).stages[0]
    forest, edits = stage.open(None)  # type: ignore[attr-defined]
    corpus = stage.corpus(forest)  # type: ignore[attr-defined]
    steps = [_pairs(corpus.batch(index)) for index in range(job["steps"])]
    (folder / "steps.json").write_text(json.dumps(steps))
    export(forest, edits, folder / "adapter", "peft")
    fresh = _plain_model(folder)
    return {
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "adapter": sum(p.numel() for p in forest.model.parameters() if p.requires_grad),
        "vocabulary": len(forest.tokenizer), "fill": corpus.fill(), "dtype": str(forest.model.dtype).removeprefix("torch."),
        "row": corpus.length, "rows": sum(c.kept for c in corpus.counts), "too_long": sum(c.too_long for c in corpus.counts),
        "optim": stage.optim.model_dump(), "beta": stage.objective.beta,  # type: ignore[attr-defined]
    }  # fmt: skip


def _pairs(batch: Any) -> list[dict[str, Any]]:
    """The pairs of a batch as tokens: of three segments, the prompt cut one token short, and that token before each answer."""
    named = [(s, name) for s, name in zip(batch.segments, batch.names, strict=True) if name]
    found = []
    for (prompt, name), (better, _), (worse, _) in zip(named[::3], named[1::3], named[2::3], strict=True):
        first, chosen, rejected = (batch.tokens[s.start : s.stop].tolist() for s in (prompt, better, worse))
        if chosen[0] != rejected[0]:
            raise SystemExit(f"{name}: the answers do not begin after the same token")
        row = int(name.rsplit(":", 1)[1]) - 1
        found.append({"row": row, "prompt": [*first, chosen[0]], "chosen": chosen[1:], "rejected": rejected[1:]})
    return found


def _plain_model(folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True, **how)


def prepare_trl(job: dict[str, Any]) -> dict[str, int]:
    """TRL's own tokens of every pair used, written to trl.json as {row: ...}."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = Path(job["folder"])
    rows = sorted({pair["row"] for step in json.loads((folder / "steps.json").read_text()) for pair in step})
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=_peft_model(folder, Setting(None, "fp32")),
        args=DPOConfig(output_dir=str(folder / "trl"), max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([pairs[row] for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    found = {
        row: {name: trainer.train_dataset[i][column] for name, column in names.items()} for i, row in enumerate(rows)
    }
    (folder / "trl.json").write_text(json.dumps(found))
    (newline,) = trainer.processing_class.encode("\n", add_special_tokens=False)
    return {"pairs": len(found), "newline": newline}


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
        "loss": [r["loss"] for r in rows], "margin": [r["margin"] for r in rows], "pairs": [r["learned"] for r in rows],
    }  # fmt: skip


def _recipe(job: dict[str, Any], output: Path) -> Path:
    """The recipe of a side of the benchmark; what it does not name is fettle's default."""
    folder = Path(job["folder"])
    path = folder / f"{output.name}.yaml"
    recipe = {
        "model": {"path": str(folder / "model"), "device": job["device"]},
        "edits": [{"kind": "lora", "rank": 8}],
        "data": [{"path": str(folder / "pairs.jsonl")}],
        "objective": {"kind": "dpo"},
        "optim": {"lr": job["lr"], "steps": job["steps"], "warmup": 0},
        "batch": {"tokens": job["tokens"]},
        "cache": str(folder / "cache"),  # filled while preparing: both sides find their tokens ready
        "output": str(output),
    }
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
            best = min(best, mean(marks))
        except Exception as error:  # whatever does not run here is no candidate, and is listed with its reason
            found.append(
                {"setting": asdict(setting), "error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _peft_model(folder: Path, setting: Setting) -> Any:
    import torch
    from peft import PeftModel

    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = _plain_model(folder, dtype=dtype, attn_implementation=setting.attention)
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


def _train(
    job: dict[str, Any], setting: Setting, steps: int, enough: Callable[[Sequence[float]], bool] = lambda marks: False
) -> dict[str, Any]:
    """Train with DPOTrainer; `enough` may end the run early, by the times at which steps ended."""
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOTrainer

    folder = Path(job["folder"])
    cuda = torch.cuda.is_available() and job["device"] != "cpu"
    marks: list[float] = []
    margins: list[float] = []
    wanted = json.loads((folder / "steps.json").read_text())[:steps]
    ends = [sum(map(len, wanted[: i + 1])) for i in range(steps)]
    groups = [list(range(end - len(step), end)) for end, step in zip(ends, wanted, strict=True)]
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}

    class InSteps(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset  # in tokens already

        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(
                self.train_dataset, batch_sampler=groups, collate_fn=self.data_collator, pin_memory=cuda
            )
            return self.accelerator.prepare(loader)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if setting.pairs is None:
                return super().training_step(model, inputs, num_items_in_batch)
            model.train()
            parts = _parts(self._prepare_inputs(inputs), setting.pairs)
            total = torch.zeros((), device=self.accelerator.device)
            for part, share in parts:
                loss = self.compute_loss(model, part) * share
                self.accelerator.backward(loss)
                total += loss.detach()
            return total

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            marks.append(clock(cuda))
            control.should_training_stop = control.should_training_stop or enough(marks)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "rewards/margins" in logs:
                margins.append(logs["rewards/margins"])

    pairs = [{column: pair[name] for column, name in columns.items()} for step in wanted for pair in step]
    trainer = InSteps(
        model=_peft_model(folder, setting), args=_config(job, setting, steps, cuda), train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[Stopwatch()],
    )  # fmt: skip
    trainer.model.delete_adapter(
        "ref"
    )  # a copy of an adapter that changes nothing yet: without it the reference is the base
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "marks": marks, "peak": peak_memory(cuda), "loss": [row["loss"] for row in logged], "margin": margins,
        "lr": [row["learning_rate"] for row in logged], "pairs": [len(step) for step in wanted[: len(marks)]],
    }  # fmt: skip


def _parts(inputs: dict[str, Any], pairs: int) -> list[tuple[dict[str, Any], float]]:
    """A step's inputs, `pairs` at a time, each part padded no further than it needs, with its share of the mean."""
    import torch

    many = len(inputs["input_ids"]) // 2
    found = []
    for start in range(0, many, pairs):
        index = list(range(start, min(start + pairs, many)))
        rows = torch.tensor([*index, *(i + many for i in index)], device=inputs["input_ids"].device)
        longest = int(inputs["attention_mask"][rows].sum(1).max())
        found.append(({key: value[rows][:, :longest] for key, value in inputs.items()}, len(index) / many))
    return found


def _config(job: dict[str, Any], setting: Setting, steps: int, cuda: bool) -> Any:
    """DPOConfig: fettle's optimizer, schedule and clipping; for the rest what is fastest."""
    from trl import DPOConfig

    ours = job["optim"]
    return DPOConfig(
        output_dir=str(job["output"]), max_steps=steps, per_device_train_batch_size=1, max_length=None, beta=job["beta"],
        bf16=setting.precision != "fp32", learning_rate=job["lr"], lr_scheduler_type=ours["schedule"], warmup_steps=0,
        weight_decay=ours["weight_decay"], adam_beta1=ours["betas"][0], adam_beta2=ours["betas"][1],
        adam_epsilon=ours["eps"], max_grad_norm=ours["clip"], optim="adamw_torch_fused", gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda,
        dataloader_pin_memory=cuda, seed=0,
    )  # fmt: skip
