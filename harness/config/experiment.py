"""Experiments: one YAML file each, validated as a whole before anything runs.

`load_experiment` reads the file, resolves `extends:`, and reports every mistake at once with the
path of its key. `Experiment` answers what each stage depends on (`*_spec`): the workflow passes
these parts as parameters, so that a change reruns what it touches and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.jobs import (
    FeatureJob,
    PairJob,
    PairSet,
    ReferenceScoring,
    RunScoring,
    Scoring,
    Student,
    StudentRun,
    TeacherJob,
)
from harness.config.schema import (
    LATER,
    PROMPTS,
    ExperimentModel,
    ImportedTeacher,
    Limit,
    Sampler,
    micro_batch,
)
from harness.errors import UserError
from harness.io.artifacts import digest, settings_but, write_json
from harness.io.downloads import is_address


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
        from harness.features.lpips import trunk_file
        from harness.features.timm_backbones import weights_file

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
            from harness.data.image_archive import INDEXES

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

    # One record per job: what each stage takes.

    def student(self, name: str) -> Student:
        section, pairs = self.students[name], self.pairs_name(name)
        pair_set = None
        if pairs:
            teacher, count, _ = self.pair_sets[pairs]
            pair_set = PairSet(pairs, teacher, count, self.pair_sampler(pairs))
        return Student(
            name,
            section.method,
            self.method_config(name),
            self.requirements(name),
            self.teacher_of(name),
            section.freeze,
            section.lora,
            tuple(self.budget(name)),
            pair_set,
        )

    def student_run(self, name: str, seed: int) -> StudentRun:
        import methods

        student = self.student(name)
        features, pairs = student.requirements.features, student.pairs
        return StudentRun(
            self.name,
            student,
            seed,
            self.run_dir(name, seed),
            self.data_dir(),
            self.teacher_dir(student.teacher),
            self.features_dir(features) if features else None,
            self.pairs_dir(pairs.name) if pairs else None,
            self.training,
            self.device,
            self.seconds_budget,
            self.run_spec(name, seed),
            Path(methods.__path__[0]) / f"{student.method}.py",
        )

    def teacher_job(self, name: str) -> TeacherJob:
        encoder = self.text_encoder_of(name)
        return TeacherJob(
            name,
            self.teachers[name],
            self.teacher_dir(name),
            self.data_dir(),
            self.data,
            self.features_dir(encoder) if encoder else None,
            self.training,
            self.device,
            self.teacher_spec(name),
        )

    def feature_job(self, name: str) -> FeatureJob:
        return FeatureJob(
            name,
            self.features[name],
            self.features_dir(name),
            self.data_dir(),
            self.training,
            self.device,
            self.features_spec(name),
        )

    def pair_job(self, name: str) -> PairJob:
        teacher, count, _ = self.pair_sets[name]
        return PairJob(
            PairSet(name, teacher, count, self.pair_sampler(name)),
            self.pairs_dir(name),
            self.teacher_dir(teacher),
            self.data_dir(),
            self.evaluation.block,
            self.device,
            self.seconds_budget,
            self.pairs_spec(name),
        )

    def scoring(self) -> Scoring:
        names = self.evaluation.extractors
        return Scoring(
            self.name,
            self.evaluation,
            self.data_dir(),
            self.data,
            {name: (self.features[name], self.features_dir(name)) for name in names},
            self.statistics_extractor,
            self.training.checkpoint_seconds,
            self.device,
            self.score_spec(),
        )

    def run_scoring(self, student: str, seed: int) -> RunScoring:
        return RunScoring(
            self.scoring(),
            student,
            seed,
            self.run_dir(student, seed),
            self.teacher_dir(self.teacher_of(student)),
            self.score_path(student, seed),
        )

    def reference_scoring(self, teacher: str) -> ReferenceScoring:
        return ReferenceScoring(
            self.scoring(),
            teacher,
            self.teachers[teacher],
            self.teacher_dir(teacher),
            self.reference_score_path(teacher),
            self.reference_score_spec(teacher),
        )

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


# -- checking -----------------------------------------------------------------------------------
