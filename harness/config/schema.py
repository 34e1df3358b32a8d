"""The keys of an experiment file, as pydantic classes."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator

from harness.io.downloads import expand, is_address
from harness.io.hub import cached_snapshot
from harness.method import UNIQUE, Beta
from harness.schedules import RHO, SIGMA_MAX, SIGMA_MIN

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


def _matching(pattern: str, expected: str) -> Any:
    """Text of a form. expected: the form in words, for the message."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}, not {value!r}")
        return value

    return Annotated[str, AfterValidator(check)]


Sha256 = _matching("[0-9a-f]{64}", "64 hexadecimal digits (a sha256)")
Device = _matching(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, or one GPU such as cuda:1")
Names = dict[str, list[str]]  # section -> names of all its items, valid or not
PROMPT_SETS = ("prompts", "evaluation_prompts")
PROMPT_KEYS = {f"{key}{suffix}" for key in PROMPT_SETS for suffix in ("", "_sha256")}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ResizeSection(Section):
    """How images of a source get the width and height `size`. center-crop: the largest centred
    square, then Lanczos; lanczos: stretched; none: all images must have this size."""

    mode: Literal["center-crop", "lanczos", "none"] = "center-crop"
    size: int = Field(gt=0, le=2048)

    def __str__(self) -> str:
        size = f"{self.size} x {self.size} pixels"
        actions = {"center-crop": "centred square, Lanczos to", "lanczos": "Lanczos to"}
        return f"{actions.get(self.mode, 'none; images of')} {size}"


class DataSection(Section):
    """The data set: a registered one (`name` alone), image files (`source`, see docs/data.md), or
    only the shape of its images (`image_shape`) for an experiment that needs none. With `prompts`,
    labels in `source` are line numbers of prompts, or their texts. Files are paths relative to the
    working directory, or URLs. With `revision`, `source` is a repository of the Hugging Face hub.
    """

    name: str
    held_out: float = Field(0.2, ge=0, lt=1, description="fraction of each class to hold out")
    source: str | None = Field(None, min_length=1, description="zip or folder of images")
    sha256: Sha256 | None = Field(None, description="of `source`, if it is one file")
    revision: str | None = Field(None, description="commit of the hub's repository `source`")
    labels: bool = Field(True, description="false: ignore the source's labels")
    label_column: str | None = Field(None, min_length=1, description="of a table; default: label")
    num_classes: Positive | None = Field(None, description="default: what the source has")
    resolution: Positive | None = Field(None, description="width that the images must have")
    resize: ResizeSection | None = Field(None, description="default: all images have one size")
    image_shape: tuple[Positive, Positive, Positive] | None = Field(None, description="C, H, W")
    prompts: str | None = Field(None, min_length=1, description="text file, one prompt per line")
    prompts_sha256: Sha256 | None = None
    evaluation_prompts: str | None = Field(None, min_length=1, description="default: `prompts`")
    evaluation_prompts_sha256: Sha256 | None = None

    @property
    def has_images(self) -> bool:
        return self.source is not None or self.image_shape is None

    @property
    def size(self) -> int | None:
        """Width and height of the images, if the section declares them."""
        if self.resize is not None:
            return self.resize.size
        return self.image_shape[1] if self.image_shape else self.resolution

    def fingerprint(self) -> dict[str, Any]:
        """What decides the images and their labels. Where they lie is not included, nor are
        declarations that are only compared with a source: of its classes, what was found is in the
        hash of the prepared data. Keys that are newer than results are listed where they are set.
        Prompts count by their embeddings, so that other evaluation prompts retrain nothing."""
        new = {key for key in ("revision", "label_column", "resize") if getattr(self, key) is None}
        values = self.model_dump(exclude={"source", *PROMPT_KEYS, *new})
        declared = ("resolution", *(["num_classes"] if self.source is not None else []))
        return values | dict.fromkeys(declared)

    @property
    def prompt_files(self) -> dict[str, tuple[str, str | None]]:
        """Key -> (file, sha256) of each prompt set."""
        keys = [key for key in PROMPT_SETS if getattr(self, key) is not None]
        return {key: (getattr(self, key), getattr(self, f"{key}_sha256")) for key in keys}


class Limit(Section):
    unit: Literal["images", "flops", "seconds"]
    amount: float = Field(gt=0, allow_inf_nan=False)


def _one_limit_per_unit(limits: list[Limit]) -> list[Limit]:
    units = [limit.unit for limit in limits]
    for unit in set(units):
        if units.count(unit) > 1:
            raise ValueError(f"more than one limit in {unit}")
    return limits


Budget = Annotated[list[Limit], AfterValidator(_one_limit_per_unit)]


class Grid(Section):
    """Snapshots at the multiples of `every`, or at first * 2**(k / per_octave), k = 0, 1, …"""

    every: float | None = Field(None, gt=0)
    first: float | None = Field(None, gt=0)
    per_octave: float = Field(1, gt=0)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.every is None) == (self.first is None):
            raise ValueError("set either every (a linear grid) or first (a logarithmic one)")
        if self.every is not None and "per_octave" in self.model_fields_set:
            raise ValueError(
                "per_octave belongs to a logarithmic grid; not allowed together with every"
            )
        return self

    @model_serializer
    def _own_keys(self) -> dict[str, float]:
        """Only the keys of the grid's kind, which fingerprints contain."""
        keys = ("first", "per_octave") if self.every is None else ("every",)
        return {key: getattr(self, key) for key in keys}

    def index(self, amount: float) -> int:
        """How many points of the grid lie at or below an amount."""
        if self.every is not None:
            return int(amount // self.every)
        if amount < self.first:
            return 0
        return math.floor(math.log2(amount / self.first) * self.per_octave + 1e-9) + 1

    def point(self, number: int) -> float:
        """The amount of a point; the first one has number 1."""
        if self.every is not None:
            return number * self.every
        return self.first * 2 ** ((number - 1) / self.per_octave)


Snapshots = dict[Literal["images", "flops"], Grid]  # the grid of each unit


class Sampler(Section):
    """EDM's Heun sampler (Karras et al. 2022): keyword arguments of `harness.sampling.heun`."""

    steps: Positive = 18
    sigma_min: float = Field(SIGMA_MIN, gt=0)
    sigma_max: float = Field(SIGMA_MAX, gt=0)
    rho: float = Field(RHO, gt=0)
    s_churn: float = Field(0.0, ge=0, description="0: deterministic; otherwise stochastic")
    s_min: float = Field(0.0, ge=0)
    s_max: float | None = Field(None, gt=0)
    s_noise: float = Field(1.0, gt=0)
    guidance: float = Field(1.0, ge=0, description="scale of classifier-free guidance; 1: off")

    @model_validator(mode="after")
    def _levels_are_in_order(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max")
        if self.s_max is not None and self.s_min > self.s_max:
            raise ValueError(f"s_min {self.s_min:g} must not be above s_max")
        return self

    @property
    def nfe(self) -> int:
        """Network evaluations per image; guidance doubles them."""
        return (2 * self.steps - 1) * (1 if self.guidance == 1 else 2)


class TeacherSection(Section):
    """Keys of every teacher. `sampler` generates its rows in the tables."""

    sampler: Sampler = Sampler()

    def fingerprint(self) -> dict[str, Any]:
        """What decides the weights."""
        return self.model_dump(exclude={"sampler"})


class ImportedTeacher(TeacherSection):
    """An existing teacher (docs/teachers.md): a denoiser folder, a folder of diffusers, an official
    EDM pickle (file or URL), the weights of a plug-in's network, or, with `revision`, a repository
    of the Hugging Face hub."""

    source: str
    revision: str | None = Field(None, description="commit hash, if `source` is a hub id")
    sha256: Sha256 | None = None
    network: dict[str, Any] | None = Field(None, description="for `plan` without the file")

    def fingerprint(self) -> dict[str, Any]:
        """What decides the weights. `revision` is listed where it is set."""
        exclude = {"sampler"} | ({"revision"} if self.revision is None else set())
        return self.model_dump(exclude=exclude)

    @property
    def path(self) -> Path | None:
        """The local file or folder, which may not exist. Of a repository, its folder in the hub's
        cache; None if it was not downloaded yet, and for a URL."""
        if self.revision is not None:
            return cached_snapshot(self.source, self.revision)
        return None if is_address(self.source) else expand(self.source)


class Switches(Section):
    """How a training loop computes. `precision` and `tf32` decide the numbers' resolution. The
    others change rounding only, except that `micro_batch` changes dropout's random numbers and, a
    little, the spectral norms of GDD's discriminator (docs/fidelity.md)."""

    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = Field(False, description="TensorFloat-32 where training computes in fp32")
    channels_last: bool | None = Field(
        None, description="memory format; default: on a GPU in bf16, of networks with fused kernels"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations (diffusers)")
    micro_batch: Positive | None = Field(None, description="largest number of images at a time")


class TrainedTeacher(TeacherSection, Switches):
    """A teacher trained in the workflow: a denoiser with EDM's loss."""

    network: dict[str, Any]
    images: Positive
    batch: Positive = 128
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_steps: int = Field(0, ge=0)
    ema_half_life: int = Field(500_000, ge=0)
    ema_ramp_up: float = Field(0.05, gt=0)
    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    label_dropout: float = Field(0.0, ge=0, lt=1)
    augment: float = Field(0.0, ge=0, le=1, description="probability of EDM's augmentations")
    text_encoder: str | None = Field(None, description="a CLIP of `features`, for captions")
    seed: Seed = 0


class FeatureSettings(Section):
    """Settings of a feature network; each network's class extends them."""

    type: str


class LoraSection(Section):
    """Low-rank adapters that train instead of a student's and its fake score's weights."""

    rank: Positive
    alpha: float | None = Field(None, gt=0, description="default: the rank")

    @property
    def scale(self) -> float:
        return self.rank if self.alpha is None else self.alpha


class StudentSection(Section):
    method: str
    teacher: str | None = None
    freeze: Literal["none", "innate"] = "none"
    lora: LoraSection | None = None
    settings: dict[str, Any] = {}
    adapted: dict[str, str] = Field(
        {}, description="settings that the teacher decided, and why; written by the project"
    )
    budget: Budget | None = Field(None, min_length=1, description="default: training.budget")
    snapshots: Snapshots | None = Field(None, description="default: training.snapshots")
    precision: Literal["fp32", "bf16"] | None = Field(None, description="default: of training")
    micro_batch: Positive | None = Field(None, description="default: of training")


class ReleasedStudent(Section):
    """One-step weights that others trained and released: an official pickle (file or URL) or a
    folder that `import-edm` made from one. They are imported and scored, never trained here.
    sha256: of the pickle in both cases. method, freeze and settings: of their training; the network
    is evaluated at `settings.sigma_init`."""

    source: str = Field(min_length=1)
    sha256: Sha256 | None = None
    method: str
    freeze: Literal["none", "innate"] = "none"
    settings: dict[str, Any] = {}


class LoopSettings(Switches):
    """How a training loop computes, saves its state and logs."""

    max_nonfinite: int = Field(20, ge=0, description="more such steps in a row end the run")
    tick_images: Positive = Field(1024, description="images between two rows of the log")
    checkpoint_seconds: float = Field(15.0, ge=0, description="least time between saved states")
    # train.csv is always written
    loggers: Annotated[list[Literal["csv", "tensorboard", "wandb"]], UNIQUE] = ["csv"]


class TrainingSection(LoopSettings):
    """What all students share. A student's own settings override `settings`, which override the
    method's defaults."""

    seeds: list[Seed] = Field(min_length=1)
    budget: Budget = Field(min_length=1)
    settings: dict[str, Any] = {}
    snapshots: Snapshots = {}


class EvaluationSection(Section):
    num_samples: Positive = 2000
    sampling_seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    snapshot_seeds: Positive | None = Field(None, description="of snapshots before the last")
    selection_seed: Seed | None = Field(None, description="compares snapshots; None: no selection")
    extractors: Annotated[list[str], UNIQUE] = Field(min_length=1)
    metrics: Annotated[list[str], UNIQUE] | None = Field(
        None, min_length=1, description="default: all defined ones"
    )
    main_metric: str = "fd"
    statistics: str | None = Field(None, min_length=1, description=".npz with mu and sigma of FID")
    statistics_sha256: Sha256 | None = None
    neighbours: Positive = 3
    grid_samples: Positive = 100
    block: Positive = Field(256, description="images per sampling batch, also for teacher pairs")
    tf32: bool = Field(False, description="TensorFloat-32 for sampling and teacher pairs on a GPU")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of sampling and teacher pairs")

    def fingerprint(self) -> dict[str, Any]:
        """What decides scores, without `metrics`, which `harness.evaluation` adds by name.
        `precision` is listed where it is not fp32."""
        default = {"precision"} if self.precision == "fp32" else set()
        return self.model_dump(exclude={"metrics"} | default)


class PublishedName(Section):
    """A student's name in the published tables. Without `variant`: the rows that have none."""

    method: str
    variant: str | None = None


class PaperSection(Section):
    """Published numbers to compare the experiment with. methods: published names of students or of
    teacher rows, where they differ from the defaults in `harness.reporting.published`."""

    dataset: str
    conditioning: str | None = None
    setting: Literal["exact", "scaled", "toy"] = "scaled"  # in comparison with the papers'
    methods: dict[str, PublishedName] = {}


class ClaimSection(Section):
    """A published claim as a comparison of two students: `better` beats `worse` in `metric`."""

    claim: str = Field(min_length=1)
    source: str = Field(min_length=1)
    reported: str = Field(min_length=1, description="the source's evidence, in words")
    better: str
    worse: str
    metric: str | None = Field(None, description="default: the main metric")


class ExperimentFile(Section):
    """An experiment file. `harness.validation` parses feature networks and teachers by type."""

    name: str
    device: Device = "auto"
    processes: Literal["auto"] | Positive = "auto"  # per job; auto: one per GPU, or 1 on CPU
    plugins: Annotated[list[str], UNIQUE] = Field(
        [], description="Python files that register more classes"
    )
    data: DataSection
    features: dict[str, Any]
    teachers: dict[str, Any] = {}  # required to train students
    students: dict[str, Any] = Field(min_length=1)
    training: TrainingSection
    evaluation: EvaluationSection
    paper: PaperSection | None = None
    claims: list[ClaimSection] = []


def micro_batch(batch: int, limit: int | None) -> int:
    """The largest divisor of a batch up to a limit (None: the whole batch)."""
    return next(n for n in range(min(batch, limit or batch), 0, -1) if batch % n == 0)
