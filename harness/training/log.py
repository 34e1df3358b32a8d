"""Training metrics: running means on the device, and where the rows of each tick go."""

import contextlib
import csv
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError
from harness.io.artifacts import atomic_path
from harness.io.packages import missing
from harness.training.distributed import Processes
from harness.training.run import TrainingRun

logger = logging.getLogger(__name__)


class RunningMeans(Mapping[str, Tensor]):
    """Means of the finite values of named scalars since the last `collect`, on the device: adding a
    value and looking up a mean do not wait for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        finite = value.isfinite()
        self._sums[name] = self._sums.get(name, 0.0) + torch.where(finite, value, 0.0)
        self._counts[name] = self._counts.get(name, 0.0) + finite.float()

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name] / self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def collect(self, processes: Processes) -> dict[str, float]:
        """Read the means over all processes (NaN without a finite value) and start anew. All
        processes call it together; it waits for the device."""
        totals = torch.stack([*self._sums.values(), *self._counts.values()]).float()
        processes.sum_([totals])
        rows = zip(self._sums, *totals.view(2, -1).tolist(), strict=True)
        means = {name: total / count if count else math.nan for name, total, count in rows}
        self._sums.clear()
        self._counts.clear()
        return means


class CsvLogger:
    """`train.csv`: one row per tick. Rows after `step` are dropped: they were written after the
    state that is resumed."""

    def __init__(self, path: Path, step: int):
        self.path, self.columns = path, {}
        if path.exists():
            rows = [row for row in self._rows() if row["step"].isdigit()]
            self._rewrite([row for row in rows if int(row["step"]) <= step])

    def _rows(self) -> list[dict]:
        """The rows of the file that are not cut off."""
        with open(self.path, newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def _rewrite(self, rows: list[dict]) -> None:
        self.columns = {name: None for row in rows for name in row}
        with atomic_path(self.path) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(self, row: dict[str, float]) -> None:
        """Append a row; a column that appears late (of a phase that runs seldom) is added."""
        if row.keys() <= self.columns.keys():
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._rewrite([*(self._rows() if self.columns else ()), row])


def tensorboard(run: TrainingRun, images: int) -> tuple[Callable, Callable]:
    """TensorBoard events in the run's folder, against images."""
    from torch.utils.tensorboard import SummaryWriter

    # Events after `images` are dropped: they were written after the state that is resumed.
    writer = SummaryWriter(run.folder / "tensorboard", purge_step=images + 1)

    def write(row: dict[str, float]) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, row["images"])
        writer.flush()

    return write, writer.close


def wandb(run: TrainingRun, images: int) -> tuple[Callable, Callable]:
    """A Weights & Biases run named after this run, against images; it continues on resume."""
    import wandb

    names = {"project": "onestep-harness", "id": run.run_id, "name": run.name}
    target = wandb.init(**names, dir=str(run.folder), resume="allow")
    return lambda row: target.log(row, step=row["images"]), target.finish


@contextlib.contextmanager
def training_log(run: TrainingRun, step: int, images: int) -> Iterator[Callable]:
    """Yield a function that logs a tick, given its row and the spent fraction of the budget.
    `step` and `images`: where the run starts or resumes."""
    run.folder.mkdir(parents=True, exist_ok=True)
    writers, bar = [CsvLogger(run.folder / "train.csv", step).write], None
    with contextlib.ExitStack() as stack:
        for name, start in (("tensorboard", tensorboard), ("wandb", wandb)):
            if name not in run.loop.loggers:
                continue
            try:
                write, close = start(run, images)
            except ImportError:
                message = f"training.loggers: {missing(name)}"
                raise UserError(message, "missing-package") from None
            writers.append(write)
            stack.callback(close)
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            bar = stack.enter_context(tqdm(total=1.0, desc=run.name, bar_format=layout))

        def log(row: dict[str, float], spent: float) -> None:
            for write in writers:
                write(row)
            losses = " ".join(f"{k[5:]} {v:.4g}" for k, v in row.items() if k.startswith("loss/"))
            text = f"{row['images_per_second']:.0f} img/s, {losses}"
            if skipped := sum(v for k, v in row.items() if k.startswith("nonfinite/")):
                text += f", {skipped} non-finite"
            if bar is None:
                logger.info("%5.1f %%  %d images  %s", 100 * spent, row["images"], text)
            else:
                bar.n = min(1.0, spent)
                bar.set_postfix_str(text)

        yield log
