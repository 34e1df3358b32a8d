"""Data parallelism over the processes that torchrun starts: each works on its share of every batch,
with the random numbers that one process would draw for it, and all average their gradients. Only
the first process writes files, takes locks and logs progress."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.environment import launched


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> range:
        """The consecutive samples of a batch that this process works on; all shares are equal."""
        if batch % self.size:
            message = f"batch {batch} is not divisible by the {self.size} processes"
            raise UserError(message, "batch-size")
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def sum_(self, tensors: list[Tensor], factor: float = 1.0) -> None:
        """Replace float tensors by `factor` times their sums over processes; shapes must agree."""
        # For gradients, torch's `DistributedDataParallel` needs one forward pass per backward pass,
        # but phases share generated images and other phases' networks; R1 differentiates twice.
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        flat *= factor
        parts = flat.split([t.numel() for t in tensors])
        with torch.no_grad():
            torch._foreach_copy_(
                tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]
            )

    def agree(self, value: float) -> float:
        """The first process's value in all processes, sent between hosts without the device."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        torch.distributed.broadcast(tensor, 0)
        return tensor.item()

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def leading(self, context: contextlib.AbstractContextManager) -> Iterator:
        """Enter `context` in the first process; the others wait for that, and get None."""
        with context if self.first else contextlib.nullcontext() as value:
            self.wait()
            yield value

    def gather(self, own: Tensor | None, count: int) -> Iterator[Tensor]:
        """Yield the tensors of processes 0 to `count - 1` in the first process, nothing in the
        others; shapes must agree."""
        if self.rank >= count:
            return
        if not self.first:
            torch.distributed.send(own.contiguous(), 0)
            return
        yield own
        for source in range(1, count):
            other = torch.empty_like(own, memory_format=torch.contiguous_format)
            torch.distributed.recv(other, source)
            yield other


@cache
def processes() -> Processes:
    """Join the processes that torchrun started; a single one otherwise."""
    size = int(os.environ["WORLD_SIZE"]) if launched() else 1
    if size == 1:
        return Processes()
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(days=7)  # a process waits while the first one scores or waits for a lock
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    return Processes(torch.distributed.get_rank(), size)
