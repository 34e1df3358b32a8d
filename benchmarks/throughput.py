"""Speed of one full iteration of every student of an experiment.

    python benchmarks/throughput.py [--configfile configs/digits.yaml] [--threads 1]

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
from torch import nn

from harness import data as datasets
from harness.config import Experiment, load_experiment
from harness.data import Dataset, Images
from harness.feature_networks import build_feature_network
from harness.networks import build_denoiser
from harness.networks.backbones import load_backbone
from harness.runs import Inputs, assemble
from harness.trainer import Trainer


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


def dataset_of(experiment: Experiment) -> Dataset:
    pixels, labels, names = datasets.read(experiment.data)
    images = Images(pixels, labels)
    return Dataset(experiment.data.name, images, images, names, "")


def inputs_of(experiment: Experiment, student: str, dataset: Dataset) -> Inputs:
    """A student's inputs with random weights and random pairs."""
    section = experiment.teachers[experiment.teacher_of(student)]
    needs, device = experiment.requirements(student), experiment.device
    teacher = build_denoiser(
        section.network, dataset.image_shape, dataset.num_classes, section.sigma_data
    )
    inputs = Inputs(dataset, teacher.to(device))
    if needs.features:
        f = experiment.features[needs.features]
        inputs.features = build_feature_network(
            f.type, dataset.image_shape, dataset.num_classes, f.width
        )
    if needs.backbones:
        inputs.backbones = nn.ModuleList(map(load_backbone, needs.backbones))
    if needs.pairs:
        images = datasets.to_model_space(dataset.train.pixels)
        inputs.pairs = {
            "z": torch.randn_like(images),
            "x": images,
            "condition": dataset.train.labels,
        }
    return inputs


def measure(
    experiment: Experiment, student: str, dataset: Dataset, iterations: int
) -> tuple[float, float]:
    """Images per second (median over iterations) and operations per image."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = inputs_of(experiment, student, dataset)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, as in the workflow")
    parser.add_argument("--iterations", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    experiment = load_experiment(args.configfile)
    dataset = dataset_of(experiment)
    peaks, rows = [matmul_peak(experiment.device)], []
    for student in experiment.students:
        rate, flops = measure(experiment, student, dataset, args.iterations)
        peaks.append(matmul_peak(experiment.device))
        rows.append((student, experiment.method_config(student).batch, rate, flops))
    peak = max(peaks)
    print(
        f"{experiment.name}: {experiment.device}, {args.threads} thread(s), torch "
        f"{torch.__version__}; matmul peak {peak / 1e9:.1f} GFLOP/s (float32, 1024 x 1024)\n"
    )
    table = [
        (name, batch, f"{rate:.0f}", f"{flops / 1e6:.1f}", f"{100 * rate * flops / peak:.0f} %")
        for name, batch, rate, flops in rows
    ]
    headers = ("student", "batch", "images/s", "MFLOPs/image", "share of peak")
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
