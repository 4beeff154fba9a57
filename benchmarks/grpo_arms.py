"""The tasks of the GRPO benchmark, each run in a process of its own: prepare both sides, learn with fettle, learn with TRL.

Both sides take the same prompts in each step, in fettle's order, and write their own answers with their own sampler. So that the
two can be held against each other, fettle's run leaves the tokens of its answers, and TRL can be given them (`rollout_func`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.common import peak_memory

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
    """fettle's run, which leaves the tokens of its answers beside its output."""
    import orjson

    from fettle.train import rollouts

    written: list[list[list[int]]] = []
    leave = rollouts.Rollouts._leave

    def keep(self: Any, phase: Any, answers: Any, asked: Any, made: Any) -> None:
        written.append([list(c.tokens) for c in made])
        leave(self, phase, answers, asked, made)

    rollouts.Rollouts._leave = keep  # type: ignore[method-assign]
    output = Path(job["output"])
    columns = {name: name for name in ("loss", "reward", "grad_norm", "lr", "k3", "gap")} | {
        "rollout": "rollout_seconds"
    }
    found = sides.run_recipe(job, _recipe(job, output), columns)
    Path(f"{output}.answers.json").write_bytes(orjson.dumps(written))
    counts = {"answers": [len(step) for step in written], "tokens": [sum(map(len, step)) for step in written]}
    return found | counts


def _recipe(job: dict[str, Any], output: Path) -> Path:
    folder = Path(job["folder"])
    rest = {
        "kind": "reinforce",
        "data": [{"path": str(folder / "prompts.jsonl"), "max_bad": 1}],
        "reward": {"kind": "function", "name": "benchmarks.grpo_arms:rewarded"},
        "objective": {"kind": "grpo", "gap": 1.0},
        "rollouts": {"prompts": job["prompts"], "answers": job["group"], "max_tokens": job["max_tokens"]},
        "optim": {"lr": job["lr"], "steps": job["steps"], "warmup": 0},
        "batch": {"tokens": job["tokens"]},
    }
    return sides.write_recipe(job, output, [{"kind": "lora", "rank": 8}], rest)


# TRL's side.


def train(job: dict[str, Any], setting: Setting, steps: int, enough: sides.Enough) -> dict[str, Any]:
    """Train with GRPOTrainer, on answers of its own or on those of the file that the job names."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    folder, cuda = Path(job["folder"]), sides.on_cuda(job)
    marks: list[float] = []
    seen: list[dict[str, Any]] = []
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ends = set(json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"])

    def reward(completions: Any, completion_ids: Sequence[Sequence[int]], **rest: Any) -> list[float]:
        """The end token is no part of the text, as in fettle."""
        seen.append({"answers": len(completion_ids), "tokens": sum(map(len, completion_ids))})
        shown = [[t for t in ids if t not in ends and t != tokenizer.eos_token_id] for ids in completion_ids]
        return worth(tokenizer.batch_decode(shown, skip_special_tokens=True))

    taken = json.loads((folder / "taken.json").read_text())
    trainer = GRPOTrainer(
        model=sides.trained_model(folder, setting), reward_funcs=[reward], args=_config(job, setting, steps),
        processing_class=tokenizer, callbacks=[sides.stopwatch(marks, cuda, enough)],
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


def _config(job: dict[str, Any], setting: Setting, steps: int) -> Any:
    """fettle's advantages and divergence."""
    from trl import GRPOConfig

    answers = job["prompts"] * job["group"]
    size = setting.answers or answers
    return GRPOConfig(
        **sides.optimizer(job, job["lr"], steps), per_device_train_batch_size=size,
        gradient_accumulation_steps=answers // size, num_generations=job["group"], max_completion_length=job["max_tokens"],
        temperature=1.0, beta=job["beta"], loss_type="grpo", scale_rewards="group", epsilon=0.2, shuffle_dataset=False,
        bf16=setting.precision == "bf16",
    )  # fmt: skip
