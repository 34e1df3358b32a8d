"""The parts of one training, and what a finished training leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import __version__
from harness.config.schema import Grid, LoopSettings, Switches, micro_batch
from harness.context import TrainingData
from harness.io.artifacts import read_json, write_json
from harness.method import Phase
from harness.training.ledger import Ledger, device_name

DEVICES = "devices.json"  # in the folder of a run


def loop_settings(training: LoopSettings, switches: Switches, tick_images: int) -> LoopSettings:
    """The experiment's settings with the switches of one teacher or feature network."""
    own = {name: getattr(switches, name) for name in Switches.model_fields}
    return training.model_copy(update={**own, "tick_images": tick_images})


@dataclass(frozen=True)
class TrainingRun:
    """A training. networks: trained; `main` is the one that is averaged and exported. frozen:
    networks that losses only pass through. ledger: charges before training. export: write the
    averaged network to a folder and return the sha256 of the weights."""

    name: str  # for messages: "sid/seed0"
    folder: Path  # named by `run_id`
    run_id: str
    seed: int
    networks: dict[str, nn.Module]
    main: str
    phases: list[Phase]
    data: TrainingData
    batch: int
    budget: list[dict]
    export: Callable[[nn.Module, Path], str]
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    ema_half_life: int = 0
    ema_ramp_up: float = 0.05
    ghost_batch: int = 1  # images that must lie in one micro-batch
    snapshot_grid: Mapping[str, Grid] = field(default_factory=dict)
    loop: LoopSettings = field(default_factory=LoopSettings)
    device: str = "cpu"

    @property
    def micro_batch(self) -> int:
        """The largest divisor of the batch up to the limit, in whole ghost batches."""
        ghost, limit = self.ghost_batch, self.loop.micro_batch
        return ghost * micro_batch(self.batch // ghost, limit and max(1, limit // ghost))

    @property
    def devices(self) -> list[str]:
        """Names of the devices that the run was trained on, in order."""
        path = self.folder / DEVICES
        return read_json(path, owner=self.folder) if path.exists() else []

    def note_device(self, resumed: bool) -> None:
        """Add this machine's device to `devices`, which a run that is not resumed starts anew."""
        known, name = self.devices if resumed else [], device_name(self.device)
        write_json(self.folder / DEVICES, [*known, name] if name not in known else known)

    def snapshot(self, name: str) -> Path:
        return self.folder / "snapshots" / name


@dataclass(frozen=True)
class Outcome:
    """`stop`: the limit that ended the run. `snapshots`: their records; the last is the end."""

    stop: dict
    ledger: Ledger
    snapshots: list[dict]
    nonfinite: dict[str, int]
    tf32: bool
    devices: list[str]

    def record(self, run_id: str) -> dict[str, Any]:
        """The fields that the records of all trained networks share (`io.records`)."""
        return {
            "harness": __version__,
            "torch": torch.__version__,
            "run_id": run_id,
            "sha256": self.snapshots[-1]["sha256"],
            "stop": self.stop,
            "tf32": self.tf32,
            "device_name": " and ".join(self.devices) or None,
            "skipped_steps": self.nonfinite,
            "ledger": self.ledger.model_dump(),
        }
