"""Train a run to the end of its budget, with snapshots and exact resume. `run_id` hashes everything
that decides the weights, except where the run stops: a longer budget continues a run, and any other
change starts a new run. The folder of a run holds

    state.json, state-<step>.safetensors    the state to resume from
    snapshots/images-<n>/                   exported averaged weights, snapshot.json
    train.csv                               one row per tick
    devices.json                            names of the devices that it was trained on
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable

import torch

from harness.errors import UserError
from harness.io.artifacts import atomic_folder, sha256_file, write_json
from harness.io.logs import STARTED
from harness.training.checkpoint import load_checkpoint, save_checkpoint
from harness.training.distributed import processes
from harness.training.ledger import Ledger, peak_memory
from harness.training.log import training_log
from harness.training.run import Outcome, TrainingRun
from harness.training.trainer import NonFiniteError, Trainer

LOG_SECONDS = 30.0  # longest time without a line of the log

logger = logging.getLogger(__name__)


class TrainingLoop:
    """A trainer with the snapshots of its run."""

    def __init__(self, trainer: Trainer, snapshots: list[dict]):
        self.trainer, self.run, self.ledger = trainer, trainer.run, trainer.ledger
        self.processes, self.snapshots = trainer.processes, snapshots
        self.first = trainer.iteration  # 0, or where the run resumes

    def finish(self, log: Callable[[dict, float], None] | None) -> None:
        """Train until the budget is spent. `log`: of the first process, see `training_log`."""
        trainer, run, ledger = self.trainer, self.run, self.ledger
        tick_steps = max(1, run.loop.tick_images // run.batch)
        tick_seconds, tick_images = ledger.seconds, ledger.images
        saved = logged = time.monotonic()
        position, done = self._grid_position(), False
        while not done:
            started = time.perf_counter()
            before = ledger.model_dump(include={"images", "flops", "seconds"})
            trainer.step()
            if trainer.iteration <= self.first + 2:
                self._log_time(started)
            self._count_seconds(before["seconds"], started)
            ticked = trainer.iteration % tick_steps == 0
            if ticked or self._grid_position() != position or ledger.reached(run.budget):
                added = ledger.images - before["images"]
                trainer.settle()
                before["images"] = min(before["images"], ledger.images - added)
                self._count_seconds(before["seconds"], started)
            now, done = self._grid_position(), ledger.reached(run.budget) is not None
            crossed = [unit for unit in now if now[unit] > position[unit]]
            position = now
            if ticked or done:
                ledger.peak_memory = max(ledger.peak_memory, peak_memory(run.device))
                row = self._row(ledger.seconds - tick_seconds, ledger.images - tick_images)
                if log is not None:
                    log(row, ledger.spent(run.budget))
                tick_seconds, tick_images = ledger.seconds, ledger.images
                logged = time.monotonic()
            elif self.processes.first and time.monotonic() - logged > LOG_SECONDS:
                logger.info("%s: %d images", run.name, ledger.images)
                logged = time.monotonic()
            if crossed or done:
                self._snapshot(crossed, before)
            if done or (ticked and time.monotonic() - saved >= run.loop.checkpoint_seconds):
                if self.processes.first:
                    save_checkpoint(run, trainer.state_dict() | {"snapshots": self.snapshots})
                saved = time.monotonic()

    def _log_time(self, started: float) -> None:
        """Log the time of the first two iterations of a process. The first of a new run measures
        costs, with the plain pass; then kernels are compiled, or loaded from a cache, in the second
        one."""
        if self.run.device.startswith("cuda"):
            torch.cuda.synchronize(self.run.device)
        total, iteration = time.monotonic() - STARTED, time.perf_counter() - started
        if self.processes.first:
            name = "first" if self.trainer.iteration == self.first + 1 else "second"
            text = "%s iteration %.1f s after the start of the process; it took %.1f s"
            logger.info(text, name, total, iteration)

    def _count_seconds(self, before: float, started: float) -> None:
        """Add the time since `started`; by the first process's clock if a limit is in seconds."""
        self.ledger.seconds = before + time.perf_counter() - started
        if any(limit["unit"] == "seconds" for limit in self.run.budget):
            self.ledger.seconds = self.processes.agree(self.ledger.seconds)

    def _row(self, elapsed: float, images: int) -> dict[str, float]:
        """A row of train.csv; `elapsed` and `images` since the last one."""
        return {
            "step": self.trainer.iteration,
            "images": self.ledger.images,
            "flops": self.ledger.flops,
            "seconds": round(self.ledger.seconds, 3),
            "images_per_second": round(images / elapsed, 2) if elapsed > 0 else 0.0,
            **{f"nonfinite/{name}": count for name, count in self.trainer.nonfinite.items()},
            **self.trainer.metrics.collect(self.processes),
        }

    def _grid_position(self) -> dict[str, int]:
        return {
            unit: grid.index(getattr(self.ledger, unit))
            for unit, grid in self.run.snapshot_grid.items()
        }

    def _snapshot(self, grid: list[str], before: dict[str, float]) -> None:
        """Export the averaged weights. `grid`: units on whose grid this point lies; `before`: the
        amounts one iteration earlier, which show whether a budget ends exactly here."""
        name, step = f"images-{self.ledger.images:09d}", self.trainer.iteration
        if any(other["name"] == name for other in self.snapshots):
            name += f"-step-{step}"  # iterations without an update of the student
        record = {
            "name": name,
            "grid": grid,
            "step": step,
            "before": before,
            "ledger": self.ledger.model_dump(),
            "ema_half_life": self.run.ema_half_life,
        }
        if self.processes.first:
            with atomic_folder(self.run.snapshot(name)) as folder:
                record = {"sha256": self.run.export(self.trainer.ema, folder)} | record
                write_json(folder / "snapshot.json", record)
        self.snapshots.append(record)


def _outcome(run: TrainingRun, snapshots: list[dict], nonfinite: dict[str, int]) -> Outcome:
    """The outcome of a run that ends at the last of these snapshots; others count if they are on
    the grid."""
    *earlier, last = snapshots
    ledger = Ledger(**last["ledger"])
    on_grid = [record for record in earlier if record["grid"]]
    stop = ledger.reached(run.budget)
    return Outcome(stop, ledger, [*on_grid, last], nonfinite, run.loop.tf32, run.devices)


def _outcome_at_snapshot(run: TrainingRun, state: dict) -> Outcome | None:
    """The outcome of a budget that ends exactly at an earlier snapshot of the saved state."""
    for count, record in enumerate(state["snapshots"], 1):
        if not (run.snapshot(record["name"]) / "snapshot.json").exists():
            return None
        if Ledger(**record["ledger"]).reached(run.budget):
            if any(record["before"][x["unit"]] >= x["amount"] for x in run.budget):
                return None
            _check_weights(run, record)
            return _outcome(run, state["snapshots"][:count], state["nonfinite"])
    return None


def _check_weights(run: TrainingRun, record: dict) -> None:
    """Raise a `UserError` if the weights of the snapshot at which the budget ends are missing or
    damaged. Training again would replace the whole run, so the user decides."""
    folder = run.snapshot(record["name"])
    files = sorted(folder.glob("*.safetensors"))
    if any(sha256_file(file) == record["sha256"] for file in files):
        return
    found = f"{folder} has no weights (*.safetensors), as after `harness prune`"
    if files:
        found = f"{files[0]} is damaged: its sha256 is not the one in snapshot.json"
    message = f"the budget ends at a snapshot whose weights are needed, but {found}; restore them, "
    message += f"undo a change of the budget, or delete {run.folder} to train again"
    raise UserError(f"{run.name}: {message}", "damaged" if files else "pruned")


def train(run: TrainingRun) -> Outcome:
    """Train to the end of the budget, continuing from the saved state if there is one; again from
    the start if the budget was shortened to a point without a snapshot."""
    if limit := run.ledger.reached(run.budget):
        spent = f"already spends the budget of {limit['amount']:g} {limit['unit']}"
        message = f"the charge for teacher pairs {spent}; raise it or use fewer pairs"
        raise UserError(f"{run.name}: {message}", "budget")
    first, state = processes().first, load_checkpoint(run)
    processes().wait()  # all processes have read the state before the first writes another
    if state is not None and Ledger(**state["ledger"]).reached(run.budget):
        if outcome := _outcome_at_snapshot(run, state):
            return outcome
        state = None
        if first:
            logger.warning(
                "the saved state is beyond the shortened budget, and no snapshot lies at its end; "
                "training again from the start"
            )
            shutil.rmtree(run.folder)
    trainer, snapshots = Trainer(run), []
    if state is not None:
        trainer.load_state_dict(state)
        snapshots = state["snapshots"]
        if first:
            logger.info("resumed at %d images from %s", trainer.ledger.images, run.folder)
        state = None  # frees the memory of its tensors
    start = trainer.iteration, trainer.ledger.images
    if first:
        run.note_device(resumed=start[0] > 0)
    with training_log(run, *start) if first else contextlib.nullcontext() as log:
        try:
            TrainingLoop(trainer, snapshots).finish(log)
        except NonFiniteError as error:
            path = run.snapshot(snapshots[-1]["name"]) if snapshots else "none yet"
            raise NonFiniteError(f"{error}; last good snapshot: {path}", error.code) from None
    return _outcome(run, snapshots, trainer.nonfinite)
