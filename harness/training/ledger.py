"""What a run costs: images, passes per network, floating-point operations, seconds, memory.

Methods declare no costs. Each variant of an update (say, with and without a gradient penalty) is
measured once while it runs: operations by `torch.utils.flop_counter`, passes by hooks on the
networks. The ledger then adds this cost whenever the variant runs.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from harness.io.records import Cost, Costs

UNITS = ("images", "flops", "seconds")


class Ledger(Costs):
    """The totals of one run, and their arithmetic."""

    def add(self, cost: Cost) -> None:
        self.flops += cost.flops
        for name, (forward, backward) in cost.passes.items():
            total = self.passes.setdefault(name, [0, 0])
            total[0] += forward
            total[1] += backward
        self.generated = self.passes.get("student", [0])[0]

    def charge(self, name: str, cost: Cost, seconds: float) -> None:
        """Add a cost from before training."""
        self.add(cost)
        self.seconds += seconds
        self.charges[name] = cost.model_dump() | {"seconds": seconds}

    def amount(self, unit: str) -> float:
        return getattr(self, unit)

    def reached(self, budget: list[dict]) -> dict | None:
        """The first limit of `budget` (`{"unit", "amount"}`) that is reached, or None."""
        return next((x for x in budget if self.amount(x["unit"]) >= x["amount"]), None)

    def spent(self, budget: list[dict]) -> float:
        """The spent fraction of `budget`: of the limit that is nearest."""
        return max(self.amount(x["unit"]) / x["amount"] for x in budget)


# Costs under measurement, innermost last. A backward pass counts where it runs, which may be in
# another phase than its forward pass.
_ACTIVE: list[Cost] = []


@contextlib.contextmanager
def measure(networks: Mapping[str, nn.Module], processes: int = 1) -> Iterator[Cost]:
    """Count operations, and the images that pass through each network, in a block that
    `processes` run alike.

    A backward pass counts when a gradient reaches a network's output, whether it continues to the
    weights, to the input, or to both.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def count(name: str, direction: int, images: int) -> None:
        if _ACTIVE:
            _ACTIVE[-1].passes.setdefault(name, [0, 0])[direction] += images * processes

    def counting_hook(name: str):
        def forward(module: nn.Module, args: tuple, output) -> None:
            first = output
            while not isinstance(first, Tensor):
                first = first[0]
            count(name, 0, len(first))
            if first.requires_grad:
                first.register_hook(lambda gradient: count(name, 1, len(gradient)))

        return forward

    cost = Cost()
    # Guidance evaluates the network inside it, on both halves of a batch.
    inner = {name: getattr(net, "denoiser", net) for name, net in networks.items()}
    hooks = [net.register_forward_hook(counting_hook(name)) for name, net in inner.items()]
    _ACTIVE.append(cost)
    try:
        with FlopCounterMode(display=False) as counter:
            yield cost
        cost.flops = counter.get_total_flops() * processes
    finally:
        _ACTIVE.pop()
        for hook in hooks:
            hook.remove()


def peak_memory(device: str) -> int:
    """Peak bytes of the device's allocator; on CPU, of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
