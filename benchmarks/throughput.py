"""Speed of one full iteration of every student of an experiment.

    python benchmarks/throughput.py [--configfile configs/digits.yaml] [--threads 1]
    python benchmarks/throughput.py --network cifar10-ddpmpp --batch 8 --students sid sim
    python benchmarks/throughput.py --compare channels_last compile bf16

Prints, per student: images per second (images that receive a generator update), operations per
such image (measured), and the share of the machine's matmul peak, measured in the same run with the
same threads. `--compare` repeats that with switches of `training` on, each alone and all together,
as ratios to all of them off; `plain`, which is not a switch, is the same mathematics in a loop like
those of papers' code; its column shows how many times as fast the harness is. Weights are random:
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from harness.config.experiment import Experiment
from harness.config.loading import resolve
from harness.context import Context
from harness.errors import did_you_mean
from harness.method import OptimizerConfig, Phase
from harness.students.run import assemble
from harness.training.trainer import Trainer
from harness.validation import load_experiment
from harness.workflow.plan import stand_in_inputs

# The networks of the papers, as the experiments in which every student begins from them.
NETWORKS = {
    "cifar10-ddpmpp": "cifar10-uncond-scaled",
    "ffhq64-ddpmpp": "ffhq64-scaled",
    "imagenet64-adm": "imagenet64-scaled",
}


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_peak(device: str, precision: str, repeats: int = 9) -> tuple[float, str]:
    """Best observed rate of a square matrix product, in operations per second; which product."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    best = 0.0
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best, f"{precision}, {size} x {size}"


# What `--compare` may switch on: a key of `training`, its values off and on.
SWITCHES = {
    "bf16": ("precision", "fp32", "bf16"),
    "channels_last": ("channels_last", False, True),
    "compile": ("compile", False, True),
}
PLAIN = "plain"
WARM_UP = 3  # default; the first iterations measure operations and compile


class PlainLoop(Trainer):
    """The loop of papers' code: every phase generates its own images, optimisers are not fused,
    the average goes parameter by parameter, and the loss is read back after each update."""

    def _build_optimizer(self, parameters: list[Tensor], config: OptimizerConfig):
        optimizer = super()._build_optimizer(parameters, config)
        for group in optimizer.param_groups:
            group["fused"] = None
        return optimizer

    def _update(self, phase: Phase, repeat: int, contexts: list[Context], *rest) -> None:
        for context in contexts:
            context.forget_generated()
            context.enter(phase.name, repeat, phase.network == self.run.main)
        super()._update(phase, repeat, contexts, *rest)
        float(self._sums[f"loss/{phase.name}"])

    def _step(self, optimizer: torch.optim.Optimizer, lost: Tensor) -> None:
        optimizer.step()

    def _update_ema(self, images: int) -> None:
        with torch.no_grad():
            for average, parameter in zip(*self._averaged, strict=True):
                average.copy_(parameter.lerp(average, self._ema_decay(images)))


def settings(switches: list[str], on: bool) -> dict:
    """The keys of `training` that put these switches on, or off."""
    return {SWITCHES[name][0]: SWITCHES[name][1 + on] for name in switches}


def measure(
    experiment: Experiment,
    student: str,
    iterations: int,
    warm_up: int = WARM_UP,
    kind: type[Trainer] = Trainer,
) -> tuple[float, float]:
    """Images per second (median over iterations) and operations per image."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = stand_in_inputs(experiment, student)
        trainer = kind(assemble(experiment, student, 0, inputs, Path(folder), "benchmark"))
    times, flops = [], []
    for _ in range(warm_up + iterations):
        synchronise(experiment.device)
        started, before = time.perf_counter(), trainer.ledger.flops
        trainer._iteration()
        synchronise(experiment.device)
        times.append(time.perf_counter() - started)
        flops.append(trainer.ledger.flops - before)
    batch = trainer.run.batch
    return batch / statistics.median(times[warm_up:]), statistics.mean(flops[warm_up:]) / batch


def told(student: str, what: str, measured: tuple[float, float]) -> None:
    """A large network takes minutes a row: say each as it comes."""
    print(f"{student}, {what}: {measured[0]:.3g} images/s", file=sys.stderr, flush=True)


def _overrides(args: argparse.Namespace) -> dict:
    """What the command line changes of the experiment."""
    training: dict = {"precision": args.precision} if args.precision else {}
    if args.batch:
        training["settings"] = {"batch": args.batch}
        training["budget"] = [{"unit": "images", "amount": args.batch}]
    students = resolve(args.configfile)["students"]
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
    parser.add_argument("--network", choices=NETWORKS, help="of a paper, in place of a file")
    parser.add_argument("--batch", type=int, help="for every student, in place of its own")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--students", nargs="+", metavar="STUDENT")
    parser.add_argument(
        "--compare", nargs="+", choices=[*SWITCHES, PLAIN], default=[], metavar="SWITCH"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as in the workflow")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="iterations not counted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.network:
        args.configfile = Path("configs/paper") / f"{NETWORKS[args.network]}.yaml"
    experiment = load_experiment(args.configfile, _overrides(args), files=False)
    chosen = [name for name in args.compare if name != PLAIN]
    sets = [[name] for name in chosen]
    sets += [chosen] if len(sets) > 1 else []
    section = experiment.training.model_copy(update=settings(chosen, on=False))
    peak, rows = 0.0, []
    for student in experiment.students:
        measured = []
        for switches in ([], *sets):
            experiment.training = section.model_copy(update=settings(switches, on=True))
            measured.append(measure(experiment, student, args.iterations, args.warm_up))
            told(student, " + ".join(switches) or "no switch", measured[-1])
        best, product = matmul_peak(experiment.device, section.precision)
        peak = max(peak, best)
        (rate, flops), *others = measured
        ratios = [other / rate for other, _ in others]
        if PLAIN in args.compare:
            experiment.training = section
            plain = measure(experiment, student, args.iterations, args.warm_up, PlainLoop)
            told(student, "plain loop", plain)
            ratios.append(rate / plain[0])
        batch = experiment.method_config(student).batch
        rows.append((student, batch, rate, flops, ratios))
    print(
        f"{experiment.name}: {experiment.device}, {args.threads} thread(s), torch "
        f"{torch.__version__}; matmul peak {peak / 1e9:.1f} GFLOP/s ({product})\n"
    )
    headers = ("student", "batch", "images/s", "MFLOPs/image", "share of peak")
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
