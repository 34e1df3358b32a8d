"""Typed records: the JSON files that stages leave, such as `student.json`, a `StudentRecord`.

A stage writes its record last, so its presence means that the stage is complete.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from harness import RESULTS_FORMAT, SCORES_FORMAT
from harness.errors import UserError
from harness.io.artifacts import damaged, read_json, write_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Record(_Part):
    """A record that is a file of its own. Fields that are None are not written."""

    FORMAT: ClassVar[int] = RESULTS_FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record; a missing or damaged file, or one of another format, is a `UserError`."""
        value = read_json(path, owner=path)
        if not isinstance(value, dict) or "format" not in value:
            raise damaged(path, "no format", owner=path)
        if (found := value.pop("format")) != cls.FORMAT:
            message = f"has format {found}; this version reads format {cls.FORMAT}"
            raise UserError(f"{path} {message}; run the workflow again", "format")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise damaged(path, reason, owner=path) from None

    @classmethod
    def read_optional(cls, path: Path) -> Self | None:
        return cls.read(path) if path.exists() else None

    def write(self, path: Path) -> None:
        write_json(path, {"format": self.FORMAT, **self.model_dump(exclude_none=True)})


class Cost(_Part):
    flops: int = 0
    passes: dict[str, list[int]] = {}  # network -> images [forward, backward]


class Costs(_Part):
    images: int = 0  # that received a generator update
    flops: int = 0
    seconds: float = 0.0  # of training, without evaluation, checkpoints and start-up
    peak_memory: int = 0  # bytes
    generated: int = 0  # images that the student generated, with and without an update
    passes: dict[str, list[int]] = {}  # network -> images [forward, backward]
    charges: dict[str, dict[str, Any]] = {}  # costs before training, included in the totals
    costs: dict[str, Cost] = {}  # the measured cost of each update variant


class Snapshot(_Part):
    name: str
    sha256: str
    grid: list[str]  # the units whose grid the point lies on
    step: int
    before: dict[str, float]  # what was spent one step earlier
    ledger: Costs | None = None  # None: trained elsewhere
    ema_half_life: float | None = None  # images


class Stop(_Part):
    unit: str
    amount: float


class TrainingFacts(Record):
    """What the records of trained networks share; None in those of imported ones."""

    harness: str | None = None
    torch: str | None = None
    run_id: str | None = None  # a folder below `runs/`
    sha256: str | None = None
    stop: Stop | None = None  # the budget that ended the training
    tf32: bool | None = None  # whether TensorFloat-32 was allowed where training used float32
    device_name: str | None = None  # where it was trained: "NVIDIA H200", "cpu"
    skipped_steps: dict[str, int] | None = None  # phase -> steps with a non-finite gradient
    ledger: Costs | None = None  # totals (`harness.training.ledger`)


class StudentRecord(TrainingFacts):
    sha256: str
    fingerprint: str
    experiment: str
    student: str
    seed: int
    method: str
    paper: str
    data_free: bool
    deviations: list[str]
    settings: dict[str, Any]
    changed_settings: dict[str, Any]
    freeze: str
    lora: dict[str, Any] | None = None
    teacher: str | None = None
    released: dict[str, str] | None = None  # source of weights not trained here, and its sha256
    trained_against: list[str]  # feature networks in the losses, whose metrics are flagged
    pretraining: list[str]  # data sets of the pretrained networks in the losses
    device: str
    processes: int
    nfe: int
    parameters: int
    frozen_fraction: float | None = None  # None: trained elsewhere
    inputs: dict[str, Any]  # input -> sha256
    snapshots: list[Snapshot]  # averaged weights during training
    contended: bool  # other work ran during a run with a budget in seconds


class File(_Part):
    file: str  # or folder, next to the record
    sha256: str


class TeacherRecord(TrainingFacts):
    teacher: str
    sha256: str
    fingerprint: str
    parameters: int
    device: str | None = None
    imported: dict[str, str] | None = None  # source and its sha256
    warnings: list[str] = []  # about an imported network (`harness.teachers.denoising_check`)
    text: File | None = None  # embeddings of the prompts
    evaluation_text: File | None = None
    codec: dict[str, str] | None = None  # the decoder's sha256


class PairRecord(Record):
    name: str
    fingerprint: str
    run_id: str  # the folder with the shards
    pairs: int
    sampler: dict[str, Any]
    evaluations: int  # of the teacher's network
    tf32: bool  # whether it was allowed TensorFloat-32
    precision: str = "fp32"  # of its network
    flops: int
    seconds: float
    contended: bool  # other work ran meanwhile
    sha256: str  # of all shards


class FeatureRecord(TrainingFacts):
    name: str
    settings: dict[str, Any]  # of the network's class, with its `type`
    file: str | None = None  # of a fetched network
    unavailable: str | None = None  # why it has no weights, in two words
    reason: str | None = None  # the error
    missing: dict[str, str] = {}  # head -> why it has no weights
    held_out_accuracy: float | None = None
    aesthetic: dict[str, Any] | None = None  # the trained aesthetic head


class PromptFile(_Part):
    prompts: int  # number of lines
    sha256: str


class DataRecord(Record):
    name: str
    fingerprint: str | None = None  # `Experiment.prepared_data`
    registered: bool  # `name` is a registered data set
    class_names: list[str]
    train_images: int
    held_out_images: int
    image_shape: list[int]
    images_sha256: str  # of the images, or of their shape and classes if there are none
    sha256: str  # of images and prompts
    label_counts: list[int] | None = None  # training images of each class or prompt, if labelled
    resize: str | None = None  # how the source's images got their size
    prompts: PromptFile | None = None
    evaluation_prompts: PromptFile | None = None


class ScoreRow(_Part):
    sample_seed: int | None = None  # None for real images
    metric: str
    extractor: str
    num_samples: int
    value: float | None = None
    stderr: float | None = None
    leave_out: list[float] = []  # values without each tenth of the samples
    protocol: str  # key of `ScoreRecord.protocols`
    flag: str = ""
    status: str | None = None  # why there is no value


class ScoreEntry(_Part):
    """The rows of one snapshot, or of a reference ("teacher", "teacher-1step", "floor")."""

    student: str | None = None
    snapshot: str
    final: bool
    grid: list[str]
    sha256: str | None = None
    nfe: int | None = None
    ema: float | None = None  # half-life in images
    images: int | None = None
    flops: int | None = None
    seconds: float | None = None
    selection: bool | None = None  # scored with the selection seed, to be compared
    selected: int | None = None  # the best of so many snapshots
    rows: list[ScoreRow]


class SnapshotScores(Record):
    """What remains of the scores of a snapshot when its weights are removed."""

    FORMAT = SCORES_FORMAT
    sha256: str  # of the weights
    fingerprint: str  # of the score file
    numbers: dict[str, str]  # protocol -> `number_fingerprint`
    rows: list[ScoreRow]


class Samples(File):
    neighbour_extractor: str | None = None  # for the nearest training images
    neighbour_rows: int | None = None  # number of training images that were searched
    neighbour_unit: str | None = None  # of the distances


class ScoreRecord(Record):
    """The scores of a run (student, method, seed), or of a teacher and the floor."""

    FORMAT = SCORES_FORMAT
    student: str | None = None
    teacher: str | None = None
    method: str | None = None
    seed: int | None = None
    weights: str  # sha256 of the network
    fingerprint: str
    contended: bool = False
    released: bool | None = None  # weights that were not trained here
    device_name: str | None = None  # where it was scored: "NVIDIA H200", "cpu"
    trained_on: str | None = None  # `device_name` of the network's record
    tf32: bool  # whether sampling was allowed TensorFloat-32; feature networks never are
    precision: str = "fp32"  # of the sampled networks; feature networks always compute in fp32
    entries: list[ScoreEntry]
    samples: Samples | None = None  # images for figures
    protocols: dict[str, dict[str, Any]]
    dimensions: dict[str, int]  # extractor -> number of features
    kept: File | None = None  # samples for the check against other libraries
    per_image: File | None = None  # CSV of the values of each image
