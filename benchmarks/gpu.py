"""Measure the speed of everything that a GPU does in an experiment, in at most five minutes.

    python -m benchmarks.gpu [--out FOLDER] [--limit SECONDS] [--profile] [--sweep]

Prints tables and writes gpu.md and gpu.json: full training iterations of each method on the papers'
CIFAR-10 network (DDPM++, 55.7 M parameters), with fused kernels and without, as a share of the peak
of a matrix product in the same run; the time to the first iteration; a small network; sampling;
feature networks. Weights and images are random; speed does not depend on them. `--profile` adds the
kernels of an iteration, `--sweep` the bandwidth of the group norm for several tiles.

Without a GPU it measures tiny networks on the CPU, which says nothing about a GPU.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.evaluation import random_extractor
from benchmarks.throughput import Speed, matmul_peak, measure
from harness import kernels
from harness.config.experiment import Experiment
from harness.config.loading import read_experiment
from harness.denoiser import Denoiser
from harness.io.logs import STARTED
from harness.precision import full_precision, set_precision
from harness.sampling import heun, one_step_generator, placed_for_sampling, sample
from harness.validation import load_experiment
from harness.workflow.dry_run import dry_run_inputs

OFFICIAL = "configs/paper/cifar10-uncond-scaled.yaml"
SMALL = "configs/cifar10-small-fast.yaml"
# The authors' SiD loop on the official network at batch 128, with the same work as `sid` here.
QUOTED = {
    "what": "the authors' SiD code, official network, batch 128",
    "device": "NVIDIA H200, torch 2.11.0+cu130, 2026-11-27",
    "images/s": {"float32": 60.5, "their half-precision option": 283.6},
}
GOALS = {
    "share of peak": 0.40,
    "times the authors' half precision": 2.5,
    "first iteration s": 30,
    "first iteration s, kernels cached": 10,
}
TINY = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
PLAIN, FUSED = "plain", "fused"


@dataclass
class Benchmark:
    """The results so far, and the clock that limits them."""

    device: str
    limit: float
    out: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def network(self, path: str) -> str:
        return ("official" if path == OFFICIAL else "small") if self.on_gpu else "tiny"

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Skip what no time is left for; record the reason of a failure and continue."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            self.results.setdefault("failed", {})[name] = f"{type(error).__name__}: {reason}"
            print(f"{name}: {reason}", file=sys.stderr)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def time_left(self, name: str) -> bool:
        if time.monotonic() - STARTED < self.limit:
            return True
        self.results.setdefault("left out", []).append(name)
        return False

    def add(self, table: str, row: dict[str, Any]) -> None:
        self.results.setdefault(table, []).append(row)
        print(f"[{time.monotonic() - STARTED:5.0f} s] {table}: {row}", flush=True)
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.out / "gpu.md").write_text(markdown(self.results))

    def experiment(self, path: str, batch: int, **training: Any) -> Experiment:
        """An experiment with this batch in one micro-batch; on the CPU with tiny networks."""
        batch = batch if self.on_gpu else 4
        settings = {"batch": batch}
        if not self.on_gpu:
            training["precision"] = "fp32"  # bfloat16 is many times slower
        raw = read_experiment(Path(path))
        overrides: dict[str, Any] = {
            "device": self.device,
            "training": {
                "settings": settings,
                "budget": [{"unit": "images", "amount": batch}],
                "micro_batch": batch,
                **training,
            },
            "students": {name: {"budget": None} for name in raw["students"]},
        }
        if not self.on_gpu:
            for name, student in raw["students"].items():
                if student["method"] == "gdd":
                    overrides["students"][name]["settings"] = {"ghost_batch": batch}
            overrides["teachers"] = {
                name: {"network": TINY}
                for name, teacher in raw["teachers"].items()
                if teacher is not None
            }
        return load_experiment(Path(path), overrides, files=False)


def describe(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    facts = {"device": name, "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        facts["commit"] = subprocess.check_output(command, text=True, stderr=-3).strip()
    return facts | {"date": datetime.date.today().isoformat()}


# -- training -------------------------------------------------------------------------------------


def training_row(
    bench: Benchmark, path: str, batch: int, student: str, variant: str, iterations: int = 8
) -> Speed | None:
    """variant: fused or plain, and the precision if it is not bf16, as in "plain fp32"."""
    kind, _, precision = variant.partition(" ")
    name = f"{student}, {Path(path).stem}, {variant}"
    if not bench.time_left(name):
        return None
    speed = None
    with bench.attempt(name), kernels.kernels("gpu" if kind == FUSED else "off"):
        options = {"precision": precision or "bf16", "tf32": False}
        options |= {"channels_last": None if kind == FUSED else False}
        experiment = bench.experiment(path, batch, **options)
        iterations = iterations if bench.on_gpu else 2
        speed = measure(experiment, student, experiment.student_training(student), iterations)
        peak = bench.results["peak TFLOP/s"].get(experiment.training.precision)
        rate = speed.rate * speed.flops / 1e12
        row = {
            "student": student,
            "network": bench.network(path),
            "pass": variant,
            "batch": speed.trainer.run.batch,
            "images/s": round(speed.rate, 1),
            "GFLOP/image": round(speed.flops / 1e9, 1),
            "TFLOP/s": round(rate, 2),
            "share of peak": round(rate / peak, 3) if peak else None,
            "first two iterations s": round(speed.start, 1),
            "GiB, first": round(speed.memory[0] / 2**30, 1) if bench.on_gpu else None,
            "GiB, others": round(speed.memory[1] / 2**30, 1) if bench.on_gpu else None,
        }
        bench.add("training", row)
    return speed


def first_iteration(bench: Benchmark) -> None:
    """Seconds from the start of a process to the end of its second iteration, the first one with
    fused kernels: `sid` on the official network, with an empty cache of compiled kernels, then with
    a full one."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "full"):
            name = f"first iteration, {state} cache"
            if not bench.time_left(name):
                continue
            with bench.attempt(name):
                command = [sys.executable, "-m", "benchmarks.gpu", "--two-iterations"]
                command += ["--device", bench.device]
                options = {"env": os.environ | {"TRITON_CACHE_DIR": cache}, "text": True}
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, timeout=120, **options)
                seconds = round(time.perf_counter() - started, 1)
                if done.returncode:
                    raise RuntimeError(done.stderr[-200:])
                bench.add("first iteration", {"cache of kernels": state, "seconds": seconds})


def two_iterations(bench: Benchmark) -> None:
    experiment = bench.experiment(OFFICIAL, 128, precision="bf16")
    measure(experiment, "sid", experiment.student_training("sid"), iterations=2, warm_up=0)


def profile(bench: Benchmark, speed: Speed) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu
    steps = 2
    with profiler(activities=activities) as record:
        for _ in range(steps):
            speed.trainer.step()
        if bench.on_gpu:
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda e: -getattr(e, attribute))
    for event in events[:40]:
        milliseconds = getattr(event, attribute) / 1e3 / steps
        row = {"ms per iteration": round(milliseconds, 2), "calls": event.count // steps}
        bench.results.setdefault("kernels", []).append(row | {"kernel": event.key[:100]})
    bench.write()


def agreement(bench: Benchmark) -> None:
    """Relative distances of outputs and gradients from the plain pass in float32."""
    experiment = bench.experiment(OFFICIAL, 8)
    network = dry_run_inputs(experiment, "sid", 8).teacher.eval().requires_grad_(True)
    generator = torch.Generator(bench.device).manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():  # the last layers of a new network are nearly zero
            p.add_(torch.randn(p.shape, generator=generator, device=bench.device), alpha=0.02)
    options = {"generator": generator, "device": bench.device}
    x, sigma = torch.randn(8, *network.image_shape, **options), torch.rand(8, **options) + 0.2

    def run(mode: str, bf16: bool) -> list[Tensor]:
        layout = torch.channels_last if mode == "gpu" else torch.contiguous_format
        network.to(memory_format=layout).zero_grad()
        image = x.clone().requires_grad_()
        kind = bench.device.partition(":")[0]
        with kernels.kernels(mode), torch.autocast(kind, torch.bfloat16, enabled=bf16):
            y = network(image, sigma)
        weights = torch.linspace(-1, 1, y.numel(), device=bench.device).view_as(y)
        (y * weights).sum().backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        return [t.detach().double() for t in (y, image.grad, torch.cat(gradients))]

    with full_precision():
        reference = run("off", False)
        for name, mode, bf16 in (
            ("fused float32", "gpu", False),
            ("plain bf16", "off", True),
            ("fused bf16", "gpu", True),
        ):
            found = zip(run(mode, bf16), reference, strict=True)
            distances = [float((a - b).norm() / b.norm()) for a, b in found]
            names = "output", "gradient by the image", "gradient by the weights"
            row = {key: f"{d:.1e}" for key, d in zip(names, distances, strict=True)}
            bench.add("agreement", {"against plain float32": name} | row)


# -- sampling and scoring -------------------------------------------------------------------------


def sampling(bench: Benchmark, path: str) -> None:
    experiment = bench.experiment(path, 256)
    set_precision(bench.device, static_shapes=True)
    network: Denoiser = dry_run_inputs(experiment, "sid", 8).teacher.eval()
    shape, classes = network.image_shape, network.num_classes
    block = experiment.evaluation.block if bench.on_gpu else 4
    steps = 18 if bench.on_gpu else 2
    samplers = {
        "one step": (one_step_generator(network, 2.5), 64),
        f"Heun, {steps} steps": (lambda z, c, noise: heun(network, z, c, noise, steps=steps), 4),
    }
    for name, (generate, most) in samplers.items():
        for precision in ("fp32", "bf16"):
            row = {"network": bench.network(path), "sampler": name, "precision": precision}
            if not bench.time_left(str(row)):
                continue
            network.to(memory_format=torch.contiguous_format)
            placed_for_sampling(network, precision)
            options = {"codec": torch.nn.Identity(), "precision": precision, "block": block}

            def images(blocks: int, generate=generate, options=options) -> int:
                inputs = generate, blocks * block, shape, classes, 0, bench.device
                return sum(len(pixels) for pixels, _ in sample(*inputs, **options))

            if name == "one step":
                images(2)  # cuDNN chooses its algorithms, also for Heun's method
            blocks = most if precision == "bf16" else max(1, most // 4)  # fp32 is slow
            started = time.perf_counter()
            count = images(blocks if bench.on_gpu else 2)
            row["images/s"] = round(count / (time.perf_counter() - started), 1)
            bench.add("sampling", row)


def scoring(bench: Benchmark) -> None:
    """Feature networks with random weights, on images of the host, as they are sampled."""
    set_precision(bench.device, static_shapes=True)
    for name in ("inception", "resnet"):
        if not bench.time_left(f"features of {name}"):
            continue
        with bench.attempt(f"features of {name}"):
            extractor = random_extractor(name, 32)
            layout = {"memory_format": torch.channels_last} if bench.on_gpu else {}
            extractor.network.to(bench.device, **layout).requires_grad_(False)
            count = 4096 if bench.on_gpu else 8
            pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
            extractor.extract(pixels[: count // 4])
            started = time.perf_counter()
            extractor.extract(pixels)
            rate = count / (time.perf_counter() - started)
            bench.add("features", {"network": name, "images/s": round(rate, 1)})


def noise(bench: Benchmark) -> None:
    """Milliseconds of the standard normal noise of 512 images of CIFAR-10's size."""
    from harness.streams import Stream

    index = torch.arange(512, device=bench.device)
    for mode in ("off", "gpu"):
        with kernels.kernels(mode):
            Stream(0, "benchmark").normal(index, (3, 32, 32))
            seconds = timed(bench, lambda: Stream(0, "benchmark").normal(index, (3, 32, 32)), 20)
        row = {"pass": FUSED if mode == "gpu" else PLAIN, "ms": round(1e3 * seconds, 3)}
        bench.add("noise of 512 images", row)


def timed(bench: Benchmark, compute, repeats: int) -> float:
    """Mean seconds of a call."""
    if bench.on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        compute()
    if bench.on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def sweep(bench: Benchmark) -> None:
    """GB/s of norm, shift and SiLU for tiles of several sizes: each image counts once per access
    that cannot be avoided, two forward (read, write) and three backward (two reads, a write)."""
    from harness.networks import fused, triton_ops

    def inputs(size: int) -> list[Tensor]:  # four, so that none is found in the cache
        x = torch.randn(128, 256, size, size, device=bench.device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        return [x.clone().requires_grad_() for _ in range(4)]

    layer = torch.nn.GroupNorm(32, 256, device=bench.device)
    shift = torch.randn(128, 256, device=bench.device)
    names = "TILE", "CHANNELS", "WIDTH", "WARPS"
    before = [getattr(triton_ops, name) for name in names]
    for tile, channels, warps in (
        *((4096, 32, 4), (4096, 32, 8), (8192, 32, 8), (2048, 32, 4), (4096, 64, 4)),
        *((8192, 64, 8), (4096, 16, 4), (16384, 32, 16)),
    ):
        if not bench.time_left(f"tile {tile} x {channels}, {warps} warps"):
            break
        triton_ops.set_tiles(tile, channels, triton_ops.WIDTH, warps)
        row = {"tile": tile, "channels": channels, "warps": warps}
        for size in (32, 16):
            images = inputs(size)
            outputs = [fused.norm(x, layer, shift) for x in images]
            gradient, moved = torch.randn_like(outputs[0]), images[0].numel() * 2 * len(images)

            def forward(images=images):
                with torch.no_grad():
                    for x in images:
                        fused.norm(x, layer, shift)

            def backward(images=images, outputs=outputs, gradient=gradient):
                for x, y in zip(images, outputs, strict=True):
                    torch.autograd.grad(y, x, gradient, retain_graph=True)

            for name, call, accesses in (("forward", forward, 2), ("backward", backward, 3)):
                call()
                rate = accesses * moved / timed(bench, call, 5) / 1e9
                row[f"{name}, {size} pixels"] = round(rate)
        bench.add("GB/s of the group norm", row)
    triton_ops.set_tiles(*before)


# -- the whole ------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    facts = results["machine"]
    lines = [f"# Speed on {facts['device']}, {facts['date']}", ""]
    lines += [
        "Written by `python -m benchmarks.gpu`. "
        + ", ".join(
            f"{key} {value}" for key, value in facts.items() if key not in ("device", "date")
        )
        + "."
    ]
    peaks = ", ".join(f"{k} {v:.4g} TFLOP/s" for k, v in results["peak TFLOP/s"].items())
    lines += ["", f"Peak of a square matrix product: {peaks}.", ""]
    for name, rows in results.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            table = tabulate(rows, "keys", tablefmt="github", missingval="–")
            lines += [f"## {name[0].upper()}{name[1:]}", "", table, ""]
    for name in ("failed", "left out"):
        if found := results.get(name):
            items = found.items() if isinstance(found, dict) else [(item, "") for item in found]
            text = "; ".join(": ".join(filter(None, item)) for item in items)
            lines += [f"{name.capitalize()}: {text}.", ""]
    if "against the goals" in results:
        goals = results["against the goals"]
        lines += ["## Against the goals", "", tabulate(goals.items(), tablefmt="github"), ""]
    quoted = ", ".join(f"{value} images/s ({key})" for key, value in QUOTED["images/s"].items())
    lines += [
        f"For comparison, {QUOTED['what']}: {quoted} ({QUOTED['device']}; not measured here)."
    ]
    return "\n".join(lines) + "\n"


def goals(results: dict[str, Any]) -> dict[str, str]:
    """What was reached, beside each goal."""
    found = {}
    for row in results.get("training", ()):
        if (row["student"], row["network"], row["pass"]) == ("sid", "official", FUSED):
            ratio = row["images/s"] / QUOTED["images/s"]["their half-precision option"]
            found["share of peak"] = row["share of peak"]
            found["times the authors' half precision"] = round(ratio, 2)
    for row in results.get("first iteration", ()):
        state = "" if row["cache of kernels"] == "empty" else ", kernels cached"
        found[f"first iteration s{state}"] = row["seconds"]
    return {name: f"{value} (goal: {GOALS[name]})" for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=automatic)
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--limit", type=float, default=270, help="start nothing after so many s")
    parser.add_argument("--profile", action="store_true", help="add the kernels of an iteration")
    parser.add_argument("--sweep", action="store_true", help="add the bandwidth for several tiles")
    parser.add_argument("--two-iterations", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Benchmark(args.device, args.limit, args.out)
    if args.two_iterations:
        two_iterations(bench)
        return
    bench.results["machine"] = describe(args.device)
    peaks = {
        precision: matmul_peak(args.device, section)[0] / 1e12
        for precision in (("bf16", "fp32") if bench.on_gpu else ("fp32",))
        for section in [bench.experiment(OFFICIAL, 4, precision=precision).training]
    }
    bench.results["peak TFLOP/s"] = peaks
    speed = training_row(bench, OFFICIAL, 128, "sid", FUSED)
    if args.profile and speed is not None:
        with bench.attempt("profile"):
            profile(bench, speed)
    del speed
    training_row(bench, OFFICIAL, 128, "sid", PLAIN)
    first_iteration(bench)
    with bench.attempt("agreement"):
        agreement(bench)
    if args.sweep and bench.on_gpu:
        with bench.attempt("sweep"):
            sweep(bench)
    for path in (SMALL, OFFICIAL) if bench.on_gpu else (SMALL,):
        with bench.attempt(f"sampling, {path}"):
            sampling(bench, path)
    scoring(bench)
    with bench.attempt("noise"):
        noise(bench)
    for variant in (FUSED, PLAIN):
        training_row(bench, SMALL, 256, "sid", variant)
    for student in ("sim", "dmd", "gdd-i"):
        training_row(bench, OFFICIAL, 128, student, FUSED, 5)
    for variant in (FUSED, PLAIN):
        training_row(bench, SMALL, 256, "gdd-i", variant)
    for student in ("gdd-i", "dmd", "sim"):
        training_row(bench, OFFICIAL, 128, student, PLAIN, 5)
    training_row(bench, OFFICIAL, 256, "sid", FUSED, 4)
    training_row(bench, OFFICIAL, 128, "sid", "plain fp32", 3)
    if bench.on_gpu:
        bench.results["against the goals"] = goals(bench.results)
    bench.write()
    print(f"\n{(args.out / 'gpu.md').read_text()}")


if __name__ == "__main__":
    main()
