"""Several processes at work on one stage, started by torchrun: who does what, and what they agree
on.

Each process takes its share of every batch and makes the same random numbers for it that one
process alone would; gradients are averaged over the processes, so all of them take the same step.
The first process alone writes files, locks and tells.

Gradients are averaged when a phase's backward passes are done, in one message. torch's
`DistributedDataParallel` would send them while the backward pass goes on, but it wants one forward
pass to each backward one: phases share generated images, go through networks that another phase
trains, and R1 differentiates twice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor

from harness.errors import UserError

# One process may wait for another's lock, or for the first to score, for as long as that takes.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> range:
        """Which samples of a batch are this process's: consecutive ones, as many as the others'."""
        if batch % self.size:
            raise UserError(f"{self.size} processes cannot share a batch of {batch} equally")
        own = batch // self.size
        return range(self.rank * own, (self.rank + 1) * own)

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace float tensors by their means over the processes; every process gives as many, of
        the same shapes."""
        self._sum_(tensors, 1 / self.size)

    def sum_(self, tensors: list[Tensor]) -> None:
        self._sum_(tensors, 1.0)

    def _sum_(self, tensors: list[Tensor], factor: float) -> None:
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        flat *= factor
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, value: float) -> float:
        """The first process's value, for all; by way of the hosts, so that no device is waited
        for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        torch.distributed.broadcast(tensor, 0)
        return tensor.item()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def leading(self, context: contextlib.AbstractContextManager) -> Iterator:
        """`context` for the first process; the others go on when it has been entered, and get
        None."""
        with context if self.first else contextlib.nullcontext() as value:
            self.wait()
            yield value

    def gather(self, own: Tensor | None, count: int) -> Iterator[Tensor]:
        """In the first process: its own tensor, then those of processes 1 to `count - 1`, of the
        same shape; the others send theirs and get nothing."""
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
    """The processes that torchrun started, joined; this one alone otherwise."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Processes()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return Processes(torch.distributed.get_rank(), size)
