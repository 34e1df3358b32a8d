"""What a run has spent: images, passes per network, floating-point operations, seconds, memory.

Nothing is declared by a method. The cost of an iteration's phase is measured once per variant
(say, with and without a gradient penalty) while it runs: operations by
`torch.utils.flop_counter`, passes by hooks on the networks. Afterwards the same cost is added each
time that variant runs.
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
    """Cost of one run of a phase. `passes`: network -> [images forward, images backward]."""

    flops: int = 0
    passes: dict[str, list[int]] = field(default_factory=dict)

    def __mul__(self, times: int) -> Cost:
        """The same in so many processes."""
        passes = {name: [n * times for n in both] for name, both in self.passes.items()}
        return Cost(self.flops * times, passes)


@dataclass
class Ledger:
    """Totals of one run.

    images: images that received a generator update. flops: operations in all, charges included.
    seconds: training time (evaluation, checkpoints and start-up apart), charges included.
    peak_memory: bytes. charges: what was spent before training (teacher pairs), already in the
    totals. costs: the measured cost of each phase variant.
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
        """Add what was spent before training, once."""
        if name not in self.charges:
            self.add(cost)
            self.seconds += seconds
            self.charges[name] = {**asdict(cost), "seconds": seconds}

    @property
    def generated(self) -> int:
        """Images that the student generated in all."""
        return self.passes.get("student", [0, 0])[0]

    def amount(self, unit: str) -> float:
        return {"images": self.images, "flops": self.flops, "seconds": self.seconds}[unit]

    def reached(self, budget: list[dict]) -> dict | None:
        """The first limit of `budget` (`{"unit", "amount"}`) that is reached, or None."""
        return next((x for x in budget if self.amount(x["unit"]) >= x["amount"]), None)

    def to_json(self) -> dict:
        return asdict(self) | {"generated": self.generated}

    @classmethod
    def from_json(cls, record: dict) -> Ledger:
        record = {k: v for k, v in record.items() if k != "generated"}
        costs = {name: Cost(**cost) for name, cost in record.pop("costs").items()}
        return cls(**record, costs=costs)


# The costs being measured, innermost last: a backward pass counts where it runs, which may be
# another phase than the one that ran forward.
_ACTIVE: list[Cost] = []


@contextlib.contextmanager
def measure(networks: Mapping[str, nn.Module]) -> Iterator[Cost]:
    """Count operations, and the images that pass each network, while the block runs.

    A backward pass is counted when a gradient reaches a network's output, whether it goes on to
    the weights, to the input, or both.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def count(name: str, direction: int, images: int) -> None:
        if _ACTIVE:
            _ACTIVE[-1].passes.setdefault(name, [0, 0])[direction] += images

    def watch(name: str):
        def forward(module: nn.Module, args: tuple, output) -> None:
            first = output
            while not isinstance(first, Tensor):
                first = first[0]
            count(name, 0, len(first))
            if first.requires_grad:
                first.register_hook(lambda gradient: count(name, 1, len(gradient)))

        return forward

    cost = Cost()
    # Under guidance the network itself is passed, twice.
    inner = {name: getattr(net, "denoiser", net) for name, net in networks.items()}
    hooks = [net.register_forward_hook(watch(name)) for name, net in inner.items()]
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
    """Bytes: the peak of the device's allocator, or of this process on CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
