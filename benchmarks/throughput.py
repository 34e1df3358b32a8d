"""Measure the speed of training iterations of each student of an experiment.

    python benchmarks/throughput.py [--configfile configs/digits.yaml] [--threads 1]
    python benchmarks/throughput.py --network cifar10-ddpmpp --batch 8 --students sid sim
    python benchmarks/throughput.py --compare channels_last bf16

Prints for each student: images per second (images that receive a generator update), operations per
such image (measured), and the fraction of the machine's matmul peak, measured in the same run with
the same threads. `--compare` adds columns of relative speed with settings of `training` switched
on, first separately, then together. `plain` compares with the loop of typical research code, which
computes the same: its column is the speed-up of the harness. Weights are random; speed does not
depend on them.
"""

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from harness.config.experiment import Experiment
from harness.config.loading import read_experiment
from harness.config.schema import TrainingSection
from harness.context import Context
from harness.errors import did_you_mean
from harness.io import logs
from harness.method import OptimizerConfig, Phase
from harness.precision import set_precision
from harness.students.run import assemble
from harness.training.trainer import Trainer
from harness.validation import load_experiment
from harness.workflow.dry_run import dry_run_inputs

logger = logging.getLogger("harness.benchmarks")

# Networks of the papers, and experiments whose students start from them.
NETWORKS = {
    "cifar10-ddpmpp": "cifar10-uncond-scaled",
    "ffhq64-ddpmpp": "ffhq64-scaled",
    "imagenet64-adm": "imagenet64-scaled",
}


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_peak(device: str, section: TrainingSection, repeats: int = 9) -> tuple[float, str]:
    """Best rate of a square matrix product in operations per second, and its name."""
    set_precision(device, section.tf32)
    dtype = torch.bfloat16 if section.precision == "bf16" else torch.float32
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    best = 0.0
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    name = "tf32" if section.tf32 and section.precision == "fp32" else section.precision
    return best, f"{name}, {size} x {size}"


# Choices of `--compare`: a key of `training`, its values off and on.
SWITCHES = {
    "bf16": ("precision", "fp32", "bf16"),
    "tf32": ("tf32", False, True),
    "channels_last": ("channels_last", False, True),
}
PLAIN = "plain"
WARM_UP = 3  # iterations; the first measures operations and compiles kernels


class PlainLoop(Trainer):
    """The loop of typical research code: each phase generates its own images, optimisers are not
    fused, the average is updated one parameter at a time, and each loss is read back."""

    def build_optimizer(
        self, parameters: list[Tensor], config: OptimizerConfig
    ) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(parameters, config)
        for group in optimizer.param_groups:
            group["fused"] = None
        return optimizer

    def update(self, phase: Phase, repeat: int, contexts: list[Context], *rest) -> None:
        for context in contexts:
            context.release()
            of_main = phase.network == self.run.main
            context.enter(phase.name, repeat, phase.batch(self.run.main), of_main)
        super().update(phase, repeat, contexts, *rest)
        float(self.metrics[f"loss/{phase.name}"])

    def optimizer_step(self, optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
        optimizer.step()

    def update_ema(self, images: int) -> None:
        decay, main = self.ema_decay(images), self.networks[self.run.main]
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), main.parameters(), strict=True):
                if parameter.requires_grad:
                    average.copy_(parameter.lerp(average, decay))


def switched(section: TrainingSection, switches: list[str], on: bool) -> TrainingSection:
    """The training section with these switches on, or off."""
    return section.model_copy(update={SWITCHES[n][0]: SWITCHES[n][1 + on] for n in switches})


@dataclass(frozen=True)
class Speed:
    """Of training. rate: images per second (median over iterations). flops: per image. start:
    seconds of the first two iterations; the first counts operations, without fused kernels.
    memory: peak bytes of a GPU in the first iteration, and in the others."""

    rate: float
    flops: float
    start: float
    memory: tuple[int, int]
    trainer: Trainer


def measure(
    experiment: Experiment,
    student: str,
    training: TrainingSection,
    iterations: int,
    warm_up: int = WARM_UP,
    kind: type[Trainer] = Trainer,
) -> Speed:
    """Train a student with random weights on random images for some iterations."""
    run = replace(experiment.student_run(student, 0), training=training)
    set_precision(run.device, training.tf32, static_shapes=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = dry_run_inputs(experiment, student)
        trainer = kind(assemble(run, inputs, Path(folder), "benchmark"))
    times, flops, memory = [], [], []
    on_gpu = run.device.startswith("cuda")
    for _ in range(warm_up + iterations):
        synchronise(run.device)
        started, before = time.perf_counter(), trainer.ledger.flops
        trainer.step()
        synchronise(run.device)
        times.append(time.perf_counter() - started)
        flops.append(trainer.ledger.flops - before)
        memory.append(torch.cuda.max_memory_allocated() if on_gpu else 0)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
    batch = trainer.run.batch
    rate = batch / statistics.median(times[warm_up:])
    logger.info("%s, %s: %.3g images/s", student, kind.__name__, rate)
    return Speed(
        rate,
        statistics.mean(flops[warm_up:]) / batch,
        sum(times[:2]),
        (memory[0], max(memory[1:], default=0)),
        trainer,
    )


def _overrides(args: argparse.Namespace) -> dict:
    """Overrides of the experiment by the command line."""
    training: dict = {"precision": args.precision} if args.precision else {}
    if args.batch:
        training["settings"] = {"batch": args.batch}
        training["budget"] = [{"unit": "images", "amount": args.batch}]
    students = read_experiment(args.configfile)["students"]
    for name in args.students or ():
        if name not in students:
            raise SystemExit(f"unknown student {name!r}{did_you_mean(name, students)}")
    return {
        "training": training,
        "students": {
            name: None if args.students and name not in args.students else {"budget": None}
            for name in students
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--network", choices=NETWORKS, help="a paper's, instead of --configfile")
    parser.add_argument("--batch", type=int, help="override every student's batch")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--students", nargs="+", metavar="STUDENT")
    parser.add_argument(
        "--compare", nargs="+", choices=[*SWITCHES, PLAIN], default=[], metavar="SWITCH"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as in the workflow")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="iterations before")
    args = parser.parse_args()
    logs.configure()
    torch.set_num_threads(args.threads)
    if args.network:
        args.configfile = Path("configs/paper") / f"{NETWORKS[args.network]}.yaml"
    experiment = load_experiment(args.configfile, _overrides(args), files=False)
    chosen = [name for name in args.compare if name != PLAIN]
    sets = [[name] for name in chosen]
    sets += [chosen] if len(sets) > 1 else []
    section = switched(experiment.training, chosen, on=False)
    peak, rows, counts = 0.0, [], (args.iterations, args.warm_up)
    for student in experiment.students:
        (rate, flops), *others = [
            (speed.rate, speed.flops)
            for switches in ([], *sets)
            for speed in [measure(experiment, student, switched(section, switches, True), *counts)]
        ]
        best, product = matmul_peak(experiment.device, section)
        peak = max(peak, best)
        ratios = [other / rate for other, _ in others]
        if PLAIN in args.compare:
            plain = measure(experiment, student, section, *counts, PlainLoop)
            ratios.append(rate / plain.rate)
        batch = experiment.students[student].settings.batch
        rows.append((student, batch, rate, flops, ratios))
    print(
        f"{experiment.name}: {experiment.device}, {args.threads} thread(s), torch "
        f"{torch.__version__}; matmul peak {peak / 1e9:.1f} GFLOP/s ({product})\n"
    )
    headers = ("student", "batch", "images/s", "MFLOPs/image", "fraction of peak")
    headers += tuple("× with " + " + ".join(s) for s in sets)
    headers += ("× the plain loop",) if PLAIN in args.compare else ()
    table = [
        (
            *(name, batch, f"{rate:.3g}", f"{flops / 1e6:.4g}", f"{rate * flops / peak:.0%}"),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
        for name, batch, rate, flops, ratios in rows
    ]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
