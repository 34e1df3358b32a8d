"""What a run costs: images, passes per network, floating-point operations, seconds, memory.

Methods declare no costs. Each variant of an update (say, with and without a gradient penalty) is
measured once while it runs: operations by `torch.utils.flop_counter`, passes by hooks on the
networks. The ledger then adds this cost whenever the variant runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

UNITS = ("images", "flops", "seconds")


@dataclass
class Cost:
    """Cost of one update. `passes`: network -> [images forward, images backward]."""

    flops: int = 0
    passes: dict[str, list[int]] = field(default_factory=dict)

    def __mul__(self, times: int) -> Cost:
        """The cost of the same work in several processes."""
        passes = {name: [n * times for n in counts] for name, counts in self.passes.items()}
        return Cost(self.flops * times, passes)


@dataclass
class Ledger:
    """Totals of one run.

    images: images that received a generator update. flops: all operations. seconds: training time
    without evaluation, checkpoints and start-up. peak_memory: bytes. charges: costs before training
    (teacher pairs), included in the totals. costs: the measured cost of each update variant.
    """

    images: int = 0
    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    passes: dict[str, list[int]] = field(default_factory=dict)
    charges: dict[str, dict] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    def add(self, cost: Cost) -> None:
        self.flops += cost.flops
        for name, (forward, backward) in cost.passes.items():
            total = self.passes.setdefault(name, [0, 0])
            total[0] += forward
            total[1] += backward

    def charge(self, name: str, cost: Cost, seconds: float) -> None:
        """Add a cost from before training; a second charge of the same name is ignored."""
        if name not in self.charges:
            self.add(cost)
            self.seconds += seconds
            self.charges[name] = {**asdict(cost), "seconds": seconds}

    @property
    def generated(self) -> int:
        """The number of images that the student generated, with and without an update."""
        return self.passes.get("student", [0, 0])[0]

    def amount(self, unit: str) -> float:
        return {"images": self.images, "flops": self.flops, "seconds": self.seconds}[unit]

    def reached(self, budget: list[dict]) -> dict | None:
        """The first limit of `budget` (`{"unit", "amount"}`) that is reached, or None."""
        return next((x for x in budget if self.amount(x["unit"]) >= x["amount"]), None)

    def spent(self, budget: list[dict]) -> float:
        """The spent fraction of `budget`: of the limit that is nearest."""
        return max(self.amount(x["unit"]) / x["amount"] for x in budget)

    def to_json(self) -> dict:
        return asdict(self) | {"generated": self.generated}

    @classmethod
    def from_json(cls, record: dict) -> Ledger:
        record = {k: v for k, v in record.items() if k != "generated"}
        costs = {name: Cost(**cost) for name, cost in record.pop("costs").items()}
        return cls(**record, costs=costs)


# Costs under measurement, innermost last. A backward pass counts where it runs, which may be in
# another phase than its forward pass.
_ACTIVE: list[Cost] = []


@contextlib.contextmanager
def measure(networks: Mapping[str, nn.Module]) -> Iterator[Cost]:
    """Count operations, and the images that pass through each network, in a block.

    A backward pass counts when a gradient reaches a network's output, whether it continues to the
    weights, to the input, or to both.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def count(name: str, direction: int, images: int) -> None:
        if _ACTIVE:
            _ACTIVE[-1].passes.setdefault(name, [0, 0])[direction] += images

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
        cost.flops = counter.get_total_flops()
    finally:
        _ACTIVE.remove(cost)
        for hook in hooks:
            hook.remove()


def peak_memory(device: str) -> int:
    """Peak bytes of the device's allocator; on CPU, of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
