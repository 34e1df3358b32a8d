"""Copies between the host and a GPU that make neither wait for the other, and work ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item, Result = TypeVar("Item"), TypeVar("Result")


def is_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a copy to a GPU, since it is made from
    pinned memory."""
    if is_gpu(device) and not tensor.is_cuda:
        # An expanded tensor cannot be pinned.
        tensor = (tensor.contiguous() if 0 in tensor.stride() else tensor).pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """Tensors of one device on their way to the host. A GPU copies them into pinned, contiguous
    memory after the work that was launched before."""

    def __init__(self, *tensors: Tensor):
        self._tensors, self._copied = tensors, None
        if tensors[0].is_cuda:
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._tensors, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait(self, store: bool = False) -> list[Tensor]:
        """The tensors on the host, when they are complete. store: not in pinned memory, which is
        scarce."""
        if self._copied is None:
            return list(self._tensors)
        self._copied.synchronize()
        return [t.clone() if store else t for t in self._tensors]


def ahead(
    make: Callable[[Item], Result], items: Iterable[Item], device: str | torch.device
) -> Iterator[Result]:
    """Yield `make(item)` for each item. With a GPU the next item is made before one is yielded: if
    `make` only launches work, the GPU does it while the host uses the item before.

    There is no thread, since the flags of `harness.precision` belong to the process: work must be
    launched under the flags of its owner.
    """
    made: deque[Result] = deque()
    for item in items:
        made.append(make(item))
        if len(made) > is_gpu(device):
            yield made.popleft()
    yield from made
