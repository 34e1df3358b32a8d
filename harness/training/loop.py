"""Train a run to the end of its budget: ticks, snapshots, checkpoints and exact resume.

`run_id` hashes everything that decides the weights, except where the run stops. So a longer budget
continues a run, and any other change starts a new run. The folder of a run holds

    state.json, state-<step>.safetensors    the state to resume from
    snapshots/images-<n>/                   exported averaged weights, snapshot.json
    train.csv                               one row per tick
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError
from harness.io.artifacts import atomic_folder, write_json
from harness.training.checkpoint import load_checkpoint, save_checkpoint
from harness.training.distributed import processes
from harness.training.ledger import UNITS, Ledger, peak_memory
from harness.training.log import TrainingLog
from harness.training.run import Outcome, TrainingRun
from harness.training.trainer import NonFiniteError, Trainer

logger = logging.getLogger(__name__)


def grid_index(amount: float, first: float, per_octave: float) -> int:
    """How many points of the grid `first * 2**(k / per_octave)` lie at or below `amount`."""
    if amount < first:
        return 0
    return math.floor(math.log2(amount / first) * per_octave + 1e-9) + 1


class TrainingLoop:
    """A trainer with the snapshots of its run."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.run, self.processes = trainer, trainer.run, trainer.processes
        self.snapshots: list[dict] = []

    @property
    def ledger(self) -> Ledger:
        return self.trainer.ledger

    def fit(self) -> Outcome:
        """Train until the budget is spent, continuing from the saved state if there is one."""
        run, first = self.run, self.processes.first
        run.folder.mkdir(parents=True, exist_ok=True)
        state = load_checkpoint(run)
        if state is not None:
            self.trainer.load_state_dict(state)
            self.snapshots = state["snapshots"]
        self.processes.wait()  # all processes have read the state before the first writes another
        limit = self.ledger.reached(run.budget)
        if limit and state is not None:
            outcome = self._outcome_at_snapshot()
            if outcome is None:
                raise _Restart
            return outcome
        if limit:
            raise UserError(
                f"{run.name}: the charge for teacher pairs already spends the budget of "
                f"{limit['amount']:g} {limit['unit']}; raise it or use fewer pairs",
                "budget",
            )
        if state is not None and first:
            logger.info("resumed at %d images from %s", self.ledger.images, run.folder)
        start = self.trainer.iteration, self.ledger.images
        with TrainingLog(run, *start) if first else contextlib.nullcontext() as log:
            self._train(log)
        return self._outcome(self.ledger.reached(run.budget), self.ledger, len(self.snapshots) - 1)

    def _train(self, log: TrainingLog | None) -> None:
        trainer, run, loop = self.trainer, self.run, self.run.loop
        tick_steps = max(1, loop.tick_images // run.batch)
        saved = time.monotonic()
        tick_seconds, tick_images = 0.0, self.ledger.images
        position = self._grid_position()
        while True:
            started, seconds = time.perf_counter(), self.ledger.seconds
            before = {unit: self.ledger.amount(unit) for unit in UNITS}
            trainer.step()
            self._count_seconds(seconds, started)
            ticked = trainer.iteration % tick_steps == 0
            if ticked or self._grid_position() != position or self.ledger.reached(run.budget):
                added = self.ledger.images - before["images"]
                self._settle()
                before["images"] = min(before["images"], self.ledger.images - added)
                self._count_seconds(seconds, started)
            tick_seconds += self.ledger.seconds - seconds
            now, done = self._grid_position(), self.ledger.reached(run.budget) is not None
            crossed = [unit for unit in now if now[unit] > position[unit]]
            position = now
            if ticked or done:
                self.ledger.peak_memory = max(self.ledger.peak_memory, peak_memory(loop.device))
                row = self._row(tick_seconds, self.ledger.images - tick_images)
                if log is not None:
                    log.write(row, self.ledger.spent(run.budget))
                tick_seconds, tick_images = 0.0, self.ledger.images
            if crossed or done:
                self._snapshot(crossed, before)
            if done or (ticked and time.monotonic() - saved >= loop.checkpoint_seconds):
                if self.processes.first:
                    save_checkpoint(run, trainer.state_dict() | {"snapshots": self.snapshots})
                saved = time.monotonic()
            if done:
                return

    def _settle(self) -> None:
        """Correct the counts by the skipped steps; this waits for the device."""
        try:
            self.trainer.settle()
        except NonFiniteError as error:
            last = self.snapshots[-1]["name"] if self.snapshots else None
            path = self._path(last) if last else "none yet"
            raise NonFiniteError(f"{error}; last good snapshot: {path}", error.code) from None

    def _count_seconds(self, before: float, started: float) -> None:
        """Add the time since `started`; by the first process's clock if a limit is in seconds."""
        self.ledger.seconds = before + time.perf_counter() - started
        if any(limit["unit"] == "seconds" for limit in self.run.budget):
            self.ledger.seconds = self.processes.agree(self.ledger.seconds)

    def _row(self, elapsed: float, images: int) -> dict[str, float]:
        """One row of train.csv: counts, and the metrics since the last tick."""
        rate = images / elapsed if elapsed > 0 else 0.0
        return {
            "step": self.trainer.iteration,
            "images": self.ledger.images,
            "flops": self.ledger.flops,
            "seconds": round(self.ledger.seconds, 3),
            "images_per_second": round(rate, 2),
            **{f"nonfinite/{name}": count for name, count in self.trainer.nonfinite.items()},
            **self.trainer.metrics.collect(self.processes),
        }

    def _grid_position(self) -> dict[str, int]:
        return {
            unit: grid_index(self.ledger.amount(unit), grid["first"], grid["per_octave"])
            for unit, grid in self.run.snapshot_grid.items()
        }

    def _path(self, snapshot: str) -> Path:
        return self.run.folder / "snapshots" / snapshot

    def _snapshot(self, grid: list[str], before: dict[str, float]) -> None:
        """Export the averaged weights. `grid`: units on whose grid this point lies; `before`: the
        amounts one iteration earlier, which show whether a budget ends exactly here."""
        name, step = f"images-{self.ledger.images:09d}", self.trainer.iteration
        if any(other["name"] == name for other in self.snapshots):
            name += f"-step-{step}"  # iterations without an update of the student
        record = {"name": name, "grid": grid, "step": step, "before": before}
        if self.processes.first:
            with atomic_folder(self._path(name)) as folder:
                record = self.run.export(self.trainer.ema, folder) | record
                record |= {
                    "ledger": self.ledger.to_json(),
                    "ema_half_life": self.run.ema_half_life,
                }
                write_json(folder / "snapshot.json", record)
        self.snapshots.append(record)

    def _outcome_at_snapshot(self) -> Outcome | None:
        """The outcome of a budget that ends exactly at an earlier snapshot of the saved state."""
        budget = self.run.budget
        for i, record in enumerate(self.snapshots):
            if not (self._path(record["name"]) / "snapshot.json").exists():
                return None
            ledger = Ledger.from_json(record["ledger"])
            if stop := ledger.reached(budget):
                late = any(record["before"][x["unit"]] >= x["amount"] for x in budget)
                return None if late else self._outcome(stop, ledger, i)
        return None

    def _outcome(self, stop: dict, ledger: Ledger, last: int) -> Outcome:
        """`last`: the number of the final snapshot; earlier ones count if they are on the grid."""
        on_grid = [record for record in self.snapshots[:last] if record["grid"]]
        snapshots = [*on_grid, self.snapshots[last]]
        return Outcome(stop, ledger, snapshots, self.trainer.nonfinite)


class _Restart(Exception):
    """The budget ends before the saved state, and no snapshot lies at its end."""


def train(make: Callable[[], TrainingRun]) -> Outcome:
    """Build a run with `make` and train it to the end of its budget.

    If the budget was shortened to a point without a snapshot, the run is built again and trained
    from the start, which gives the weights of that budget.
    """
    run = make()
    try:
        return TrainingLoop(Trainer(run)).fit()
    except _Restart:
        if processes().first:
            logger.warning(
                "the saved state is beyond the shortened budget, and no snapshot lies at its end; "
                "training again from the start"
            )
            shutil.rmtree(run.folder)
        processes().wait()
        return TrainingLoop(Trainer(make())).fit()
