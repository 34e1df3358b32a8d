"""How fast this machine computes: by the runs that it has trained, or by a matrix product."""

import math
import os
import statistics
import time

import torch

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.io.records import StudentRecord
from harness.precision import set_precision
from harness.training.ledger import device_name

SHARE = 0.2  # of a matrix product's rate, which a training reaches: assumed
ASSUMED = 100e12  # FLOP/s of a GPU that this machine does not have


def matrix_rate(device: str, precision: str) -> float:
    """FLOP/s of a matrix product: 8192³ on a GPU, 1024³ on CPU, there always in float32."""
    gpu = device.startswith("cuda")
    size, kind = 8192 if gpu else 1024, torch.float32
    if gpu and precision == "bf16":
        kind = torch.bfloat16
    set_precision(device)  # no TensorFloat-32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in "ab")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = a @ b
        if gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    del product
    return 2 * size**3 / statistics.median(times)


def trained_rates(experiment: Experiment) -> dict[str, float]:
    """FLOP/s of the students that were trained on this device; the slowest run of each."""
    rates, device = {}, device_name(experiment.device)
    for student, seed in experiment.runs:
        path = experiment.paths.run(student, seed) / "student.json"
        try:
            record = StudentRecord.read_optional(path)
        except UserError:
            continue
        if record and record.ledger and record.device_name == device:
            charges = record.ledger.charges.values()
            flops = record.ledger.flops - sum(charge["flops"] for charge in charges)
            seconds = record.ledger.seconds - sum(charge["seconds"] for charge in charges)
            if flops > 0 and seconds > 0:
                rates[student] = min(flops / seconds, rates.get(student, math.inf))
    return rates


class Speed:
    """The sustained FLOP/s of trainings, and where the numbers come from. given: in TFLOP/s, in
    place of what this machine reaches."""

    def __init__(self, experiment: Experiment, given: float | None = None):
        self.experiment, self.trained, self.given = experiment, {}, given
        device = experiment.device
        self.missing = device.startswith("cuda") and not torch.cuda.is_available()
        if given is None and not self.missing:
            self.trained = trained_rates(experiment)
        self._products: dict[str, float] = {}  # rates of a matrix product, by precision

    def of(self, student: str) -> float:
        """FLOP/s of a student's training, or of another one at the experiment's precision."""
        if self.given is not None:
            return self.given * 1e12
        if self.missing:
            return ASSUMED
        if self.trained:
            return self.trained.get(student, min(self.trained.values()))
        training = self.experiment.training
        if student in self.experiment.students:
            training = self.experiment.student_training(student)
        precision = training.precision
        if precision not in self._products:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as jobs on CPU
            self._products[precision] = matrix_rate(self.experiment.device, precision)
            torch.set_num_threads(threads)
        return SHARE * self._products[precision]

    def source(self) -> str:
        """The rates that `of` has returned, and where they come from."""
        device = self.experiment.device
        if self.given is not None:
            return f"at {self.given:g} TFLOP/s, as given"
        if self.missing:
            return f"at {ASSUMED / 1e12:g} TFLOP/s, assumed: this machine has no {device}"
        name = device_name(device) if device.startswith("cuda") else "one thread of this CPU"
        if self.trained:
            return f"at the rate of the runs trained on this machine ({', '.join(self.trained)})"
        rates = " and ".join(f"{SHARE * r / 1e12:.3g}" for r in self._products.values())
        text = f"at {rates} TFLOP/s, {SHARE:.0%} (assumed) of a matrix product's rate on {name}"
        busy = os.getloadavg()[0]
        if busy > 0.5 * (os.cpu_count() or 1) and not device.startswith("cuda"):
            text += f" (measured beside other work, load {busy:.1f})"
        return text
