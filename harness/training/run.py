"""The parts of one training, settings of the loop, and what a finished training leaves."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config.schema import Switches, TrainingSection, micro_batch
from harness.context import TrainingData
from harness.method import Phase
from harness.training.ledger import Ledger


@dataclass(frozen=True)
class LoopSettings:
    """How the training loop computes and reports. They change weights by rounding at most.

    micro_batch: images per forward pass; None: the whole batch. tick_images: images between two
    rows of the log. checkpoint_seconds: least time between two saved states. max_nonfinite: a
    longer row of non-finite steps in one phase ends the run. loggers: besides train.csv.
    """

    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    tick_images: int = 1024
    checkpoint_seconds: float = 15.0
    max_nonfinite: int = 20
    loggers: tuple[str, ...] = ()
    progress: bool = field(default_factory=lambda: sys.stderr.isatty())


def loop_settings(
    training: TrainingSection,
    device: str,
    batch: int,
    switches: Switches | None = None,
    tick_images: int | None = None,
) -> LoopSettings:
    """Loop settings of a student, teacher or feature network.

    `training` (the experiment's section) sets checkpoints, non-finite steps and loggers for all of
    them. `switches`: precision, memory format and micro-batch of this network, or their defaults.
    """
    switches = switches or Switches()
    values = switches.model_dump(include=set(Switches.model_fields) - {"micro_batch"})
    return LoopSettings(
        device=device,
        micro_batch=micro_batch(batch, switches.micro_batch),
        tick_images=tick_images or training.tick_images,
        checkpoint_seconds=training.checkpoint_seconds,
        max_nonfinite=training.max_nonfinite,
        loggers=tuple(training.loggers),
        **values,
    )


@dataclass(frozen=True)
class TrainingRun:
    """A training: networks, phases, data and budget.

    networks: trained; `main` is the one that is averaged and exported. frozen: networks that
    losses only pass through. ledger: charges before training. snapshot_grid: unit -> {first,
    per_octave}. export: (averaged network, folder) -> record with the `sha256` of the weights.
    """

    name: str  # for messages: "sid/seed0"
    folder: Path  # named by `run_id`
    run_id: str
    seed: int
    networks: dict[str, nn.Module]
    frozen: dict[str, nn.Module]
    main: str
    phases: list[Phase]
    data: TrainingData
    batch: int
    budget: list[dict]
    export: Callable[[nn.Module, Path], dict]
    ledger: Ledger = field(default_factory=Ledger)
    ema_half_life: int = 0
    ema_ramp_up: float = 0.05
    snapshot_grid: dict[str, dict] = field(default_factory=dict)
    loop: LoopSettings = field(default_factory=LoopSettings)


@dataclass(frozen=True)
class Outcome:
    """`stop`: the limit that ended the run. `snapshots`: their records; the last is the end."""

    stop: dict
    ledger: Ledger
    snapshots: list[dict]
    nonfinite: dict[str, int]

    def record(self, run_id: str) -> dict[str, Any]:
        """The fields that the records of all trained networks share (`io.records`)."""
        from harness import __version__

        return {
            "harness": __version__,
            "torch": torch.__version__,
            "run_id": run_id,
            "sha256": self.snapshots[-1]["sha256"],
            "stop": self.stop,
            "skipped_steps": self.nonfinite,
            "ledger": self.ledger.to_json(),
        }
