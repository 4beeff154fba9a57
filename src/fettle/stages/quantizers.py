"""Compare quantizers: one recipe with several edits (arms), each against the same full model on the same held-out text.

An arm is a name and what it changes in the recipe (stages/compare.py). One that says a `kind` of its own is another stage, and takes
of the recipe its model, its scores, and its calibration text as its data. `after: ARM` makes an arm begin from another one,
merged into plain weights: how a model that was tuned is quantized afterwards::

    int4:          {edits: [{kind: rtn, grid: {bits: 4, group: 64}}]}
    tuned:         {kind: tune, edits: [{kind: full}], optim: {lr: 3.0e-4, steps: 100}}
    tuned, int4:   {after: tuned, edits: [{kind: rtn, grid: {bits: 4, group: 64}}]}

Every arm is a process of its own (fidelity.py), one that fails is told and the others go on, one that ended is not run again.

findings.json     header, a row an arm and seed, the verdicts
bits.png          quality against bits
layers.png        output error by layer
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console

from fettle.core.config import Document, read
from fettle.core.errors import FettleError
from fettle.core.files import read_json, sha256, write_json
from fettle.core.spec import nearest
from fettle.data import content_hash
from fettle.evaluate import Perplexity
from fettle.evaluate.perplexity import windows_of
from fettle.models.load import base_hash, folder_of, load
from fettle.stages.compare import Arms, place_of
from fettle.stages.fidelity import RECIPE, ROW, TASK
from fettle.stages.pipeline import AnyStage, load_recipe
from fettle.stages.quantize import Quantize
from fettle.stages.quantizers_page import draw_bits, draw_layers, tables
from fettle.stages.verdicts import verdicts

FULL, AFTER, MERGED = "full precision", "after", "model"
FINDINGS, BITS, LAYERS = "findings.json", "bits.png", "layers.png"
SHARED = ("model", "evaluate", "cache")  # what a stage of another kind takes of the recipe
UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
Rows = list[dict[str, Any]]


def compare_quantizers(
    recipe: Path,
    arms: Arms,
    folder: Path,
    overrides: Sequence[str] = (),
    seeds: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every arm over the seeds; leaves findings.json and two pictures in `folder`, and returns what the former says.

    FettleError where a recipe is wrong, before the first run, where no text is left to measure on, or where every arm failed.
    """
    console = console or Console()
    base, text, document = _read(recipe, overrides)
    plans = {
        (arm, seed): _plan(document, arm, changes, seed, folder)
        for arm, changes in arms.items()
        for seed in range(seeds)
    }
    for arm, seed in plans:
        _checked(recipe, plans, arm, seed)
    task = {"base": base.model.model_dump(mode="json"), "text": text.model_dump(mode="json")}
    rows, failed = [_ran(FULL, 0, None, task, folder, console)], {}
    for (arm, seed), plan in plans.items():
        try:
            rows.append(_ran(arm, seed, plan, task, folder, console))
        except FettleError as error:
            failed[arm] = str(error)
            console.print(f"  {error}", style="red", markup=False)
    if len(rows) == 1:
        raise FettleError(f"{recipe}: every arm failed; the first said: {next(iter(failed.values()))}")
    judged = verdicts(rows)
    found = {"header": header(base, text), "rows": rows, "verdicts": judged, "failed": failed}
    write_json(folder / FINDINGS, found)
    draw_bits(rows, folder / BITS)
    draw_layers(rows, folder / LAYERS)
    for shown in tables(rows):
        console.print(shown)
    for verdict in judged:
        console.print(f"[bold]{verdict['says']}: {verdict['verdict']}[/bold]", highlight=False)
        for line in verdict["evidence"]:
            console.print(f"  {line}", markup=False, highlight=False)
    return found


# Arms.


def _read(recipe: Path, overrides: Sequence[str]) -> tuple[Quantize, Perplexity, Document]:
    """The recipe, its held-out text, and the document to make arms of."""
    (base,) = load_recipe(recipe, overrides, kind="quantize").stages
    if not isinstance(base, Quantize):
        raise FettleError(f"{recipe}: expected a recipe of kind: quantize, found kind: {base.kind}")
    texts = [spec for spec in base.evaluate if isinstance(spec, Perplexity)]
    if not texts:
        raise FettleError(
            f"{recipe}: evaluate: a comparison needs a held-out text; add {{kind: perplexity, path: held.txt}}"
        )
    document = read(recipe)
    document.data.setdefault("kind", "quantize")
    document = document.override(AnyStage, overrides)
    others = [e for e in document.data["evaluate"] if e.get("kind") != "perplexity"]
    return base, texts[0], Document(document.data | {"evaluate": others}, document.source)


def _plan(document: Document, arm: str, changes: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """An arm's recipe as plain data."""
    said = [change.replace("{seed}", str(seed)) for change in changes]
    after = next((orjson.loads(c.partition("=")[2]) for c in said if c.startswith(f"{AFTER}=")), None)
    said = [change for change in said if not change.startswith(f"{AFTER}=")]
    data = dict(document.data)
    if any(change.startswith("kind=") for change in said):
        data = {key: data[key] for key in SHARED if key in data} | {
            "data": (data.get("calibration") or {}).get("data", [])
        }
    elif data.get("calibration"):
        data["calibration"] = data["calibration"] | {"seed": data["calibration"].get("seed", 0) + seed}
    data |= {"seed": data.get("seed", 0) + seed, "output": str(place_of(folder, arm, seed))}
    made: dict[str, Any] = Document(data, f"arm '{arm}'").override(AnyStage, said).data
    return made | ({AFTER: after} if after else {})


def _checked(recipe: Path, plans: Mapping[tuple[str, int], dict[str, Any]], arm: str, seed: int) -> None:
    """FettleError where an arm is no recipe, or begins from one that is not run before it."""
    plan = dict(plans[arm, seed])
    if (after := plan.pop(AFTER, None)) is not None:
        earlier = [name for name, number in plans if number == seed][: [n for n, s in plans if s == seed].index(arm)]
        if after not in earlier:
            raise FettleError(f"arm '{arm}': after: there is no arm '{after}' before it: {nearest(after, earlier)}")
    Document(plan, f"{recipe}: arm '{arm}'").validate(AnyStage)


def _ran(
    arm: str, seed: int, plan: dict[str, Any] | None, task: dict[str, Any], folder: Path, console: Console
) -> dict[str, Any]:
    """The row of an arm, which is run where it has not been."""
    place = place_of(folder, arm, seed)
    plan = None if plan is None else dict(plan)
    if (after := plan.pop(AFTER, None) if plan else None) is not None:
        assert plan is not None
        plan["model"] = _with_path(plan.get("model"), _merged(place_of(folder, after, seed)))
    if not _ended(place, plan, task):
        console.print(f"[bold]{arm}[/bold], seed {seed}", highlight=False)
        write_json(place / TASK, task)
        if plan is not None:
            write_json(place / RECIPE, plan)
        command = [sys.executable, "-m", "fettle.stages.fidelity", str(place)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise FettleError((done.stderr.strip().splitlines() or [f"{arm}: exit code {done.returncode}"])[-1])
    return {"arm": arm, "seed": seed, AFTER: after, **read_json(place / ROW)}


def _with_path(model: Any, path: Path) -> dict[str, Any]:
    return {**(model if isinstance(model, dict) else {}), "path": str(path)}


def _ended(place: Path, plan: dict[str, Any] | None, task: dict[str, Any]) -> bool:
    """Whether a run ended here. FettleError where it was another one."""
    for file, now in ((RECIPE, plan), (TASK, task)):
        if (place / file).exists() and read_json(place / file) != orjson.loads(orjson.dumps(now)):
            raise FettleError(
                f"{place}: holds another run (see its {file}); remove the folder, or choose another output"
            )
    return (place / ROW).exists()


def _merged(place: Path) -> Path:
    """An arm's model in plain weights, made once."""
    if not (place / MERGED / "config.json").exists():
        command = [sys.executable, "-m", "fettle.cli", "export", str(place), "--to", "hf", "-o", str(place / MERGED)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise FettleError((done.stderr.strip().splitlines() or [f"{place}: cannot be merged"])[-1])
    return place / MERGED


# What figures mean nothing without.


def header(base: Quantize, text: Perplexity) -> dict[str, Any]:
    """Model, text, calibration, versions and machine."""
    import transformers

    import fettle

    full = load(base.model)
    _, about = windows_of(full, text)
    known = base.model.config is None
    calibration = base.calibration
    return {
        "model": {
            "path": base.model.path, "hash": base_hash(folder_of(base.model.path, base.model.revision)) if known else None,
            "dtype": str(full.dtype).removeprefix("torch."),
        },
        "text": {"path": text.path, "sha256": sha256(Path(text.path)), **about},
        "tokenizer": {"class": type(full.tokenizer).__name__, "size": len(full.tokenizer)},
        "calibration": calibration and {
            "data": [[source.path, content_hash(source)] for source in calibration.data],
            "samples": calibration.samples, "length": calibration.length, "seed": calibration.seed,
        },
        "versions": {
            "fettle": fettle.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": _processor(), "units": _units(), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
            "device": str(full.device),
        },
    }  # fmt: skip


def _cpu_lines(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(key)), "")


def _processor() -> str:
    return _cpu_lines("model name") or platform.processor() or platform.machine()


def _units() -> list[str]:
    there = set((_cpu_lines("flags") or _cpu_lines("features")).split())
    return [unit for unit in UNITS if unit in there]
