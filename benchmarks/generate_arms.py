"""The tasks of the generation benchmark, each run in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.common import clock, peak_memory

ROWS = 16
LONGEST = 512  # tokens of an answer
EVEN = 96  # tokens of each answer where all are of one length
LOADS = ("uneven", "even")
Setting = dict[str, str]


def settings(device: str) -> list[Setting]:
    """How transformers may run."""
    flash = ["flash_attention_2"] if device == "cuda" and importlib.util.find_spec("flash_attn") else []
    return [
        {"cache": cache, "attention": attention, "order": order}
        for cache in ("dynamic", "static")
        for attention in ("eager", "sdpa", *(flash if cache == "dynamic" else []))
        for order in ("by length", "as they come")
    ]


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The random model, and the requests of every model: `count` questions, and how many tokens their answers have.

    Both models answer with as many tokens: as the file's answers have under the tokenizer that was trained on them.
    """
    from benchmarks.material import conversations, make
    from fettle.generate import prompter
    from fettle.models.load import load
    from fettle.models.spec import ModelSpec

    folder = Path(job["folder"])
    make(folder, job["data"], job["size"])
    trained = load(ModelSpec(path=str(folder / "model"), device="cpu"))
    talks = [t["messages"] for t in conversations(job["data"])][: job["count"]]
    answers = [len(prompter(trained.tokenizer).encoder.ids(talk[1]["content"])) for talk in talks]
    lengths = [max(1, min(length, LONGEST)) for length in answers]
    for size in job["sizes"]:
        render = prompter(load(ModelSpec(path=_path(folder, size), device="cpu")).tokenizer)
        prompts = [render.chat(talk[:1])[-400:] for talk in talks]
        rows = [{"prompt": p, "uneven": n, "even": EVEN} for p, n in zip(prompts, lengths, strict=True)]
        _file(folder, size).write_text(json.dumps(rows))
    return {
        "requests": len(talks), "even": EVEN, "dtype": str(trained.model.dtype).removeprefix("torch."),
        "lengths": {"least": min(lengths), "median": sorted(lengths)[len(lengths) // 2], "most": max(lengths), "sum": sum(lengths)},
    }  # fmt: skip


def _path(folder: Path, size: str) -> str:
    return size if size == "fettle/tiny" else str(folder / "model")


def _file(folder: Path, size: str) -> Path:
    return folder / f"requests-{size.replace('/', '-')}.json"


def _opened(job: dict[str, Any]) -> tuple[Any, list[tuple[list[int], int]]]:
    """The model as fettle loads it, and (prompt, tokens of its answer) of each request."""
    from fettle.models.load import load
    from fettle.models.spec import ModelSpec

    folder = Path(job["folder"])
    dtype = {"dtype": job["dtype"]} if "dtype" in job else {}
    forest = load(ModelSpec(path=_path(folder, job["size"]), device=job["device"], **dtype))
    rows = json.loads(_file(folder, job["size"]).read_text())[: job.get("first")]
    return forest, [(row["prompt"], row[job["load"]]) for row in rows]


class Watch:
    """Seconds and processor time from its making on."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.began, self.worked = cuda, clock(cuda), time.process_time()

    def result(self, tokens: int) -> dict[str, Any]:
        """Tokens a second, the peak of memory, and the share of the processor time of its threads that the process had."""
        import torch

        seconds = clock(self.cuda) - self.began
        cores = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
        busy = (time.process_time() - self.worked) / seconds / cores
        return {"rate": tokens / seconds, "seconds": seconds, "peak": peak_memory(self.cuda), "busy": busy}


def run_fettle(job: dict[str, Any]) -> dict[str, Any]:
    """The engine, as `generate` uses it."""
    forest, asked = _opened(job)
    _fettle(forest, [(prompt, 4) for prompt, _ in asked[:ROWS]])
    watch = Watch(forest.device.type == "cuda")
    texts = _fettle(forest, asked)
    return watch.result(sum(map(len, texts)))


def _fettle(forest: Any, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    from fettle.generate import Sampling
    from fettle.generate.request import Request, limits
    from fettle.generate.sample import answered

    requests = [Request(i, list(prompt), i, most) for i, (prompt, most) in enumerate(asked)]
    for _ in answered(forest, requests, limits(forest, Sampling(), ends=frozenset()), rows=ROWS):
        pass
    return [r.tokens for r in requests]


def run_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """transformers.generate, ROWS requests a batch; a batch ends when the longest of its answers does."""
    forest, asked = _opened(job)
    setting: Setting = job["setting"]
    try:
        _transformers(forest, [(prompt, 4) for prompt, _ in asked[:ROWS]], setting)
        watch = Watch(forest.device.type == "cuda")
        texts = _transformers(forest, asked, setting)
    except (RuntimeError, ValueError, ImportError) as error:
        return {"setting": setting, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
    return {"setting": setting} | watch.result(sum(map(len, texts)))


def _transformers(forest: Any, asked: list[tuple[list[int], int]], setting: Setting) -> list[list[int]]:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Enough(StoppingCriteria):
        """Ends each row where its answer is long enough, as an end token would."""

        def __init__(self, start: int, lengths: list[int]) -> None:
            self.start, self.lengths = start, torch.tensor(lengths, device=forest.device)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] - self.start >= self.lengths

    model, found = forest.model, {}
    model.set_attn_implementation(setting["attention"])
    model.generation_config.eos_token_id = None
    order = range(len(asked))
    if setting["order"] == "by length":
        order = sorted(order, key=lambda i: len(asked[i][0]), reverse=True)
    for group in (list(order)[i : i + ROWS] for i in range(0, len(asked), ROWS)):
        width = max(len(asked[i][0]) for i in group)
        ids = torch.tensor([[0] * (width - len(asked[i][0])) + asked[i][0] for i in group], device=forest.device)
        mask = torch.tensor(
            [[0] * (width - len(asked[i][0])) + [1] * len(asked[i][0]) for i in group], device=forest.device
        )
        lengths = [asked[i][1] for i in group]
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=max(lengths), do_sample=False, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Enough(width, lengths)]),
                cache_implementation="static" if setting["cache"] == "static" else None,
            )[:, width:]  # fmt: skip
        for i, row, length in zip(group, out.tolist(), lengths, strict=True):
            found[i] = row[:length]
    return [found[i] for i in range(len(asked))]


def alike(job: dict[str, Any]) -> dict[str, Any]:
    """The share of tokens that both sides write alike in float32, up to where two texts part."""
    forest, asked = _opened(job | {"dtype": "float32", "first": ROWS})
    asked = [(prompt, min(most, 64)) for prompt, most in asked]
    ours = _fettle(forest, asked)
    theirs = _transformers(forest, asked, {"cache": "dynamic", "attention": "eager", "order": "as they come"})
    same = 0
    for one, two in zip(ours, theirs, strict=True):
        same += next((k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))
    return {"share": same / sum(map(len, ours))}
