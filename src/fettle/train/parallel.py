"""Data parallelism under torchrun: ranks share the batches of a step, and sum gradients and counts.

The batches of a step are the same whatever the number of processes; rank r takes every W-th.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fettle.core.errors import FettleError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which process of how many this is."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def join(accumulate: int | None) -> World:
        """Join the process group that torchrun's environment describes; alone where there is none.

        FettleError where `accumulate` batches a step cannot be shared evenly; None leaves that to the source of batches.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World()
        if accumulate is not None and accumulate % size:
            raise FettleError(
                f"optim.accumulate: {accumulate} batches a step cannot be shared evenly by {size} processes; "
                f"choose a multiple of {size}"
            )
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return World(dist.get_rank(), size)

    @staticmethod
    def rank_here() -> int:
        """This process's number as torchrun says it, whether or not it has joined; 0 where there is one process."""
        return 0 if int(os.environ.get("WORLD_SIZE", "1")) == 1 else int(os.environ["RANK"])

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange a type."""
        if self.size == 1 or not tensors:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):  # in one order on every process, as a set has not
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in order of their ranks; plain values that the processes of one run send each other."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def by_first(self, work: Callable[[], T]) -> T:
        """What the first process gets by `work`, handed to the others, which wait for it as long as it takes.

        FettleError in the others where the first one fails.
        """
        if self.size == 1:
            return work()
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        made: list[Any] = [None, "the first process was ended"]
        try:
            if self.first:
                made = [work(), None]
        except Exception as error:
            made = [None, str(error) or type(error).__name__]
            raise
        finally:
            dist.broadcast_object_list(made, src=0, group=patient)
        if made[1] is not None:
            raise FettleError(f"the first process failed: {made[1]}")
        return made[0]  # type: ignore[no-any-return]

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of a number over the processes: what each of them found, and all must act on together."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()
