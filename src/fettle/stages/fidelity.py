"""How near a model still is to the one it was made from, and how fast it answers: what quantizing cost, and what it gave.

    perplexity      exp of the mean negative log-likelihood of a held-out text, window by window, so that two models pair up
    KL              of each token, sum_v p_v (log p_v - log q_v), p the full model's, q this one's; its mean and 99th percentile
    agreement       the share of tokens of which both find the same one likeliest
    speed           tokens/s of a prompt and of an answer, through whatever kernels the layers pick; the two models in turn

Both models are in memory, and each window of logits only as long as it is looked at.

As a program it is one arm of `fettle quantize compare`: python -m fettle.stages.fidelity FOLDER
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fettle.core.batch import IGNORE, Batch, Example, Node, pack
from fettle.core.config import validate
from fettle.core.files import MANIFEST, read_json, write_json
from fettle.evaluate.perplexity import Perplexity, window_batch, windows_of
from fettle.generate import Sampling, generate
from fettle.models.forest import Forest
from fettle.models.head import chunks
from fettle.models.load import load
from fettle.models.memory import weight_bytes
from fettle.models.spec import ModelSpec
from fettle.quantize.linear import describe, quantized
from fettle.stages.artifact import TENSORS, open_model
from fettle.stages.findings import FINDINGS, method

TASK, RECIPE, ROW = "task.json", "recipe.json", "row.json"  # of an arm's folder
PROMPT, ANSWER, PAIRS = 256, 32, 5  # tokens, tokens, measurements of each model
Speeds = dict[str, float]


# Quality.


@torch.no_grad()
def fidelity(forest: Forest, full: Forest, spec: Perplexity) -> dict[str, Any]:
    """`forest` against `full` on a text: nats and tokens of each window, KL and agreement over all tokens."""
    rows, about = windows_of(full, spec)
    length, pad = max(len(w.tokens) for w in rows), full.tokenizer.pad_token_id or 0
    nats, kls, same = [], [], []
    for model in (forest.model, full.model):
        model.eval()
    for window in rows:
        batch = window_batch(window, length, pad)
        logps, kl, agrees = _compared(forest, full, batch)
        nats.append(-float(logps.double().sum()))
        kls.append(kl)
        same.append(agrees)
    kl = torch.cat(kls).double()
    return {
        "windows": [[n, w.scored] for n, w in zip(nats, rows, strict=True)], "perplexity": float(np.exp(sum(nats) / about["tokens"])),
        "kl": float(kl.mean()), "kl_p99": float(kl.quantile(0.99)), "agreement": float(torch.cat(same).double().mean()), "text": about,
    }  # fmt: skip


def _compared(forest: Forest, full: Forest, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the learned targets of a batch [N]: log-probabilities by `forest`, KL from `full`, whether the likeliest is the same."""
    learned = (batch.targets != IGNORE).nonzero()[:, 0]
    targets = batch.targets[learned].to(forest.device)
    mine, theirs = (f.hidden(batch)[learned.to(f.device)] for f in (forest, full))
    found = []
    for at in chunks(len(learned), full.head.vocabulary(theirs[:1]), forest.device):
        q = forest.head.logits(mine[at]).float().log_softmax(-1)
        p = full.head.logits(theirs[at]).float().log_softmax(-1).to(q.device)
        found.append((q.gather(1, targets[at, None])[:, 0], (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)))
    logps, kl, same = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logps, kl, same


# Speed.


def speeds(forest: Forest, full: Forest) -> tuple[Speeds, Speeds]:
    """Tokens/s of `forest` and of `full`: the median of runs in turn, one row, after one that warms up."""
    measured: dict[str, list[tuple[float, float]]] = {}
    for _ in range(PAIRS + 1):
        for name, measure in (("prefill", _prefill), ("decode", _decode)):
            measured.setdefault(name, []).append((measure(forest), measure(full)))
    mine, theirs = (
        {name: statistics.median(pair[i] for pair in pairs[1:]) for name, pairs in measured.items()} for i in (0, 1)
    )
    return mine, theirs


def _prefill(forest: Forest) -> float:
    count = min(PROMPT, forest.context or PROMPT)
    tokens = np.arange(5, 5 + count, dtype=np.int32) % len(forest.tokenizer)
    batch = pack([Example((Node(tokens, np.zeros(count, np.float32)),), "prompt")], count, 0)
    with torch.no_grad():
        return count / _seconds(lambda: forest.hidden(batch))


def _decode(forest: Forest) -> float:
    made: list[int] = []
    taken = _seconds(lambda: made.extend(generate(forest, [list(range(5, 21))], Sampling(max_tokens=ANSWER))[0].tokens))
    return max(1, len(made)) / taken


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# One arm.


def measured(place: Path) -> dict[str, Any]:
    """The row of an arm: what was done (after its run, where it has one), what that came to."""
    task = read_json(place / TASK)
    full = load(validate(ModelSpec, task["base"], str(place / TASK)))
    text: Perplexity = validate(Perplexity, task["text"], str(place / TASK))
    if not (place / RECIPE).exists():
        same = fidelity(full, full, text)
        return {"stage": None, **method(()), **same, **_held(full), "speed": speeds(full, full)[0], "speed_full": None}
    forest, edits = open_model(str(place))
    facts = read_json(place / "artifact" / MANIFEST)
    told = read_json(place / FINDINGS)["row"] if (place / FINDINGS).exists() else {}
    kept = (
        "seconds",
        "peak_bytes",
        "calibration_tokens",
        "output_error",
        "fallbacks",
        "left_alone",
        "left_dense",
        "evaluation",
    )
    held = _held(forest)  # before a kernel arranges the weights
    own, theirs = speeds(forest, full)
    return {
        "stage": facts["recipe"]["kind"], **method(edits), **_marks(edits), **_objective(facts), **fidelity(forest, full, text), **held,
        **{key: told.get(key, facts.get(key)) for key in kept}, "errors": {o["layer"]: o["error"] for o in facts.get("layers", ())},
        "artifact_bytes": (place / "artifact" / TENSORS).stat().st_size, "speed": own, "speed_full": theirs, "kernels": _kernels(forest),
    }  # fmt: skip


def _held(forest: Forest) -> dict[str, Any]:
    """Bytes of the model as it would be stored, and bits a weight with scales: of the packed layers, and of all."""
    packed, weights = describe(forest.model), sum(p.numel() for p in forest.model.parameters())
    return {
        "model_bytes": weight_bytes(forest.model), "bits_packed": packed.get("bits"), "layers": packed.get("layers", 0),
        "bits_all": 8 * weight_bytes(forest.model) / (weights + packed.get("weights", 0)),
    }  # fmt: skip


def _marks(edits: Any) -> dict[str, Any]:
    """What else tells two arms apart."""
    kinds = [edit.kind for edit in edits]
    return {"smoothed": "smoothquant" in kinds, "outliers": "outliers" in kinds}


def _objective(facts: dict[str, Any]) -> dict[str, Any]:
    objective = facts["recipe"].get("objective")
    return {"objective": objective and objective["kind"]}


def _kernels(forest: Forest) -> dict[str, int]:
    """What multiplies one row, by how many layers."""
    return dict(Counter(layer.kernel(1) for layer in quantized(forest.model).values()))


def main(place: Path) -> None:
    """Run an arm's recipe, where it has one and it has not run, and leave its row."""
    from fettle.stages.pipeline import load_recipe, run

    if (place / RECIPE).exists():
        run(load_recipe(place / RECIPE), resume=True)
    write_json(place / ROW, measured(place))


if __name__ == "__main__":
    from fettle.core.errors import FettleError

    try:
        main(Path(sys.argv[1]))
    except FettleError as error:
        sys.exit(str(error))
