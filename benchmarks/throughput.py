"""Speed of one full iteration of every student of an experiment.

    python benchmarks/throughput.py [--configfile configs/digits.yaml] [--threads 1]
    python benchmarks/throughput.py --network cifar10-ddpmpp --batch 8 --students sid sim

Prints, per student: images per second (images that receive a generator update), operations per
such image (measured), and the share of the machine's matmul peak, measured in the same run with the
same threads. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tabulate import tabulate

from harness.config import Experiment, load_experiment, resolve
from harness.errors import did_you_mean
from harness.plan import stand_in_inputs
from harness.runs import assemble
from harness.trainer import Trainer

# The networks of the papers, as the experiments in which every student begins from them.
NETWORKS = {
    "cifar10-ddpmpp": "cifar10-uncond-scaled",
    "ffhq64-ddpmpp": "ffhq64-scaled",
    "imagenet64-adm": "imagenet64-scaled",
}


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_peak(device: str, size: int = 1024, repeats: int = 9) -> float:
    """Best observed rate of a float32 square matrix product, in operations per second."""
    a, b = (torch.randn(size, size, device=device) for _ in "ab")
    best = 0.0
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def measure(experiment: Experiment, student: str, iterations: int) -> tuple[float, float]:
    """Images per second (median over iterations) and operations per image."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = stand_in_inputs(experiment, student)
        trainer = Trainer(assemble(experiment, student, 0, inputs, Path(folder), "benchmark"))
    times, flops = [], []
    for _ in range(iterations + 2):  # the first iterations measure operations and warm up
        synchronise(experiment.device)
        started, before = time.perf_counter(), trainer.ledger.flops
        trainer._iteration()
        synchronise(experiment.device)
        times.append(time.perf_counter() - started)
        flops.append(trainer.ledger.flops - before)
    batch = trainer.run.batch
    return batch / statistics.median(times[2:]), statistics.mean(flops[2:]) / batch


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
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as in the workflow")
    parser.add_argument("--iterations", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.network:
        args.configfile = Path("configs/paper") / f"{NETWORKS[args.network]}.yaml"
    experiment = load_experiment(args.configfile, _overrides(args), files=False)
    peaks, rows = [matmul_peak(experiment.device)], []
    for student in experiment.students:
        rate, flops = measure(experiment, student, args.iterations)
        peaks.append(matmul_peak(experiment.device))
        rows.append((student, experiment.method_config(student).batch, rate, flops))
    peak = max(peaks)
    print(
        f"{experiment.name}: {experiment.device}, {args.threads} thread(s), torch "
        f"{torch.__version__}; matmul peak {peak / 1e9:.1f} GFLOP/s (float32, 1024 x 1024)\n"
    )
    table = [
        (name, batch, f"{rate:.3g}", f"{flops / 1e6:.4g}", f"{100 * rate * flops / peak:.0f} %")
        for name, batch, rate, flops in rows
    ]
    headers = ("student", "batch", "images/s", "MFLOPs/image", "share of peak")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
