"""What quantizing came to: the row of a table of methods, every layer's error, and a page to read."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fettle.core.families import Edit
from fettle.core.files import write_bytes, write_json
from fettle.models.forest import Forest
from fettle.quantize.calibrate import Calibration, Outcome
from fettle.quantize.linear import describe
from fettle.stages.report import REPORT, table

FINDINGS = "findings.json"
WORST = 10  # layers that the page names


def findings(forest: Forest, edits: Sequence[Edit], calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """What a manifest says of a quantized model: bits, layers, what fell back, what was left alone, and on what machine."""
    import transformers

    import fettle

    outcomes = {o.layer: o for c in calibrations for o in c.outcomes.values()}
    left = {what: why for c in calibrations for what, why in c.left.items()}
    return {
        "method": method(edits),
        "quantized": describe(forest.model),
        "layers": [asdict(o) for o in outcomes.values()],
        "fallbacks": {o.layer: o.fallback for o in outcomes.values() if o.fallback},
        "left_alone": left,
        "output_error": mean_error(list(outcomes.values())),
        "calibration_tokens": max((sum(b.useful for b in c.batches) for c in calibrations), default=0),
        "versions": {
            "fettle": fettle.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "machine": platform.machine(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "device": str(forest.device), "dtype": str(forest.dtype).removeprefix("torch."),
        },
    }  # fmt: skip


def method(edits: Sequence[Any]) -> dict[str, Any]:
    """Name, bits of weights, activations and cache (None: not rounded), group and symmetry of a list of edits."""
    packing = [edit for edit in edits if edit.role in ("quantizes", "simulates") and hasattr(edit, "quantize")]
    usual = {
        "nf4": lambda edit: {"bits": 4, "group": edit.block, "symmetric": True},
        "llm_int8": lambda _: {"bits": 8, "group": "row", "symmetric": True},
    }
    said: dict[str, Any] = {"bits": None, "group": None, "symmetric": None}
    for edit in packing:
        grid = getattr(edit, "grid", None)
        own = {"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric} if grid is not None else said
        said = usual[edit.kind](edit) if edit.kind in usual else own
    rounding = [a for edit in edits if (a := getattr(edit, "activations", None)) is not None]
    held = [c.bits for edit in edits if (c := getattr(edit, "cache", None)) is not None]
    return {
        "name": "+".join(edit.kind for edit in edits), **said, "activations": rounding[-1].bits if rounding else None,
        "by": _ranged(rounding[-1]) if rounding else None, "cache": held[-1] if held else None,
    }  # fmt: skip


def _ranged(grid: Any) -> str:
    """What shares a range of activations: a token, a call's tensor, or for ever a layer."""
    return "static" if grid.static else "token" if grid.group == "row" else str(grid.group)


def said_bits(how: dict[str, Any]) -> str:
    """Bits of weights, activations and cache, as in W4A8KV8; 16 stands for what is not rounded."""
    cache = how.get("cache")
    return f"W{how['bits'] or 16}A{how['activations'] or 16}" + (f"KV{cache}" if cache else "")


def mean_error(outcomes: Sequence[Outcome]) -> float | None:
    """The mean over layers of |W x - W^ x^|^2 / |W x|^2; None where nothing was measured."""
    known = [o.error for o in outcomes if o.error is not None]
    return math.fsum(known) / len(known) if known else None


def write_findings(folder: Path, facts: dict[str, Any]) -> None:
    """Write `folder`/findings.json and report.md, and print the row."""
    write_json(
        folder / FINDINGS,
        {key: facts.get(key) for key in ("recipe", "made_of", "base_hash", "versions")} | {"row": row(facts)},
    )
    write_bytes(folder / REPORT, page(folder.name, facts).encode())
    shown = Table(title=f"quantized: {folder.name}", title_justify="left", show_header=False)
    for what, value in _lines(facts):
        shown.add_row(what, value)
    Console(stderr=True).print(shown)


def row(facts: dict[str, Any]) -> dict[str, Any]:
    """The figures that methods are compared by."""
    packed = facts["quantized"]
    return {
        **facts["method"], "effective_bits": packed.get("bits"), "layers": packed.get("layers"), "left_dense": packed.get("left_dense"),
        "packed_bytes": packed.get("bytes"), "file_bytes": facts.get("file_bytes"), "peak_bytes": facts["peak_bytes"],
        "seconds": facts["seconds"], "calibration_tokens": facts["calibration_tokens"], "output_error": facts["output_error"],
        "fallbacks": facts["fallbacks"], "left_alone": facts["left_alone"], "worst": worst(facts["layers"]),
        "evaluation_before": facts["evaluation_before"], "evaluation": facts["evaluation"],
    }  # fmt: skip


def worst(layers: Sequence[dict[str, Any]], count: int = WORST) -> list[dict[str, Any]]:
    """The layers of the greatest error."""
    known = [layer for layer in layers if layer["error"] is not None]
    return sorted(known, key=lambda layer: -layer["error"])[:count]


def page(name: str, facts: dict[str, Any]) -> str:
    """The text of the report, in Markdown."""
    lines = [f"# {name}", "", table(["", ""], [list(line) for line in _lines(facts)])]
    if facts["evaluation"]:
        lines += ["", "## Before and after", "", _scores(facts)]
    if facts["fallbacks"]:
        lines += [
            "",
            "## Fell back to rounding",
            "",
            table(["layer", "why"], [list(i) for i in facts["fallbacks"].items()]),
        ]
    if facts["left_alone"]:
        lines += ["", "## Left alone", "", table(["what", "why"], [list(i) for i in facts["left_alone"].items()])]
    if bad := worst(facts["layers"]):
        rows = [[layer["layer"], f"{layer['error']:.3g}", f"{layer['tokens']:,}"] for layer in bad]
        lines += [
            "",
            "## Layers of the greatest output error",
            "",
            table(["layer", "share of its output", "tokens seen"], rows),
        ]
    return "\n".join(lines) + "\n"


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    how, packed = facts["method"], facts["quantized"]
    error = facts["output_error"]
    found = [
        ("method", how["name"]),
        (
            "weights",
            said_bits(how)
            + (
                ""
                if how["bits"] is None
                else f", group {how['group']}, {'symmetric' if how['symmetric'] else 'with zero points'}"
            ),
        ),
        ("bits a weight, with scales", f"{packed.get('bits', 0):.3f} in {packed.get('layers', 0)} layers"),
        ("packed weights", f"{packed.get('bytes', 0) / 2**20:,.1f} MiB"),
        (
            "mean output error",
            "not measured (no calibration text)" if error is None else f"{error:.3g} of the outputs' size",
        ),
        ("fell back to rounding", f"{len(facts['fallbacks'])} layers"),
        ("time", f"{facts['seconds']:,.1f} s"),
        ("peak memory", f"{facts['peak_bytes'] / 2**30:.2f} GiB"),
    ]
    return found + [
        (f"{b['evaluation']}: {b['metric']}", f"{b['mean']:.4g} -> {a['mean']:.4g}") for b, a in _pairs(facts)
    ]


def _pairs(facts: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    before = {(b["evaluation"], b["metric"]): b for b in facts["evaluation_before"]}
    return [(before[key], a) for a in facts["evaluation"] if (key := (a["evaluation"], a["metric"])) in before]


def _scores(facts: dict[str, Any]) -> str:
    def said(score: dict[str, Any]) -> str:
        bounds = "" if score.get("low") is None else f" [{score['low']:.4g}, {score['high']:.4g}]"
        return f"{score['mean']:.4g}{bounds}"

    rows = [[b["evaluation"], b["metric"], said(b), said(a)] for b, a in _pairs(facts)]
    return table(["evaluation", "metric", "before", "after"], rows)
