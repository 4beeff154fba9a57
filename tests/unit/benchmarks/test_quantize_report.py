"""The figures of the quantization benchmark: ratios are of neighbours, the claim is about the slower layer, noise is told."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks import quantize_report as report

FACTS = {
    "machine": {
        "cpu": "a CPU", "threads": 2, "bf16_units": [], "memory_gib": 8.0, "gpu": None, "system": "Linux", "load": 0.1,
    },
    "versions": {"torch": "2"},
}  # fmt: skip
ASKED = argparse.Namespace(quick=False)


def layer(shape: tuple[int, int], threads: int, int4: float, load: float = 0.2) -> dict[str, Any]:
    def arm(times: list[float], **more: Any) -> dict[str, Any]:
        return {"bytes": 1 << 20, "seconds": {"1": times, "128": [10 * t for t in times]}, **more}

    arms = {
        "bf16": arm([1e-3, 2e-3, 1e-3]), "int8": arm([1e-3, 2e-3, 1e-3], kernels={"1": "int8", "128": "plain"}),
        "int4": arm([1e-3 / int4, 2e-3 / int4, 1e-3 / int4]), "torchao int8": {"error": "ImportError: none here"},
    }  # fmt: skip
    return {"shape": shape, "threads": threads, "arms": arms, "load": load}


def run(decode: float) -> dict[str, Any]:
    return {"rates": {"1": {"prefill": 100.0, "decode": decode}}, "weights": 1 << 20, "peak": 2 << 20, "load": 0.1}


def found(load: float = 0.2) -> dict[str, Any]:
    method = {
        "seconds": 2.0, "peak": 3 << 20, "dense": 4 << 20, "process": 5 << 20, "stated": None, "bits": 4.25, "tokens": 9,
        "fallbacks": 1, "load": 0.1,
    }  # fmt: skip
    return {
        "layers": [layer((4096, 4096), 1, 4.0, load), layer((4096, 11008), 1, 2.5)],
        "generate": {
            "size": "100m", "made": {"parameters": 110_000_000}, "prompt": 512, "new": 64,
            "runs": {"bf16": [run(10.0), run(20.0)], "int8": [run(20.0), run(40.0)]},
        },
        "quantizers": {"samples": 32, "length": 512, "sizes": {"100m": {"made": {"parameters": 110_000_000}, "methods": {"gptq": method}}}},
    }  # fmt: skip


def test_ratios_are_of_neighbours_and_the_claim_is_about_the_slower_layer() -> None:
    result = report.summary(ASKED, FACTS, found())
    json.dumps(result)
    assert result["layers"][0]["speed"]["1"]["int4"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert result["ratio"] == 2.5 and result["layers"][0]["errors"] == {"torchao int8": "ImportError: none here"}
    told = report.line(result)["speed_over_bf16"]
    assert told["generate"]["int8"]["1"] == {"prefill": 1.0, "decode": 2.0}
    assert told["layers"]["4096x11008, 1 threads"]["1"]["int4"] == 2.5


def test_the_page_says_what_did_not_run_what_was_made_and_whether_the_aim_is_reached() -> None:
    text = report.section(report.summary(ASKED, FACTS, found()))
    assert "at least 2.50 (1.5 needed: reached)" in text and "not quiet" not in text
    assert "int8 makes the weight for 128 rows; torchao int8 did not run: ImportError: none here." in text
    assert "| int8 | 100 (1.00 (1.00 - 1.00)) | 30 (2.00 (2.00 - 2.00)) | 1 | 2 |" in text
    assert "| gptq, 110M | 2.0 | 3 |  | 4 | 4.25 | 1 |" in text


def test_noise_is_told() -> None:
    assert "**The machine was not quiet**: the load average rose to 7.5" in report.section(
        report.summary(ASKED, FACTS, found(7.5))
    )


def test_a_part_alone_is_a_report_too() -> None:
    result = report.summary(ASKED, FACTS, {"generate": found()["generate"]})
    assert result["ratio"] is None and "Generation" in report.section(result) and report.line(result)["ratio"] is None
