"""The tasks of the GRPO benchmark, each run in a process of its own: prepare both sides, learn with fettle, learn with TRL.

Both sides take the same prompts in each step, in fettle's order, and write their own answers with their own sampler. So that the
two can be held against each other, fettle's run leaves the tokens of its answers, and TRL can be given them (`rollout_func`).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import clock, peak_memory

LONGEST = 96  # tokens of a prompt
ENDS = 64  # one token of so many ends an answer, so that lengths spread as 1/64 a token


@dataclass(frozen=True)
class Setting:
    """How TRL trains: `answers` in one forward pass (None: all of a step)."""

    answers: int | None
    precision: str  # 'bf16': weights and arithmetic; 'fp32'

    def __str__(self) -> str:
        return f"{'all answers of a step' if self.answers is None else f'{self.answers} answers'} at a time, {self.precision}"


def worth(texts: Sequence[str]) -> list[float]:
    """The reward of both sides: the share of letters that are vowels."""
    return [sum(letter in "aeiou" for letter in text.lower()) / max(len(text), 1) for text in texts]


def rewarded(prompts: Any, answers: Sequence[str], **columns: Any) -> list[float]:
    """`worth`, as a recipe's reward function."""
    return worth(answers)


# Preparing.


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The material, the prompts in the order in which fettle takes them, and the LoRA weights that both sides start from."""
    from benchmarks.material import conversations, model_for
    from fettle.export import export
    from fettle.stages import load_recipe

    folder = Path(job["folder"])
    talks = conversations(job["data"])
    model_for([m for talk in talks for m in talk["messages"]], folder, job["size"])
    _let_end(folder / "model")
    rows = [{"messages": talk["messages"][:1]} for talk in talks if talk["messages"][0]["role"] == "user"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage: Any = load_recipe(_recipe(job, folder / "prepare")).stages[0]
    forest, edits = stage.open(None)
    prompts = stage.prompts(forest)
    taken = [prompts.at(i) for i in range(job["steps"] * job["prompts"])]
    (folder / "taken.json").write_text(
        json.dumps([{"messages": list(p.asked), "tokens": p.tokens.tolist()} for p in taken])
    )
    export(forest, edits, folder / "adapter", "peft")
    return {
        "parameters": sum(p.numel() for p in forest.model.parameters() if not p.requires_grad),
        "dtype": str(forest.model.dtype).removeprefix("torch."), "row": stage.batch.tokens,
        "optim": stage.optim.model_dump(), "beta": stage.objective.kl.beta,
        "prompt": sum(len(p.tokens) for p in taken) / len(taken),
    }  # fmt: skip


def _let_end(model: Path) -> None:
    """Let one token of every ENDS end an answer, in the model's generation config, which both sides read."""
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    tokens = json.loads((model / "config.json").read_text())["vocab_size"]
    config["eos_token_id"] = list(range(ENDS // 2, tokens, ENDS))
    path.write_text(json.dumps(config))


# fettle's side.


def run_fettle(job: dict[str, Any]) -> dict[str, Any]:
    """What `fettle run recipe.yaml` does, a stopwatch pressed when a step's row is logged, and the answers' tokens kept."""
    import orjson
    import torch

    from fettle import stages
    from fettle.train import log, loop, rollouts

    cuda = torch.cuda.is_available() and job["device"] != "cpu"
    marks: list[float] = []
    written: list[list[list[int]]] = []

    class Watched(log.Log):
        def row(self, values: dict[str, Any]) -> None:
            super().row(values)
            marks.append(clock(cuda))

    loop.Log = Watched  # type: ignore[misc]
    leave = rollouts.Rollouts._leave

    def keep(self: Any, phase: Any, answers: Any, asked: Any, made: Any) -> None:
        written.append([list(c.tokens) for c in made])
        leave(self, phase, answers, asked, made)

    rollouts.Rollouts._leave = keep  # type: ignore[method-assign]
    output = Path(job["output"])
    recipe = _recipe(job, output)
    before = 0 if cuda else peak_memory()  # the run sets the kernel's own high-water mark back to what is held then
    stages.run(stages.load_recipe(recipe))
    rows = log.read_metrics(output)
    Path(f"{output}.answers.json").write_bytes(orjson.dumps(written))
    return {
        "marks": marks, "peak": max(before, peak_memory(cuda)), "answers": [len(step) for step in written],
        "tokens": [sum(map(len, step)) for step in written], "gap": [r["gap"] for r in rows],
        "rollout": [r["rollout_seconds"] for r in rows], **{key: [r[key] for r in rows] for key in ("loss", "reward", "grad_norm", "lr", "k3")},
    }  # fmt: skip


def _recipe(job: dict[str, Any], output: Path) -> Path:
    """The recipe of fettle's side; what it does not name is fettle's default."""
    folder = Path(job["folder"])
    path = folder / f"{output.name}.yaml"
    recipe = {
        "kind": "reinforce",
        "model": {"path": str(folder / "model"), "device": job["device"], "dtype": job.get("dtype", "auto")},
        "edits": [{"kind": "lora", "rank": 8}],
        "data": [{"path": str(folder / "prompts.jsonl"), "max_bad": 1}],
        "reward": {"kind": "function", "name": "benchmarks.grpo_arms:rewarded"},
        "objective": {"kind": "grpo", "gap": 1.0},
        "rollouts": {"prompts": job["prompts"], "answers": job["group"], "max_tokens": job["max_tokens"]},
        "optim": {"lr": job["lr"], "steps": job["steps"], "warmup": 0},
        "batch": {"tokens": job["tokens"]},
        "output": str(output),
    }
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


# TRL's side.


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """All steps with one setting."""
    return _train(job, Setting(**job["setting"]), job["steps"])


def calibrate(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds a step of each setting, the mean of `timed` steps after `warmup` ones."""
    import torch

    found: list[dict[str, Any]] = []
    for setting in (Setting(**s) for s in job["settings"]):
        try:
            marks = _train(job, setting, job["warmup"] + job["timed"])["marks"]
            found.append({"setting": asdict(setting), "seconds": (marks[-1] - marks[job["warmup"] - 1]) / job["timed"]})
        except Exception as error:  # whatever does not run here is no candidate, and is listed with its reason
            found.append(
                {"setting": asdict(setting), "error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _train(job: dict[str, Any], setting: Setting, steps: int) -> dict[str, Any]:
    """Train with GRPOTrainer, on answers of its own or on those of the file that the job names."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    folder = Path(job["folder"])
    cuda = torch.cuda.is_available() and job["device"] != "cpu"
    marks: list[float] = []
    seen: list[dict[str, Any]] = []

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            marks.append(clock(cuda))

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ends = set(json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"])

    def reward(completions: Any, completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
        """The end token is no part of the text, as in fettle."""
        seen.append({"answers": len(completion_ids), "tokens": sum(map(len, completion_ids))})
        shown = [[t for t in ids if t not in ends and t != tokenizer.eos_token_id] for ids in completion_ids]
        return worth(tokenizer.batch_decode(shown, skip_special_tokens=True))

    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", local_files_only=True, dtype=dtype, attn_implementation="sdpa"
    )
    taken = json.loads((folder / "taken.json").read_text())
    trainer = GRPOTrainer(
        model=PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True), reward_funcs=[reward],
        args=_config(job, setting, steps, cuda), processing_class=tokenizer, callbacks=[Stopwatch()],
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in taken]), rollout_func=_given(job, taken),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "marks": marks, "peak": peak_memory(cuda), "answers": [s["answers"] for s in seen], "tokens": [s["tokens"] for s in seen],
        **{key: [row[name] for row in logged] for key, name in (("loss", "loss"), ("reward", "reward"), ("grad_norm", "grad_norm"), ("lr", "learning_rate"), ("k3", "kl"))},
    }  # fmt: skip


def _given(job: dict[str, Any], taken: list[dict[str, Any]]) -> Callable[[Any, Any], dict[str, Any]] | None:
    """What hands fettle's answers to TRL, step by step; None where TRL writes its own."""
    if "given" not in job:
        return None
    steps = iter(json.loads(Path(f"{job['given']}.answers.json").read_text()))
    n, count = job["group"], [0]

    def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
        answers = next(steps)
        own = taken[count[0] : count[0] + job["prompts"]]
        count[0] += job["prompts"]
        tokens = [row["tokens"] for row in own for _ in range(n)]
        assert [row["messages"] for row in own for _ in range(n)] == list(prompts)
        return {"prompt_ids": tokens, "completion_ids": answers, "logprobs": [[0.0] * len(a) for a in answers]}

    return rollout


def _config(job: dict[str, Any], setting: Setting, steps: int, cuda: bool) -> Any:
    """GRPOConfig: fettle's optimizer, schedule, clipping, advantages and divergence; for the rest what is fastest."""
    from trl import GRPOConfig

    ours, answers = job["optim"], job["prompts"] * job["group"]
    size = setting.answers or answers
    return GRPOConfig(
        output_dir=str(job["output"]), max_steps=steps, per_device_train_batch_size=size,
        gradient_accumulation_steps=answers // size, num_generations=job["group"], max_completion_length=job["max_tokens"],
        temperature=1.0, beta=job["beta"], loss_type="grpo", scale_rewards="group", epsilon=0.2, shuffle_dataset=False,
        learning_rate=job["lr"], lr_scheduler_type=ours["schedule"], warmup_steps=0, weight_decay=ours["weight_decay"],
        adam_beta1=ours["betas"][0], adam_beta2=ours["betas"][1], adam_epsilon=ours["eps"], max_grad_norm=ours["clip"],
        optim="adamw_torch_fused", gradient_checkpointing=False, bf16=setting.precision == "bf16", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not cuda, dataloader_pin_memory=cuda, seed=0,
    )  # fmt: skip
