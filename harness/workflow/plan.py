"""What an experiment will cost, before anything starts: parameters, operations, memory, hours.

Everything is counted on meta tensors, which have shapes and no numbers: the same networks, phases
and losses as in training, at the batch of the experiment, without the memory or the time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher
from harness.data.datasets import ON_DEVICE, Dataset, Images
from harness.data.prompts import prompts_of
from harness.data.registry import data_source
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.features.base import FEATURES
from harness.io.artifacts import read_json
from harness.networks import build_denoiser
from harness.students.inputs import Inputs
from harness.students.run import assemble
from harness.training.ledger import measure
from harness.training.lora import parameter_count
from harness.training.trainer import Trainer

# Iterations over which variants such as lazy R1 are averaged.
PERIOD = 64
GPUS = (24, 48, 80)  # gigabytes of the usual ones
# Float32 numbers per trained parameter: weight, gradient, Adam's two moments.
COPIES = 4


def stand_in_dataset(experiment: Experiment, images: int) -> Dataset:
    """Random images of the experiment's shape and labels, read from no file but an embedded one."""
    data, source = experiment.data, data_source(experiment.data)
    shape, classes = source.image_shape, source.num_classes
    if shape is None:
        raise UserError("data.resolution: required for the shape of the images", "missing-key")
    texts, attributes = source.captions() or (None, None)
    texts = prompts_of(texts) if texts else None
    if data.prompts is not None:
        texts, classes = prompts_of(("a prompt",) * 256), 0
    conditions = len(texts) if texts else classes
    random = Images(
        torch.randint(256, (images, *shape), dtype=torch.uint8),
        torch.randint(max(conditions, 1), (images,)),
    )
    names = tuple(map(str, range(classes)))
    return Dataset(data.name, random, random, names, "", attributes, texts, texts)


def stand_in_teacher(experiment: Experiment, name: str, dataset: Dataset) -> Denoiser:
    """The teacher's network with fresh weights."""
    section = experiment.teachers[name]
    if isinstance(section, ImportedTeacher) and section.pipeline:
        return _stand_in_pipeline(section)
    if isinstance(section, ImportedTeacher) and section.network is None:
        raise UserError(f"teachers.{name}.network: missing; it tells what the file will hold")
    sigma_data, text = getattr(section, "sigma_data", 0.5), stand_in_text(experiment, name)
    return build_denoiser(
        section.network,
        dataset.image_shape,
        dataset.num_classes,
        sigma_data,
        null=text(torch.zeros(1)) if text else None,
    )


def _stand_in_pipeline(section: ImportedTeacher) -> Denoiser:
    """A pipeline's denoiser with its codec: as its folder says, or `network` where there is none
    yet."""
    from diffusers import AutoencoderKL

    from harness.networks.vp import Codec
    from harness.teachers.pipelines import STABLE_DIFFUSION_VAE, PipelineFolder, fresh

    network, vae = section.network, STABLE_DIFFUSION_VAE
    if (folder := Path(section.source).expanduser()).exists():
        pipeline = PipelineFolder(folder)
        network = {"type": pipeline.network_class} | pipeline.config(pipeline.network)
        vae = pipeline.config("vae")
    teacher = fresh(network)
    teacher.codec = Codec(AutoencoderKL(**vae))
    return teacher


def stand_in_text(experiment: Experiment, teacher: str) -> Callable | None:
    """What a text encoder makes of prompts, by their numbers, if a teacher trained here has one:
    zeros."""
    encoder = experiment.text_encoder_of(teacher)
    if encoder is None:
        return None
    settings = experiment.features[encoder]
    shape = FEATURES[settings.type].text_shape(settings)
    return lambda numbers: {"embeddings": torch.zeros(len(numbers), *shape)}


def stand_in_inputs(experiment: Experiment, student: str, images: int = 1024) -> Inputs:
    """A student's inputs with random weights, images and pairs: costs do not depend on them."""
    from harness.features.lpips import PerceptualDistance, build_lpips
    from harness.features.timm_backbones import Backbone

    dataset, needs = stand_in_dataset(experiment, images), experiment.requirements(student)
    teacher = stand_in_teacher(experiment, experiment.teacher_of(student), dataset)
    inputs = Inputs(dataset, teacher.to(experiment.device))
    inputs.embeddings = stand_in_text(experiment, experiment.teacher_of(student))
    if dataset.prompts and inputs.embeddings is None:
        inputs.embeddings = lambda numbers: teacher.null_condition(len(numbers))
    if not needs.pixels:
        teacher.codec = nn.Identity()
    if needs.features:
        settings = experiment.features[needs.features]
        inputs.features = FEATURES[settings.type].build(settings, dataset)
    if needs.backbones:
        import timm

        inputs.backbones = nn.ModuleList(
            Backbone(name, timm.create_model(name, pretrained=False)) for name in needs.backbones
        )
    if needs.lpips:
        inputs.lpips = PerceptualDistance(build_lpips()).eval().requires_grad_(False)
    if needs.pairs:
        inputs.pairs = {"x": torch.zeros(images, *teacher.image_shape)}
        if dataset.num_conditions:
            inputs.pairs["condition"] = dataset.train.labels
    return inputs


class Tally:
    """Bytes of the storages that graphs hold at present, and the most that they ever were.

    A storage counts once, however many graphs and tensors hold it, until the last lets go of it.
    """

    def __init__(self):
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def hooks(self, networks: Iterable[nn.Module]) -> torch.autograd.graph.saved_tensors_hooks:
        """Count what graphs made under these keep, weights of the networks apart."""
        own = {p.untyped_storage()._cdata for net in networks for p in net.parameters()}

        def pack(tensor: Tensor) -> Tensor | Held:
            return tensor if tensor.untyped_storage()._cdata in own else Held(tensor, self)

        def unpack(kept: Tensor | Held) -> Tensor:
            return kept.tensor if isinstance(kept, Held) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Held:
    """What autograd keeps in place of a tensor that a backward pass will need."""

    def __init__(self, tensor: Tensor, tally: Tally):
        self.tensor, self.tally, storage = tensor, tally, tensor.untyped_storage()
        self.key, self.bytes = storage._cdata, storage.nbytes()
        count = tally.holders[self.key] = tally.holders.get(self.key, 0) + 1
        tally.now += self.bytes if count == 1 else 0
        tally.most = max(tally.most, tally.now)

    def __del__(self):
        self.tally.holders[self.key] -= 1
        if not self.tally.holders[self.key]:
            del self.tally.holders[self.key]
            self.tally.now -= self.bytes


class Rehearsal(Trainer):
    """A trainer that counts and changes nothing."""

    def __init__(self, run):
        super().__init__(run)
        self.tally = Tally()

    def update(self, phase, repeat, contexts, variant, measuring) -> None:
        if variant in self.ledger.costs and not measuring:
            self.ledger.add(self.ledger.costs[variant])
            return
        with self.tally.hooks(self.all_networks.values()):
            super().update(phase, repeat, contexts, variant, measuring)

    def apply_gradients(self, phase, loss) -> None:
        for parameter in self.trainable[phase.network]:
            parameter.grad = None

    def update_ema(self, images: int) -> None:
        pass


@dataclass(frozen=True)
class Estimate:
    """`flops_per_image`: of one image that receives a generator update. `memory`: bytes."""

    student: str
    batch: int
    parameters: int
    trainable: int
    beside: int  # parameters of the networks trained beside the student
    flops_per_image: float
    pair_flops: float
    images: float
    memory: float
    kept: float  # bytes of it that wait for backward passes
    on_host: float  # bytes of pairs that are too many for the device, or chosen from on the host
    whole: int  # the batch that micro-batches are parts of

    def fits(self, gibibytes: int) -> int:
        """The largest micro-batch, up to the whole batch, in a GPU's memory: 0 where none fits."""
        room = gibibytes * 2**30 - (self.memory - self.kept)
        most = int(room * self.batch / self.kept) if self.kept else self.whole
        return next((n for n in range(min(most, self.whole), 0, -1) if self.whole % n == 0), 0)

    @property
    def flops(self) -> float:
        return self.flops_per_image * self.images + self.pair_flops


def _images(limits: list[dict], flops_per_image: float, pair_flops: float) -> float:
    """How many images a budget comes to; a budget in seconds says nothing before it is run."""
    counts = {
        "images": lambda amount: amount,
        "flops": lambda amount: max(0.0, (amount - pair_flops) / flops_per_image),
        "seconds": lambda amount: math.inf,
    }
    return min(counts[limit["unit"]](limit["amount"]) for limit in limits)


def estimate(experiment: Experiment, student: str) -> Estimate:
    """Count one student's iterations on meta tensors."""
    experiment = replace(experiment, device_setting="meta")
    with torch.device("meta"), tempfile.TemporaryDirectory() as folder:
        inputs = stand_in_inputs(experiment, student, images=2)
        run = assemble(experiment.student_run(student, 0), inputs, Path(folder), "plan")
        # The operations are the same; neither autocast nor the compiler knows meta tensors.
        loop = replace(run.loop, precision="fp32", compile=False)
        # Of several micro-batches two tell as much: each makes its images anew.
        run = replace(run, loop=loop, batch=min(run.batch, 2 * loop.micro_batch))
        trainer, needs = Rehearsal(run), experiment.requirements(student)
        pair_flops = 0.0
        if needs.pairs:
            one = torch.ones(1)
            with torch.no_grad(), measure({}) as cost:
                labels = torch.zeros(1, dtype=torch.long) if inputs.teacher.num_classes else None
                inputs.teacher(torch.zeros(1, *inputs.teacher.image_shape), one, labels)
            sampler = experiment.pair_sampler(experiment.pairs_name(student))
            pair_flops = cost.flops * needs.pairs * sampler.nfe
        for _ in range(PERIOD):
            trainer.step()
    flops = trainer.ledger.flops / (PERIOD * run.batch)
    beside = sum(
        p.numel() for n, net in trainer.networks.items() if n != "student" for p in net.parameters()
    )
    trainable = sum(p.numel() for ps in trainer.trainable.values() for p in ps)
    # Weights that networks share are there once; those that never change are their own average.
    there = {id(p): p.numel() for net in trainer.all_networks.values() for p in net.parameters()}
    averaged = sum(p.numel() for p in trainer.trainable["student"])
    present, parameters = sum(there.values()), parameter_count(trainer.networks["student"])
    kept = (0.5 if experiment.training.precision == "bf16" else 1.0) * trainer.tally.most
    memory = 4 * (present + averaged + (COPIES - 1) * trainable) + kept
    pairs = 4 * needs.pairs * math.prod(inputs.teacher.image_shape)
    on_host = pairs if inputs.embeddings or pairs > ON_DEVICE else 0
    memory += pairs - on_host
    return Estimate(
        student,
        run.loop.micro_batch,
        parameters,
        averaged,
        beside,
        flops,
        pair_flops,
        _images(experiment.budget_spec(student), flops, pair_flops),
        memory,
        kept,
        on_host,
        experiment.method_config(student).batch,
    )


# Prompts in a file that is not here.
UNSEEN_PROMPTS = 1_000_000


def _prompts(experiment: Experiment) -> int:
    """How many prompts there are to embed; before the data are made as files that lie here say."""
    made, count = experiment.data_dir() / "data.json", 0
    record = read_json(made) if made.exists() else {}
    for key, (file, _) in experiment.data.prompt_files.items():
        path = Path(file).expanduser()
        if key in record:
            count += record[key]["prompts"]
        elif path.is_file():
            with open(path, "rb") as lines:
                count += sum(1 for _ in lines)
        else:
            count += UNSEEN_PROMPTS
    return count


def print_plan(experiment: Experiment, tflops: float) -> None:
    """One line per student; `tflops`: the rate that the machine is expected to sustain."""
    from tabulate import tabulate

    rows = []
    for student in experiment.students:
        e = estimate(experiment, student)
        hours = e.flops / (tflops * 1e12) / 3600
        rows.append(
            (
                student,
                f"{e.parameters / 1e6:.2f}",
                f"{e.trainable / 1e6:.2f}",
                f"{e.beside / 1e6:.2f}",
                e.batch,
                f"{e.flops_per_image / 1e9:.4g}",
                f"{e.images:,.0f}" if math.isfinite(e.images) else "–",
                f"{e.flops / 1e15:.4g}" if math.isfinite(e.flops) else "–",
                f"{e.memory / 2**30:.3g}",
                *(e.fits(size) or "–" for size in GPUS),
                f"{hours:.3g}" if math.isfinite(hours) else "–",
            )
        )
    headers = ("student", "parameters (M)", "trained (M)", "beside (M)", "micro-batch")
    headers += ("GFLOPs/image", "images", "PFLOPs", "memory (GiB)")
    headers += (*(f"in {size} GB" for size in GPUS), "hours")
    runs = len(experiment.training.seeds)
    told = _embedded(experiment)
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    print(
        f"\nPer run, of {runs} per student; hours at a sustained {tflops:g} TFLOP/s. Memory is an "
        "estimate for one GPU: weights, gradients, Adam and EMA in float32, the tensors that are "
        "kept for backward passes, teacher pairs; not real images (at most "
        f"{ON_DEVICE / 2**30:g} GiB of them stay there), the allocator's or a kernel's own. In 24 "
        "GB, …: the largest micro-batch that such a GPU has room for to train, by this estimate."
        + told
    )


def _embedded(experiment: Experiment) -> str:
    """What is to be said of the disk that prompts take."""
    told = ""
    for name, section in experiment.teachers.items():
        if isinstance(section, ImportedTeacher) and section.pipeline:
            with torch.device("meta"):
                teacher = _stand_in_pipeline(section)
            numbers = teacher.null.parts["embeddings"].numel()
            count = _prompts(experiment)
            size = f"{2 * numbers * count / 1e9:,.1f} GB on disk"
            told += f" Embeddings of {count:,} prompts by teacher {name} take {size}."
    return told
