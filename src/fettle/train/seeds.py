"""The generators of random numbers that a run draws from: seeded batch by batch, and put back after an aside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int, index: int) -> None:
    """Seed Python's, numpy's and torch's generators for one batch: its randomness has no history to restore."""
    mixed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Whatever is seeded or drawn inside, the generators go on after it as if nothing had been."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
