"""The claims: what a paper says, reproduced at the lab's size over several seeds with intervals and a control.

A file a group of claims; claim.py says what one is, running.py runs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.lab.claims import alignment, compressed, costs, instructions, quality, quantization, scale, verifier
from fettle.lab.claims.claim import Claim as Claim
from fettle.lab.claims.claim import Found as Found
from fettle.lab.claims.running import run

GROUPS = (instructions, quality, scale, costs, alignment, verifier, quantization, compressed)
CLAIMS = {claim.name: claim for group in GROUPS for claim in group.CLAIMS}


def find(name: str) -> Claim:
    """A claim by name."""
    if name not in CLAIMS:
        raise FettleError(f"lab: there is no claim '{name}': {nearest(name, CLAIMS)}")
    return CLAIMS[name]


def run_claim(
    name: str, seeds: int = 3, each: int | None = None, changes: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Run a claim by its name (running.py); returns the folder of the findings."""
    return run(find(name), seeds, each, changes, console)
