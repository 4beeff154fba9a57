"""What layers derive from weights that stay as they are for a while, as in generation: made once, kept to the end of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_kept: ContextVar[dict[Hashable, Any] | None] = ContextVar("fettle_still", default=None)


@contextmanager
def still(kept: dict[Hashable, Any]) -> Iterator[None]:
    """Within it, layers keep in `kept` what they derive from their weights. Whoever owns it lets go of it when these change."""
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def derived(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives; within `still`, and without gradients, what it gave the first time for this key."""
    kept = _kept.get()
    if kept is None or torch.is_grad_enabled():
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]  # type: ignore[no-any-return]
