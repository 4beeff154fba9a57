"""The tasks of the DPO benchmark, each run in a process of its own: prepare both sides, train with fettle, train with TRL.

The steps are fettle's: which pairs an optimizer step holds is asked of fettle's own corpus, and TRL is given the same pairs in the
same steps. TRL renders and tokenizes them by its own code (`prepare_trl`), but for the line feed that the chat template writes
behind an answer, which fettle does not learn. TRL pads, and its padding-free layout is switched off in this version; what is left
to choose is how many pairs go through the model at a time, with their gradients summed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.common import peak_memory


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
    fresh = sides.plain_model(folder)
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


def prepare_trl(job: dict[str, Any]) -> dict[str, int]:
    """TRL's own tokens of every pair used, written to trl.json as {row: ...}."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = Path(job["folder"])
    rows = sorted({pair["row"] for step in json.loads((folder / "steps.json").read_text()) for pair in step})
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=sides.trained_model(folder, Setting(None, "fp32")),
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
    """fettle's run; also its margins and pairs a step."""
    columns = {"loss": "loss", "lr": "lr", "margin": "margin", "pairs": "learned"}
    return sides.run_recipe(job, _recipe(job, Path(job["output"])), columns)


def _recipe(job: dict[str, Any], output: Path) -> Path:
    folder = Path(job["folder"])
    rest = {
        "data": [{"path": str(folder / "pairs.jsonl")}],
        "objective": {"kind": "dpo"},
        "optim": {"lr": job["lr"], "steps": job["steps"], "warmup": 0},
        "batch": {"tokens": job["tokens"]},
        "cache": str(folder / "cache"),  # filled while preparing: both sides find their tokens ready
    }
    return sides.write_recipe(job, output, [{"kind": "lora", "rank": 8}], rest)


# TRL's side.


def train(job: dict[str, Any], setting: Setting, steps: int, enough: sides.Enough) -> dict[str, Any]:
    """Train with DPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOTrainer

    folder, cuda = Path(job["folder"]), sides.on_cuda(job)
    marks: list[float] = []
    margins: list[float] = []
    wanted = json.loads((folder / "steps.json").read_text())[:steps]
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}

    class InParts(sides.in_steps(DPOTrainer, [len(step) for step in wanted], cuda)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset  # in tokens already

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

    class Margins(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "rewards/margins" in logs:
                margins.append(logs["rewards/margins"])

    pairs = [{column: pair[name] for column, name in columns.items()} for step in wanted for pair in step]
    trainer = InParts(
        model=sides.trained_model(folder, setting), args=_config(job, setting, steps), train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[sides.stopwatch(marks, cuda, enough), Margins()],
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


def _config(job: dict[str, Any], setting: Setting, steps: int) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        **sides.optimizer(job, job["lr"], steps), per_device_train_batch_size=1, max_length=None, beta=job["beta"],
        bf16=setting.precision != "fp32",
    )  # fmt: skip
