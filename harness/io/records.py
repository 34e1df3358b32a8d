"""Typed records: the JSON files that stages leave.

A stage writes its record last, so its presence means that the stage is complete.
"""

from __future__ import annotations

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
        path = Path(path)
        value = read_json(path, owner=path)
        found = value.pop("format", None) if isinstance(value, dict) else None
        if found is not None and found != cls.FORMAT:
            raise UserError(
                f"{path} has format {found}; this version reads format {cls.FORMAT}; run the "
                "workflow again",
                "format",
            )
        try:
            if found is None:
                raise ValueError("no format")
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise damaged(path, reason, owner=path) from None
        except ValueError as error:
            raise damaged(path, str(error), owner=path) from None

    @classmethod
    def read_optional(cls, path: Path) -> Self | None:
        """The same; None if the file does not exist."""
        return cls.read(path) if Path(path).exists() else None

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        write_json(path, {"format": self.FORMAT, **self.model_dump(exclude_none=True)})


class Costs(_Part):
    """The totals of a `Ledger`. flops: floating-point operations. peak_memory: bytes. generated:
    images that the student generated. passes: network -> images [forward, backward]. charges: costs
    before training, included in the totals. costs: each phase variant."""

    images: int
    flops: int
    seconds: float
    peak_memory: int
    generated: int = 0
    passes: dict[str, list[int]] = {}
    charges: dict[str, dict[str, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}


class Snapshot(_Part):
    """Averaged weights at one point of training. grid: the units whose grid the point lies on.
    before: what was spent one step earlier."""

    name: str
    sha256: str
    grid: list[str]
    step: int
    before: dict[str, float]
    ledger: Costs
    ema_half_life: float | None = None


class Stop(_Part):
    """The budget that ended a training run."""

    unit: str
    amount: float


class TrainingFacts(Record):
    """What the records of trained networks share; None in those of imported ones. run_id: name of
    the folder below `runs/`. skipped_steps: phase -> steps with a gradient that is not finite."""

    harness: str | None = None
    torch: str | None = None
    run_id: str | None = None
    sha256: str | None = None
    stop: Stop | None = None
    skipped_steps: dict[str, int] | None = None
    ledger: Costs | None = None


class StudentRecord(TrainingFacts):
    """`student.json`. trained_against: feature networks in the losses, whose metrics are flagged.
    pretraining: data sets that pretrained networks in the losses were trained on. inputs: sha256 of
    each input. contended: whether other work ran during a run with a budget in seconds."""

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
    teacher: str
    trained_against: list[str]
    pretraining: list[str]
    device: str
    processes: int
    nfe: int
    parameters: int
    frozen_fraction: float
    inputs: dict[str, Any]
    snapshots: list[Snapshot]
    contended: bool


class File(_Part):
    """A file or folder next to the record."""

    file: str
    sha256: str


class TeacherRecord(TrainingFacts):
    """`teacher.json`. imported: source and sha256 of an imported teacher. text, evaluation_text:
    embeddings of the prompts. codec: the decoder."""

    teacher: str
    sha256: str
    fingerprint: str
    parameters: int
    device: str | None = None
    imported: dict[str, str] | None = None
    text: File | None = None
    evaluation_text: File | None = None
    codec: dict[str, str] | None = None


class PairRecord(Record):
    """`pairs.json`. pairs: their number. evaluations: of the teacher's network. contended: whether
    other work ran meanwhile. sha256: of all shards in the folder `run_id`."""

    name: str
    fingerprint: str
    run_id: str
    pairs: int
    sampler: dict[str, Any]
    evaluations: int
    flops: int
    seconds: float
    contended: bool
    sha256: str


class FeatureRecord(TrainingFacts):
    """`features.json`. settings: of the network's class, with its `type`. file: of a fetched
    network. unavailable: why it has no weights, in two words; reason: the error; missing: the same
    for heads. aesthetic: the trained aesthetic head."""

    name: str
    settings: dict[str, Any]
    file: str | None = None
    unavailable: str | None = None
    reason: str | None = None
    missing: dict[str, str] = {}
    held_out_accuracy: float | None = None
    aesthetic: dict[str, Any] | None = None


class PromptFile(_Part):
    """A copy of a prompt file. prompts: its number of lines."""

    prompts: int
    sha256: str


class DataRecord(Record):
    """`data.json`. registered: whether `name` is a registered data set. sha256: of images and
    prompts; images_sha256: of the images, or of their shape and classes if there are none."""

    name: str
    registered: bool
    class_names: list[str]
    train_images: int
    held_out_images: int
    image_shape: list[int]
    images_sha256: str
    sha256: str
    prompts: PromptFile | None = None
    evaluation_prompts: PromptFile | None = None


class ScoreRow(_Part):
    """One number. sample_seed: None for real images. leave_out: values without each tenth of the
    samples. protocol: key of `ScoreRecord.protocols`. status: why there is no value."""

    sample_seed: int | None = None
    metric: str
    extractor: str
    num_samples: int
    value: float | None = None
    stderr: float | None = None
    leave_out: list[float] = []
    protocol: str
    flag: str = ""
    status: str | None = None


class ScoreEntry(_Part):
    """The rows of one snapshot, or of a reference, named by `student` ("teacher", "teacher-1step",
    "floor"). ema: half-life in images."""

    student: str | None = None
    snapshot: str
    final: bool
    grid: list[str]
    sha256: str | None = None
    nfe: int | None = None
    ema: float | None = None
    images: int | None = None
    flops: int | None = None
    seconds: float | None = None
    rows: list[ScoreRow]


class Samples(File):
    """The images for figures. neighbour_extractor, neighbour_rows: features and number of training
    images among which the nearest were searched. neighbour_unit: of the distances."""

    neighbour_extractor: str | None = None
    neighbour_rows: int | None = None
    neighbour_unit: str | None = None


class ScoreRecord(Record):
    """The scores of a run (student, method, seed) or of a teacher and the floor. weights: sha256 of
    the network. dimensions: extractor -> number of features. kept: samples for the check against
    other libraries. per_image: a CSV file with the values of each image."""

    FORMAT = SCORES_FORMAT

    student: str | None = None
    teacher: str | None = None
    method: str | None = None
    seed: int | None = None
    weights: str
    fingerprint: str
    contended: bool = False
    entries: list[ScoreEntry]
    samples: Samples | None = None
    protocols: dict[str, dict[str, Any]]
    dimensions: dict[str, int]
    kept: File | None = None
    per_image: File | None = None
