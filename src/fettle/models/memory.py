"""Memory: what a training step will need, before it runs, and what it did need.

`predict` rehearses one step, forward and backward, on fake tensors: shapes flow through the very modules, edits,
checkpointing and loss of the run, nothing is computed and nothing is allocated, and every storage is counted from
its birth to its death. So the figure holds for any architecture and any edit, with no formula for each.
"""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fettle.core.batch import Batch, Segment
from fettle.core.errors import FettleError
from fettle.models.allocator import release
from fettle.models.forest import Forest
from fettle.models.rehearsal import GRADIENT, LOGITS, OTHER, Rehearsal, fake_model, rehearsing

WIDE = (torch.float32, torch.float64)  # weights that are their own masters
# What glibc's heap holds beyond the tensors alive in it, as a share of those that come and go in a step: mostly between 0.3
# and 0.8 with version 2.36, whose aligned allocation cannot reuse a freed block of the very same size, and 0.2 to 0.5 with 2.41.
FRAGMENTATION = 0.4
FIRST_STEP = 24 << 20  # what the libraries take once they compute: 7 to 24 MiB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run holds at its peak, by what they are for."""

    weights: int  # parameters and buffers
    gradients: int  # of all that trains, as they are when a step's last backward pass ends
    optimizer: int  # moments, and float32 masters of narrower weights
    activations: int  # saved for the backward pass, and what a layer needs while it runs
    logits: int
    not_at_once: int = 0  # negative: gradients that are not there yet at the peak, where activations fill their place
    allocator: int = 0  # freed memory that the allocator cannot give to the next tensor
    runtime: int = 0  # the interpreter and its libraries

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), the total last."""
        return [*((what.replace("_", " "), size) for what, size in asdict(self).items()), ("total", self.total)]


def predict(
    forest: Forest, batch: Batch, loss: Callable[[Forest, Batch], Tensor], state_bytes: float = 8.0, accumulate: int = 1
) -> MemoryPlan:
    """The peak of a training step whose scalar loss is `loss(forest, batch)`.

    The weights of `forest` that require gradients train; they may lie on the meta device, so that a model which
    would not fit need not be loaded. `state_bytes` is what the optimizer keeps for each trained weight (AdamW: 8,
    in 8 bits: 2). Nothing of `forest` changes. FettleError where nothing trains.
    """
    device = forest.device if forest.device.type != "meta" else torch.device("cpu")
    trained = [p for p in forest.model.parameters() if p.requires_grad]
    if not trained:
        raise FettleError("memory: nothing trains, so there is no step to predict; add an edit such as {kind: lora}")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = copy.copy(forest)
    twin.model = fake_model(forest.model, fake, device)
    twin.model.train()
    with rehearsing(fake, _vocabulary(forest)) as rehearsal:
        masters = [_master(p, rehearsal) for p in twin.model.parameters() if p.requires_grad]
        for _ in range(min(accumulate, 2)):
            loss(twin, batch).backward()
    peak, held = rehearsal.peak, sum(max(4, p.element_size()) * p.numel() for p in trained)
    del masters
    at_update = held + _update_bytes(trained, state_bytes)
    parts = peak.bytes if peak.total >= at_update else {GRADIENT: held, OTHER: at_update - held, LOGITS: 0}
    return MemoryPlan(
        weights=weight_bytes(forest.model),
        gradients=held,
        optimizer=int(sum((state_bytes + 4 * (p.dtype not in WIDE)) * p.numel() for p in trained)),
        activations=parts[OTHER],
        logits=parts[LOGITS],
        not_at_once=parts[GRADIENT] - held,
        allocator=int(FRAGMENTATION * sum(parts.values())) if device.type == "cpu" else 0,
        runtime=runtime_bytes(forest.model) + FIRST_STEP if device.type == "cpu" else 0,
    )


def _master(weight: nn.Parameter, rehearsal: Rehearsal) -> dict[str, Tensor]:
    """Sum a weight's gradients as the loop does: into a float32 one, letting go of a narrower one at once."""
    kept: dict[str, Tensor] = {}

    def add(p: Tensor) -> None:
        assert p.grad is not None
        if p.dtype in WIDE:
            rehearsal.mark(p.grad)
            return
        if "grad" not in kept:
            kept["grad"] = p.grad.float()
            rehearsal.mark(kept["grad"])
        p.grad = None

    weight.register_post_accumulate_grad_hook(add)
    return kept


def _update_bytes(trained: Iterable[nn.Parameter], state_bytes: float) -> int:
    """What the optimizer's step allocates in passing: nothing where it is fused, float32 copies of one weight in 8 bits."""
    return 0 if state_bytes >= 8 else 24 * max(p.numel() for p in trained)


def _vocabulary(forest: Forest) -> int:
    return int(forest.config.get_text_config().vocab_size)


def weight_bytes(model: nn.Module, device: str | None = None) -> int:
    """Bytes of a model's parameters and buffers, quantized ones at their packed size, tied ones once (on one kind of device)."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if device in (None, t.device.type)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def worst_batch(length: int, segments: int = 1) -> Batch:
    """A row of `length` tokens in `segments` equal segments, every token learned: no batch of that shape needs more."""
    edges = [length * i // segments for i in range(segments + 1)]
    parts = tuple(Segment(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True))
    positions = torch.cat([torch.arange(s.stop - s.start) for s in parts])
    zeros = torch.zeros(length, dtype=torch.int64)
    return Batch(zeros, positions, zeros.clone(), torch.ones(length), parts, ("?",) * segments)


# What was needed.


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that the forward pass `run` leaves for its backward pass: each storage once, the model's own tensors apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    left: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        left.add(saved := _Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = run()
    storages = [saved.tensor.untyped_storage() for saved in left]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del out  # which held the graph, and it what was saved
    return sum(size for at, size in sizes.items() if at not in own)


class _Saved:
    """One tensor that the graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def runtime_bytes(model: nn.Module) -> int:
    """What this process holds apart from a model's weights: the interpreter and its libraries.

    Free pages, as of a model that was looked at before, are given back first: the run will have them again.
    """
    release()
    on_host = weight_bytes(model, "cpu")
    return max(0, resident() - on_host)


def resident() -> int:
    """Bytes of memory that this process holds now; on a GPU use torch.cuda.memory_allocated."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()


def reset_peak() -> None:
    """Start measuring the peak afresh, on the CPU (where Linux allows it) and on every GPU in use."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # another system, or not allowed: the peak since the process began stands
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def measure_peak(device: torch.device | str = "cpu") -> int:
    """Most bytes held since `reset_peak`: resident on the CPU, allocated on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()


def available(device: torch.device | str = "cpu") -> int:
    """Bytes that this process could still take: the machine's, or its control group's where that is less."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = [n for n in (_meminfo("MemAvailable"), _group_room()) if n is not None]
    return min(room, default=sys.maxsize)


def _unit() -> int:
    return 1 if sys.platform == "darwin" else 1024


def _status(key: str) -> int:
    return _field(Path("/proc/self/status"), key) or 0


def _meminfo(key: str) -> int | None:
    return _field(Path("/proc/meminfo"), key)


def _field(path: Path, key: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _group_room() -> int | None:
    """Room left in a version 2 or 1 memory control group, as containers set."""
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (Path(folder, name).read_text().strip() for name in (limit, used))
            inactive = [line.split() for line in Path(folder, "memory.stat").read_text().splitlines()]
        except OSError:
            continue
        if most.isdigit():
            reclaimable = next((int(n) for key, n in inactive if key in ("inactive_file", "total_inactive_file")), 0)
            return max(0, int(most) - int(now) + reclaimable)
    return None
