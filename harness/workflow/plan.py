"""`harness plan`: parameters, operations, memory and hours of every student before training."""

import functools
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from harness.config import schema
from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher, micro_batch
from harness.data.datasets import ON_DEVICE
from harness.errors import UserError
from harness.features.base import FEATURES, new_extractor
from harness.io.artifacts import size_text
from harness.io.records import DataRecord
from harness.students.run import assemble
from harness.teachers.sources import reads_text
from harness.teachers.stage import assemble as assemble_teacher
from harness.training.ledger import measure
from harness.training.lora import parameter_count
from harness.training.run import TrainingRun
from harness.workflow.dry_run import (
    DryRunTrainer,
    dry_run_data,
    dry_run_dataset,
    dry_run_inputs,
    dry_run_pipeline,
    dry_run_teacher,
)
from harness.workflow.speed import Speed

PERIOD = 64  # iterations to average over; phases such as lazy R1 are less frequent than others
GPUS = (24, 48, 80)  # GB of memory
COPIES = 4  # float32 numbers per trained parameter: weight, gradient, Adam's two moments
# What an estimate leaves out, for `gpu_percent`. On an H200, the peak of an iteration on the
# official CIFAR-10 network was 0.95 to 1.06 times the estimate (SiD), or 1.66 times (DMD, LPIPS).
CONTEXT = 2 << 30  # bytes of the CUDA context and of the libraries' workspaces
ALLOWANCE = 1.25  # the allocator's fragments, copies of weights in bfloat16, temporary tensors
LPIPS_ALLOWANCE = 2.0  # LPIPS' activations at its own resolution are not counted
ASSUMED_PROMPTS = 1_000_000  # in a file that does not exist yet


class TrainingEstimate:
    """Cost of a training, by iterations on the meta device. Memory is in bytes."""

    def _measure(self, run: TrainingRun, iterations: int) -> DryRunTrainer:
        self.batch, self.micro_batch, self.ghost = run.batch, run.micro_batch, run.ghost_batch
        switches = {"micro_batch": self.micro_batch}
        # Two micro-batches cost per image as much as more of them.
        loop, batch = run.loop.model_copy(update=switches), min(run.batch, 2 * self.micro_batch)
        trainer = DryRunTrainer(replace(run, loop=loop, batch=batch))
        for _ in range(iterations):
            trainer.step()
        # Per image that receives an update of the main network.
        self.flops_per_image = trainer.ledger.flops / (iterations * batch)
        self.parameters = parameter_count(trainer.networks[run.main])
        self.trainable = sum(p.numel() for p in trainer.trainable[run.main])
        trained = sum(p.numel() for ps in trainer.trainable.values() for p in ps)
        # Networks may share weights. Frozen weights of the main one are shared with its average.
        networks = trainer.all_networks.values()
        weights = {id(p): p.numel() for net in networks for p in net.parameters()}
        self.saved = trainer.memory.peak  # for backward passes
        held = sum(weights.values()) + self.trainable + (COPIES - 1) * trained
        self.memory = 4 * held + self.saved
        return trainer


class TeacherEstimate(TrainingEstimate):
    """Cost of training a teacher."""

    def __init__(self, experiment: Experiment, name: str):
        experiment = replace(experiment, device_setting="meta")
        with torch.device("meta"):
            run = assemble_teacher(experiment.teacher_job(name), *dry_run_data(experiment, name))
            self._measure(run, 1)
        self.images = experiment.teachers[name].images
        self.flops = self.flops_per_image * self.images


class Estimate(TrainingEstimate):
    """Cost of one run of a student."""

    def __init__(self, experiment: Experiment, name: str):
        experiment = replace(experiment, device_setting="meta")
        student, needs = experiment.students[name], experiment.students[name].requirements
        self.pair_flops = 0.0  # of all teacher pairs
        with torch.device("meta"), tempfile.TemporaryDirectory() as folder:
            inputs = dry_run_inputs(experiment, name, images=2)
            run = assemble(experiment.student_run(name, 0), inputs, Path(folder), "plan")
            if needs.pairs:
                shape, classes = inputs.teacher.image_shape, inputs.teacher.num_classes
                with torch.no_grad(), measure({}) as cost:
                    labels = torch.zeros(1, dtype=torch.long) if classes else None
                    inputs.teacher(torch.zeros(1, *shape), torch.ones(1), labels)
                self.pair_flops = cost.flops * needs.pairs * student.pairs.sampler.nfe
            trainer = self._measure(run, PERIOD)
        auxiliary = [net for net_name, net in trainer.networks.items() if net_name != run.main]
        self.auxiliary = sum(p.numel() for net in auxiliary for p in net.parameters())
        pairs = 4 * needs.pairs * math.prod(inputs.teacher.image_shape)
        if not inputs.embeddings and pairs <= ON_DEVICE:  # otherwise pairs stay on the host
            self.memory += pairs
        images = {
            "images": lambda amount: amount,
            "flops": lambda amount: max(0.0, (amount - self.pair_flops) / self.flops_per_image),
            "seconds": lambda amount: math.inf,
        }
        self.images = min(images[limit.unit](limit.amount) for limit in student.budget)
        self.flops = self.flops_per_image * self.images + self.pair_flops
        self.snapshots = self._snapshots(student.snapshots)  # None: unknown
        self.snapshot_bytes = 4 * self.parameters

    def _snapshots(self, grids: schema.Snapshots) -> int | None:
        """How many snapshots a run writes: at the first iteration at or beyond each point of its
        grids, and at its end."""
        if not math.isfinite(self.images):
            return None
        steps = {math.ceil(self.images / self.batch)}
        for unit, grid in grids.items():
            scale, offset = (self.flops_per_image, self.pair_flops) if unit == "flops" else (1, 0)
            first, last = grid.index(offset), grid.index(self.images * scale + offset)
            points = map(grid.point, range(first + 1, last + 1))
            steps |= {math.ceil((point - offset) / scale / self.batch) for point in points}
        return len(steps)

    def fits(self, gibibytes: int) -> int:
        """The largest micro-batch that fits into a GPU's memory; 0 if none does."""
        room = gibibytes * 2**30 - (self.memory - self.saved)
        limit = int(room * self.micro_batch / self.saved) if self.saved else self.batch
        parts = limit // self.ghost
        return self.ghost * micro_batch(self.batch // self.ghost, parts) if parts > 0 else 0


def forward_flops(experiment: Experiment, teacher: str) -> float:
    """Operations of one image through a teacher's network, which is also that of its students."""
    experiment = replace(experiment, device_setting="meta")
    with torch.device("meta"), torch.no_grad():
        dataset, _, _, null = dry_run_data(experiment, teacher)
        network = dry_run_teacher(experiment, teacher, dataset, null)
        with measure({}) as cost:
            labels = torch.zeros(1, dtype=torch.long) if network.num_classes else None
            condition = network.null_condition(1) if labels is None else labels
            network(torch.zeros(1, *network.image_shape), torch.ones(1), condition)
    return cost.flops


def feature_flops(experiment: Experiment, name: str) -> float | None:
    """Operations of one image through a feature network that is trained here; None for one without
    feature maps, which may not run without data."""
    settings = experiment.features[name]
    extractor = new_extractor(name, settings)
    if not (FEATURES[settings.type].trained and extractor.has_feature_maps):
        return None
    with torch.device("meta"), torch.no_grad():
        dataset = dry_run_dataset(experiment, 2)
        network = extractor.build(dataset)
        with measure({}) as cost:
            network(torch.zeros(1, *dataset.image_shape))
    return cost.flops


@functools.cache
def gpu_percent(experiment: Experiment, kind: str, name: str) -> int:
    """The share of one GPU's memory, in percent, that a training job requests from the workflow.

    kind, name: a student ("run"; all its training seeds share the estimate) or a "teacher". 100,
    the whole GPU, if a budget is in seconds, if a job spans several GPUs, and without an estimate:
    of an imported teacher, and of a student whose teacher's network is unknown.
    """
    if experiment.exclusive or experiment.processes() > 1:
        return 100
    try:
        memory = _training_memory(experiment, kind, name)
    except UserError:
        return 100
    total = torch.cuda.get_device_properties(experiment.device).total_memory
    return min(100, math.ceil(100 * memory / total))


def _training_memory(experiment: Experiment, kind: str, name: str) -> float:
    """Bytes on the GPU, with an allowance for what the estimate leaves out."""
    allowance, real_images = ALLOWANCE, True
    if kind == "teacher":
        if isinstance(experiment.teachers[name], ImportedTeacher):
            raise UserError(f"teachers.{name}: imported", "no-estimate")
        memory = TeacherEstimate(experiment, name).memory
    else:
        needs = experiment.students[name].requirements
        memory, real_images = Estimate(experiment, name).memory, needs.real_images
        allowance = LPIPS_ALLOWANCE if needs.lpips else ALLOWANCE
    images = 0
    if real_images:  # before they are prepared, their number is unknown: at most ON_DEVICE
        record = DataRecord.read_optional(experiment.paths.data / "data.json")
        images = ON_DEVICE
        if record is not None:
            size = record.train_images * math.prod(record.image_shape)
            images = size if size <= ON_DEVICE else 0  # larger ones stay on the host
    return CONTEXT + allowance * memory + images


def print_plan(experiment: Experiment, tflops: float | None = None) -> None:
    """Print one row per student. tflops: the sustained speed of a machine in TFLOP/s; default: of
    this one, if it has the experiment's device."""
    from tabulate import tabulate

    rows, disk, unknown, seeds = [], 0, False, len(experiment.training.seeds)
    speed, total = Speed(experiment, tflops), 0.0  # hours of all runs
    for student in experiment.students:
        if student in experiment.released:
            continue
        e = Estimate(experiment, student)
        hours = e.flops / speed.of(student) / 3600
        total += hours * seeds
        row = {
            "student": student,
            "parameters (M)": f"{e.parameters / 1e6:.2f}",
            "trained (M)": f"{e.trainable / 1e6:.2f}",
            "auxiliary (M)": f"{e.auxiliary / 1e6:.2f}",
            "micro-batch": e.micro_batch,
            "GFLOPs/image": f"{e.flops_per_image / 1e9:.4g}",
            "images": f"{e.images:,.0f}" if math.isfinite(e.images) else "–",
            "PFLOPs": f"{e.flops / 1e15:.4g}" if math.isfinite(e.flops) else "–",
            "memory (GiB)": f"{e.memory / 2**30:.3g}",
        }
        row |= {f"in {size} GB": e.fits(size) or "–" for size in GPUS}
        size = size_text(e.snapshot_bytes)
        row["snapshots"] = "–" if e.snapshots is None else f"{e.snapshots} x {size}"
        disk += (e.snapshots or 1) * e.snapshot_bytes * seeds
        unknown = unknown or e.snapshots is None
        rows.append(row | {"hours": f"{hours:.3g}" if math.isfinite(hours) else "–"})
    for name in experiment.released:
        print(f"{name}: released weights ({experiment.students[name].source}), not trained here")
    if not rows:
        return
    print(tabulate(rows, "keys", tablefmt="github", disable_numparse=True))
    hours = f"{total:.3g} hours for all runs, one after another. " if math.isfinite(total) else ""
    hours += _teacher_hours(experiment, speed)
    hours += "Feature networks, samples and scores come on top. "
    on_device, disk = f"{ON_DEVICE / 2**30:g} GiB", size_text(disk)
    print(
        f"\nEach run ({seeds} per student), {speed.source()}. {hours}Memory is an estimate for one "
        "GPU: float32 weights, gradients, Adam and EMA, tensors saved for backward passes (in each "
        "network's precision), and teacher pairs. Real images (at most "
        f"{on_device} on the device), bfloat16 copies of weights, the allocator and the kernels' "
        "workspaces come on top. "
        "`in 24 GB`: the largest micro-batch that fits. The snapshots of all runs take "
        f"{'at least ' if unknown else ''}{disk}; `harness prune` removes all but the best and the "
        "last of scored runs." + _embedding_sizes(experiment)
    )


def _teacher_hours(experiment: Experiment, speed: Speed) -> str:
    """The hours of training each teacher, as a sentence; empty if none is trained here."""
    hours = {
        name: TeacherEstimate(experiment, name).flops / speed.of(f"teacher {name}") / 3600
        for name, section in experiment.teachers.items()
        if not isinstance(section, ImportedTeacher)
    }
    if not hours:
        return ""
    return f"Before them: {', '.join(f'teacher {k} {v:.3g} hours' for k, v in hours.items())}. "


def _embedding_sizes(experiment: Experiment) -> str:
    """The disk space of prompt embeddings, as sentences. The prompts are counted in the prepared
    data or in local files; of a file that does not exist, the number is an assumption."""
    record, count = DataRecord.read_optional(experiment.paths.data / "data.json"), 0
    assumed = ""
    for key, (source, _) in experiment.data.prompt_files.items():
        file = Path(source).expanduser()
        if record is not None and (prompts := getattr(record, key)):
            count += prompts.prompts
        elif file.is_file():
            count += len(file.read_bytes().splitlines())
        else:
            count += ASSUMED_PROMPTS
            assumed += f", if {source} has {ASSUMED_PROMPTS:,} prompts"
    text = ""
    for name, section in experiment.teachers.items():
        if isinstance(section, ImportedTeacher) and reads_text(section):
            with torch.device("meta"):
                teacher = dry_run_pipeline(section)
            size = 2 * count * teacher.null_condition(1)["embeddings"].numel()  # float16
            text += f" Embeddings of {count:,} prompts for teacher {name}: {size / 1e9:,.1f} GB"
            text += f"{assumed}."
    return text
