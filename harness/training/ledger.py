"""What a run costs. Each variant of an update (say, with and without a gradient penalty) is
measured once while it runs; the ledger then adds this cost whenever the variant runs."""

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from harness.io.records import Cost, Costs


class Ledger(Costs):
    """The totals of one run, and their arithmetic."""

    def add(self, cost: Cost) -> None:
        self.flops += cost.flops
        for name, passes in cost.passes.items():
            total = self.passes.get(name, [0, 0])
            self.passes[name] = [a + b for a, b in zip(total, passes, strict=True)]
        self.generated = self.passes.get("student", [0])[0]

    def charge(self, name: str, cost: Cost, seconds: float) -> None:
        """Add a cost from before training."""
        self.add(cost)
        self.seconds += seconds
        self.charges[name] = cost.model_dump() | {"seconds": seconds}

    def reached(self, budget: list[dict]) -> dict | None:
        """The first limit of `budget` (`{"unit", "amount"}`) that is reached, or None."""
        return next((x for x in budget if getattr(self, x["unit"]) >= x["amount"]), None)

    def spent(self, budget: list[dict]) -> float:
        """The spent fraction of `budget`: of the limit that is nearest."""
        return max(getattr(self, x["unit"]) / x["amount"] for x in budget)


# Costs under measurement, innermost last. A backward pass counts where it runs, which may be in
# another phase than its forward pass.
_ACTIVE: list[Cost] = []


@contextlib.contextmanager
def measure(networks: Mapping[str, nn.Module], processes: int = 1) -> Iterator[Cost]:
    """Count operations, and the images that pass through each network, in a block that `processes`
    run alike. A backward pass counts when a gradient reaches a network's output, whether it
    continues to the weights, to the input, or to both."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(name: str, direction: int, images: Tensor) -> None:
        if _ACTIVE:
            _ACTIVE[-1].passes.setdefault(name, [0, 0])[direction] += len(images) * processes

    def count_both(name: str, module: nn.Module, args: tuple, output) -> None:
        while not isinstance(output, Tensor):
            output = output[0]
        count(name, 0, output)
        if output.requires_grad:
            output.register_hook(partial(count, name, 1))

    cost = Cost()
    with contextlib.ExitStack() as stack:
        for name, net in networks.items():
            # Guidance evaluates the network inside it, on both halves of a batch.
            inner = getattr(net, "denoiser", net)
            stack.enter_context(inner.register_forward_hook(partial(count_both, name)))
        _ACTIVE.append(cost)
        stack.callback(_ACTIVE.pop)
        with FlopCounterMode(display=False) as counter:
            yield cost
        cost.flops = counter.get_total_flops() * processes


def device_name(device: str) -> str:
    """The product name of a GPU, such as "NVIDIA H200"; "cpu" for the host."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def peak_memory(device: str) -> int:
    """Peak bytes of the device's allocator; on CPU, of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
