"""Rehearsal: code runs on fake tensors, which have a shape and a storage but no memory, and every byte is counted.

What is computed from real tensors alone (a batch's token ids, who sees whom) is computed really, so that code whose
shapes depend on a batch's content runs as it will; what touches a fake tensor becomes fake.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

SMALL = 1 << 22  # elements up to which a tensor made from nothing is made really
GRADIENT, LOGITS, OTHER = "gradients", "logits", "activations"


@dataclass
class Live:
    """Bytes alive, by kind."""

    bytes: dict[str, int] = field(default_factory=lambda: {GRADIENT: 0, LOGITS: 0, OTHER: 0})

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self.bytes.values())


class Rehearsal(TorchDispatchMode):
    """Counts what is allocated within it beyond `ours`; `peak` is what was alive when most was.

    A tensor [.., vocabulary] counts as logits, one marked by `mark` as a gradient, the rest as activations.
    """

    def __init__(self, fake: FakeTensorMode, vocabulary: int = 0) -> None:
        super().__init__()
        self.fake, self.vocabulary = fake, vocabulary
        self.live, self.peak = Live(), Live()
        self._kinds: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(given[0], FakeTensor):
            return 1.0 if given[0].is_floating_point() else 1  # a value that nobody can know; it only steers reports
        out = self._run(func, args, kwargs, given)
        known = {id(t.untyped_storage()) for t in given}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in known:
                self._count(tensor)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        if any(isinstance(t, FakeTensor) for t in given):
            return func(*args, **kwargs)
        if not given:
            out = func(*args, **kwargs)
            if sum(t.numel() for t in tree_iter(out) if isinstance(t, Tensor)) > SMALL:
                return out
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._kinds or not size:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        kind = LOGITS if is_logits else OTHER
        self._kinds[key] = (weakref.ref(storage, lambda _: self._died(key)), size, kind)
        self._add(kind, size)

    def _died(self, key: int) -> None:
        _, size, kind = self._kinds.pop(key)
        self.live.bytes[kind] -= size

    def _add(self, kind: str, size: int) -> None:
        self.live.bytes[kind] += size
        if self.live.total > self.peak.total:
            self.peak = Live(dict(self.live.bytes))

    def mark(self, tensor: Tensor) -> None:
        """Count a live tensor as a gradient from now on."""
        key = id(tensor.untyped_storage())
        if key in self._kinds:
            ref, size, kind = self._kinds[key]
            self._kinds[key] = (ref, size, GRADIENT)
            self.live.bytes[kind] -= size
            self.live.bytes[GRADIENT] += size


@contextmanager
def rehearsing(fake: FakeTensorMode, vocabulary: int) -> Iterator[Rehearsal]:
    """Within it, code that touches fake tensors of `fake` is counted."""
    # The default generator is read by fake dropout and by checkpointing; a rehearsal must not move it.
    with torch.random.fork_rng(), fake, Rehearsal(fake, vocabulary) as rehearsal:
        yield rehearsal


def fake_model(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> nn.Module:
    """A copy of a model whose parameters and buffers are fake tensors on `device`; ties and hooks are kept."""
    memo: dict[int, Any] = {}
    with fake:
        for weight in model.parameters():
            made = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
            memo[id(weight)] = nn.Parameter(made, requires_grad=weight.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device)
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for p, _ in gradients:
        p.grad = None
    try:
        return copy.deepcopy(model, memo)
    finally:
        for p, grad in gradients:
            p.grad = grad
