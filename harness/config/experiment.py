"""An experiment: validated, resolved and frozen; it makes the records that jobs take."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS_FORMAT, SCORES_FORMAT
from harness.config import jobs, schema
from harness.errors import UserError
from harness.io.artifacts import digest, write_json
from harness.io.downloads import is_address
from harness.method import method_source


class Paths:
    """Folders and files of one experiment; `root` is results/<experiment>."""

    def __init__(self, root: Path):
        self.root = root
        self.data, self.logs = root / "data", root / "logs"
        self.tables, self.figures = root / "tables", root / "figures"

    def features(self, name: str) -> Path:
        return self.root / "features" / name

    def teacher(self, name: str) -> Path:
        return self.root / "teachers" / name

    def pairs(self, name: str) -> Path:
        return self.root / "pairs" / name

    def run(self, student: str, seed: int) -> Path:
        return self.root / "students" / student / f"seed{seed}"

    def scores(self, student: str, seed: int) -> Path:
        """The score file of a run."""
        return self.root / "scores" / student / f"seed{seed}.json"

    def reference_scores(self, teacher: str) -> Path:
        """The score file of a teacher and of the floor."""
        return self.root / "scores" / "teachers" / f"{teacher}.json"


@dataclass(frozen=True, eq=False)
class Experiment:
    """One experiment file, resolved. raw: after `extends` and overrides. plugin_hashes:
    {"plugin": sha256} of the plug-in behind "data", "features.<name>" or "teachers.<name>"."""

    name: str
    data: schema.DataSection
    features: Mapping[str, schema.FeatureSettings]
    teachers: Mapping[str, schema.TeacherSection]
    students: Mapping[str, jobs.Student]
    training: schema.TrainingSection
    evaluation: schema.EvaluationSection
    paper: schema.PaperSection | None
    claims: list[schema.ClaimSection]
    device_setting: str
    process_setting: int | str
    raw: dict
    paths: Paths
    plugin_hashes: Mapping[str, dict[str, str]]

    # -- students and teachers ------------------------------------------------------------------

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Students and training seeds; released weights have one run, under the first seed."""
        seeds = self.training.seeds
        return [
            (name, seed)
            for name, student in self.students.items()
            for seed in (seeds[:1] if student.source else seeds)
        ]

    @property
    def released(self) -> list[str]:
        """The students that are released weights: imported, not trained here."""
        return [name for name, student in self.students.items() if student.source]

    @cached_property
    def pair_sets(self) -> dict[str, jobs.PairSet]:
        """Every set of teacher pairs that a student requires, by name."""
        return {s.pairs.name: s.pairs for s in self.students.values() if s.pairs}

    @property
    def exclusive(self) -> bool:
        """Whether a budget is in seconds, so that runs need the machine to themselves."""
        return any(limit.unit == "seconds" for s in self.students.values() for limit in s.budget)

    def teacher_row(self, teacher: str, row: str = "teacher") -> str:
        """Name of a teacher's `row` ("teacher", "teacher-1step") in the tables."""
        return row if len(self.teachers) == 1 else f"{row}/{teacher}"

    @property
    def reference_rows(self) -> dict[str, str | None]:
        """Rows that students are compared with, in order -> their teacher (None for the floor)."""
        rows = product(self.teachers, ("teacher", "teacher-1step"))
        return {self.teacher_row(*row): row[0] for row in rows} | {"floor": None}

    def student_training(self, name: str) -> schema.TrainingSection:
        """The section `training` with a student's own switches."""
        return self.training.model_copy(update=dict(self.students[name].switches))

    def text_encoder_of(self, teacher: str) -> str | None:
        """The feature network that encodes captions for a teacher trained here."""
        return getattr(self.teachers[teacher], "text_encoder", None)

    # -- the machine ----------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The device of jobs; "auto" is resolved for this machine."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return auto if self.device_setting == "auto" else self.device_setting

    def check_device(self) -> None:
        """Raise a `UserError` if this machine does not have the device, or if the device lacks a
        precision. Jobs of a cluster are submitted and reported from machines without it."""
        if not self.device.startswith("cuda"):
            return
        if not torch.cuda.is_available():
            raise UserError(f"device: {self.device} is not available; use cpu", "device")
        count, index = torch.cuda.device_count(), int(self.device.partition(":")[2] or 0)
        if index >= count:
            found = f"{count} GPU{'s' * (count != 1)}, from cuda:0"
            message = f"{self.device} is not available; this machine has {found}"
            raise UserError(f"device: {message}", "device")
        if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
            for key in self._bf16_keys():
                message = f"{torch.cuda.get_device_name(index)} does not compute in bf16; use fp32"
                raise UserError(f"{key}: {message}", "precision")

    def _bf16_keys(self) -> list[str]:
        """The keys that set the precision bf16."""
        sections = {"training": self.training, "evaluation": self.evaluation}
        sections |= {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        found = [
            k for k, section in sections.items() if getattr(section, "precision", "") == "bf16"
        ]
        found += [
            f"students.{n}"
            for n, s in self.students.items()
            if ("precision", "bf16") in s.switches.items()
        ]
        return [f"{key}.precision" for key in found]

    def processes(self, parts: int | None = None) -> int:
        """Number of processes that share a job: a divisor of the parts of its batch, at most the
        setting."""
        count, device = self.process_setting, self.device
        if device == "cuda":
            gpus = torch.cuda.device_count()
            if count != "auto" and count > gpus:
                message = f"{count} processes need a GPU each; this machine has {gpus}"
                raise UserError(f"processes: {message}", "processes")
            count = gpus if count == "auto" else count
        elif count == "auto" or device != "cpu":
            count = 1
        return count if parts is None else schema.micro_batch(parts, count)

    # -- fingerprints ---------------------------------------------------------------------------
    # What the results of each stage depend on, as JSON-like values. The workflow passes them to
    # jobs as parameters, so that a change reruns what depends on it and nothing else.

    @cached_property
    def data_fingerprint(self) -> dict:
        """See `DataSection.fingerprint`."""
        values = self.data.fingerprint()
        return {"format": RESULTS_FORMAT, **values, **self.plugin_hashes.get("data", {})}

    @property
    def prepared_data(self) -> str:
        """Digest of the settings and the files that the prepared data set is made from."""
        settings = self.data_fingerprint | {"num_classes": self.data.num_classes}
        return digest([settings, self.data.source, self.data.prompt_files])

    def features_fingerprint(self, name: str) -> dict:
        fingerprint = {"data": self.data_fingerprint, "features": self.features[name].model_dump()}
        return fingerprint | self.plugin_hashes.get(f"features.{name}", {})

    def teacher_fingerprint(self, name: str) -> dict:
        """The sampler is not included: it decides a teacher's scores, not its weights."""
        encoder = self.text_encoder_of(name)
        return {
            "data": self.data_fingerprint,
            "teacher": self.teachers[name].fingerprint(),
            "text_encoder": self.features_fingerprint(encoder) if encoder else None,
            **self.plugin_hashes.get(f"teachers.{name}", {}),
        }

    def pairs_fingerprint(self, name: str) -> dict:
        pair_set, evaluation = self.pair_sets[name], self.evaluation.fingerprint()
        return {
            "teacher": self.teacher_fingerprint(pair_set.teacher),
            "pairs": pair_set.count,
            "sampler": pair_set.sampler.model_dump(),
            **{k: v for k, v in evaluation.items() if k in ("block", "tf32", "precision")},
        }

    def run_fingerprint(self, name: str, seed: int) -> dict:
        """Everything that decides a run's weights except its stopping rule and the method's file,
        which enters a run's id by its hash."""
        student = self.students[name]
        if student.source:
            facts = {"method": student.method, "settings": student.settings.model_dump()}
            facts |= {"freeze": student.freeze, "source": student.source, "sha256": student.sha256}
            return {"student": name, "released": facts, "data": self.data_fingerprint}
        features = student.requirements.features
        return {
            "student": name,
            "method": student.method,
            "settings": student.settings.model_dump(),
            "freeze": student.freeze,
            "lora": student.lora.model_dump() if student.lora else None,
            "seed": seed,
            "teacher": self.teacher_fingerprint(student.teacher),
            "pairs": self.pairs_fingerprint(student.pairs.name) if student.pairs else None,
            "features": self.features_fingerprint(features) if features else None,
            "snapshots": {unit: grid.model_dump() for unit, grid in student.snapshots.items()},
            **self.student_training(name).model_dump(include={*schema.Switches.model_fields}),
        }

    def report_fingerprint(self) -> list:
        """What decides the tables besides the scores."""
        sections = [section.model_dump() for section in (self.paper, *self.claims) if section]
        return [list(self.students), self.evaluation.main_metric, *sections]

    # -- jobs -----------------------------------------------------------------------------------

    def _job(self, job_class: type, kind: str, *key, **facts) -> Any:
        """A job for the folder and the fingerprint that `Paths` and this class name by `kind`."""
        shared = {
            "name": "/seed".join(map(str, key)),
            "folder": getattr(self.paths, kind)(*key),
            "data": self.paths.data,
            "training": self.training,
            "device": self.device,
            "exclusive": self.exclusive,
            "fingerprint": getattr(self, f"{kind}_fingerprint")(*key),
        }
        return job_class(**shared | facts)

    def student_run(self, name: str, seed: int) -> jobs.StudentRun:
        student, paths = self.students[name], self.paths
        features = student.requirements.features
        return self._job(
            jobs.StudentRun,
            "run",
            name,
            seed,
            experiment=self.name,
            student=student,
            training=self.student_training(name),
            seed=seed,
            teacher=paths.teacher(student.teacher) if student.teacher else None,
            features=paths.features(features) if features else None,
            pairs=paths.pairs(student.pairs.name) if student.pairs else None,
            budget=[limit.model_dump() for limit in student.budget],
            method_source=method_source(student.method),
        )

    def teacher_job(self, name: str) -> jobs.TeacherJob:
        encoder = self.text_encoder_of(name)
        folder = self.paths.features(encoder) if encoder else None
        facts = {"section": self.teachers[name], "data_section": self.data, "text_encoder": folder}
        return self._job(jobs.TeacherJob, "teacher", name, **facts)

    def feature_job(self, name: str) -> jobs.FeatureJob:
        return self._job(jobs.FeatureJob, "features", name, settings=self.features[name])

    def pair_job(self, name: str) -> jobs.PairJob:
        pairs = self.pair_sets[name]
        facts = self.evaluation.model_dump(include={"block", "tf32", "precision"})
        facts["teacher"] = self.paths.teacher(pairs.teacher)
        return self._job(jobs.PairJob, "pairs", name, pairs=pairs, **facts)

    def scoring(self) -> jobs.Scoring:
        evaluation, names = self.evaluation, self.evaluation.extractors
        return jobs.Scoring(
            experiment=self.name,
            evaluation=evaluation,
            data=self.paths.data,
            data_section=self.data,
            extractors={name: (self.features[name], self.paths.features(name)) for name in names},
            checkpoint_seconds=self.training.checkpoint_seconds,
            device=self.device,
            fingerprint={
                "format": SCORES_FORMAT,
                "data": self.data_fingerprint,
                "evaluation": evaluation.fingerprint(),
                "features": {name: self.features_fingerprint(name) for name in names},
                "prompts": list(self.data.prompt_files.values())[-1:],
            },
        )

    # -- files ----------------------------------------------------------------------------------

    def data_files(self) -> list[Path]:
        """Local files that the data set is made from; of a folder, see `watched`."""
        sources = local_files(None if self.data.revision else self.data.source)
        prompts = [
            file for source, _ in self.data.prompt_files.values() for file in local_files(source)
        ]
        return [file for source in sources for file in watched(source)] + prompts

    def teacher_files(self, name: str) -> list[Path]:
        """Local files that an imported teacher is made from: those whose content is hashed."""
        source, files = getattr(self.teachers[name], "path", None), []
        if source is not None:
            files = [source, source / "diffusion_pytorch_model.safetensors"]
            patterns = []
            if (source / "model_index.json").is_file():
                files, patterns = [], ["*/*.*", "*.safetensors"]
            if not (source / "denoiser.json").is_file():  # all files of a pipeline in one folder
                patterns.append("*config.json")
            files += sorted(path for pattern in patterns for path in source.glob(pattern))
        return list(filter(Path.is_file, files))

    def class_table_files(self, name: str) -> list[Path]:
        """The local file of the class table that a student's method requires, if there is one. Its
        content is hashed, so that another one retrains the student."""
        return local_files(self.students[name].requirements.class_table)

    def released_files(self, name: str) -> list[Path]:
        """Local files of a student's released weights: those whose content is hashed."""
        sources = local_files(self.students[name].source)
        files = [path / "diffusion_pytorch_model.safetensors" for path in sources]
        return list(filter(Path.is_file, [*sources, *files]))

    def write_snapshot(self) -> Path:
        """Write the resolved configuration under its digest for the jobs of a workflow, so that
        an edit of the file during a run cannot mislabel results."""
        path = self.paths.root / "config" / f"{digest(self.raw)}.json"
        if not path.exists():
            write_json(path, self.raw)
        return path


def local_files(source: str | None) -> list[Path]:
    """The path of a source that is a local file or folder; none for an address."""
    return [] if source is None or is_address(source) else [Path(source).expanduser()]


def watched(path: Path, depth: int = 0) -> list[Path]:
    """What changes when a file is added to a data set's folder: its list of labels or, without one,
    the folder and those in it. Folders without images of their own, such as `train`, are followed,
    but not large folders of images, which would take long to list. Other paths stay as they are."""
    lists = ("dataset.json", "labels", "metadata.csv", "metadata.jsonl")
    if found := list(filter(Path.is_file, (path / name for name in lists))):
        return found[:1]
    images, inner = (".png", ".jpg", ".jpeg", ".webp"), []
    with suppress(OSError):  # a folder that cannot be read is reported by the data stage
        has_images = any(entry.name.lower().endswith(images) for entry in os.scandir(path))
        if not depth or (depth < 4 and not has_images):
            inner = sorted(folder for folder in path.glob("*/") if folder.name[0] != ".")
    return [path, *(file for folder in inner for file in watched(folder, depth + 1))]
