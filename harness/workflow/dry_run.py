"""Training without memory or time: the networks, phases and losses of a student on the meta device,
whose tensors have no values. Costs do not depend on values, so all inputs are random."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher
from harness.data.datasets import Dataset
from harness.data.registry import Images, Prompts, data_source
from harness.denoiser import Denoiser
from harness.discriminators.class_table import SHAPE
from harness.errors import UserError
from harness.features.base import FeatureMaps, new_extractor
from harness.io.packages import require
from harness.io.records import DataRecord
from harness.networks import build_denoiser
from harness.networks.vp import Codec
from harness.students.inputs import Inputs
from harness.teachers import pipelines, sources
from harness.teachers.ddpm import build_vp_denoiser
from harness.training.run import TrainingRun
from harness.training.trainer import Trainer


def dry_run_inputs(experiment: Experiment, student: str, images: int = 1024) -> Inputs:
    """A student's inputs with random weights, `images` random images and as many pairs."""
    from harness.features.lpips import PerceptualDistance
    from harness.features.timm_backbones import Backbone

    name, needs = experiment.students[student].teacher, experiment.students[student].requirements
    dataset, null = dry_run_dataset(experiment, images), None
    if encoder := experiment.text_encoder_of(name):
        shape = new_extractor(encoder, experiment.features[encoder]).text_shape
        null = {"embeddings": torch.zeros(1, *shape)}
    teacher = dry_run_teacher(experiment, name, dataset, null).to(experiment.device)
    inputs = Inputs(dataset, teacher)
    if encoder:
        inputs.embeddings = lambda numbers: {"embeddings": torch.zeros(len(numbers), *shape)}
    elif dataset.prompts:
        inputs.embeddings = lambda numbers: teacher.null_condition(len(numbers))
    if not needs.pixels:
        teacher.codec = nn.Identity()
    if needs.features:
        extractor = new_extractor(needs.features, experiment.features[needs.features])
        inputs.required["features"] = FeatureMaps(extractor.build(dataset))
    if needs.backbones:
        require("timm", f"students.{student}")
        from timm import create_model

        backbones = nn.ModuleList(Backbone(n, create_model(n)) for n in needs.backbones)
        inputs.required["backbones"] = backbones
    if needs.class_table:
        inputs.required["class_table"] = nn.Embedding(*SHAPE)
    if needs.lpips:
        inputs.required["lpips"] = PerceptualDistance()
    if needs.pairs:
        inputs.pairs = {"x": torch.zeros(images, *teacher.image_shape)}
        if dataset.num_conditions:
            inputs.pairs["condition"] = dataset.train.labels
    return inputs


def dry_run_data(experiment: Experiment, teacher: str, images: int = 2) -> tuple:
    """What the training of a teacher reads, after its job (`harness.teachers.stage.assemble`):
    random images, the run's id and, for captions, their embeddings and the empty prompt's."""
    dataset, embeddings, null = dry_run_dataset(experiment, images), None, None
    if encoder := experiment.text_encoder_of(teacher):
        shape = new_extractor(encoder, experiment.features[encoder]).text_shape
        null = {"embeddings": torch.zeros(1, *shape)}

        def embeddings(numbers: Tensor) -> dict[str, Tensor]:
            return {"embeddings": torch.zeros(len(numbers), *shape)}

    return dataset, "plan", embeddings, null


def dry_run_dataset(experiment: Experiment, images: int) -> Dataset:
    """Random images with the shape and labels of the prepared data, or those that the experiment
    declares; no images are read."""
    data, source = experiment.data, data_source(experiment.data)
    shape, classes = source.image_shape, source.num_classes
    record = DataRecord.read_optional(experiment.paths.data / "data.json")
    if record is not None and record.fingerprint == experiment.prepared_data:
        shape, classes = tuple(record.image_shape), len(record.class_names)
    if shape is None:
        message = "the size of the images is unknown before `harness data` has read them"
        raise UserError(
            f"data.resolution or data.resize: required to plan; {message}", "missing-key"
        )
    texts, attributes = source.captions() or (None, None)
    if data.prompts is not None:
        texts, classes = ("a prompt",) * 256, 0
    prompts = Prompts(texts, "") if texts else None
    conditions = len(prompts) if prompts else classes
    pixels = torch.randint(256, (images, *shape), dtype=torch.uint8)
    part = Images(pixels, torch.randint(max(conditions, 1), (images,)))
    names = tuple(map(str, range(classes)))
    return Dataset(data.name, part, part, names, "", attributes, prompts, prompts)


def dry_run_teacher(
    experiment: Experiment, name: str, dataset: Dataset, null: dict | None
) -> Denoiser:
    """The teacher's network with random weights. null: the embedding of the empty prompt."""
    section = experiment.teachers[name]
    if isinstance(section, ImportedTeacher) and sources.reads_text(section):
        return dry_run_pipeline(section)
    if (network := sources.network_of(section)) is None:
        key = f"teachers.{name}.network"
        raise UserError(f"{key}: required to plan without the file", "missing-key")
    arguments = {"type": network.type, **network.arguments}
    if network.preconditioning == "vp":
        return build_vp_denoiser(arguments, dataset.num_classes)
    facts = dataset.image_shape, dataset.num_classes, getattr(section, "sigma_data", 0.5)
    return build_denoiser(arguments, *facts, null=null)


def dry_run_pipeline(section: ImportedTeacher) -> Denoiser:
    """The denoiser and codec of a pipeline, from its folder or, without it, from `network`."""
    from diffusers import AutoencoderKL

    network, vae = section.network, pipelines.STABLE_DIFFUSION_VAE
    if sources.kind_of(section) == "text-to-image":
        pipeline = pipelines.PipelineFolder(section.path)
        network, vae = pipeline.network_config(), pipeline.config("vae")
    teacher = pipelines.build_pipeline_denoiser(network)
    teacher.codec = Codec(AutoencoderKL(**vae))
    return teacher


class SavedTensorMemory:
    """Bytes that autograd graphs hold for backward passes: `current` and `peak`. A storage counts
    once, weights not at all. On the meta device autocast changes no dtype: a float32 tensor that is
    saved under autocast counts as bfloat16."""

    def __init__(self):
        self.references: Counter[int] = Counter()  # by storage
        self.sizes: dict[int, int] = {}  # of the storages, when first saved
        self.current = self.peak = 0

    def track(self, networks: Iterable[nn.Module]) -> torch.autograd.graph.saved_tensors_hooks:
        """A context whose graphs are counted, without the weights of `networks`."""
        weights = {p.untyped_storage()._cdata for net in networks for p in net.parameters()}

        def pack(tensor: Tensor) -> Callable[[], Tensor]:
            def saved() -> Tensor:
                return tensor

            storage = tensor.untyped_storage()
            narrow = tensor.is_meta and tensor.dtype == torch.float32
            narrow = narrow and torch.is_autocast_enabled("cpu")
            facts = storage._cdata, storage.nbytes() // (2 if narrow else 1)
            if storage._cdata not in weights:
                self._count(*facts, 1)
                weakref.finalize(saved, self._count, *facts, -1)  # when the graph is freed
            return saved

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved())

    def _count(self, storage: int, size: int, change: int) -> None:
        self.references[storage] += change
        if self.references[storage] == max(change, 0):  # the first reference, or none is left
            if change > 0:
                self.sizes[storage] = size
            self.current += change * self.sizes[storage]
            self.peak = max(self.peak, self.current)


class DryRunTrainer(Trainer):
    """A trainer that measures costs and `memory`, and updates no weights."""

    def __init__(self, run: TrainingRun):
        super().__init__(run)
        self.memory = SavedTensorMemory()

    def update(self, phase, repeat, contexts, variant, measuring) -> None:
        if variant in self.ledger.costs and not measuring:
            self.ledger.add(self.ledger.costs[variant])
            return
        with self.memory.track(self.all_networks.values()):
            super().update(phase, repeat, contexts, variant, measuring)

    def apply_gradients(self, phase, loss) -> None:
        for parameter in self.trainable[phase.network]:
            parameter.grad = None

    def update_ema(self, images: int) -> None:
        pass
