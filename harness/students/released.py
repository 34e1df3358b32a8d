"""Students that are released weights: the authors' one-step networks, scored like a student's.

They show whether sampling, preconditioning and FID here are those of a paper, before anything is
trained. Everything that a user sees says that they were not trained here: their names end in
`-released`, their scores have the flag `released`, and tables name the file.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from harness.config.jobs import Student, StudentRun
from harness.config.loading import translate
from harness.config.schema import DataSection, ReleasedStudent
from harness.data.registry import has_texts
from harness.denoiser import Denoiser
from harness.errors import Problem, UserError
from harness.io.downloads import source_problems
from harness.io.records import StudentRecord
from harness.method import METHODS, MethodConfig, Requirements

SUFFIX = "-released"
SNAPSHOT = "released"


def resolve(name: str, section: ReleasedStudent) -> Student:
    """A student that needs only its file. Its settings are the method's defaults, those of
    the paper, with its own changes; shared ones of `training.settings` are for training."""
    return Student(
        name=name,
        method=section.method,
        settings=METHODS[section.method].Config(**section.settings),
        requirements=Requirements(),
        teacher=None,
        freeze=section.freeze,
        lora=None,
        budget=(),
        snapshots={},
        pairs=None,
        source=section.source,
        sha256=section.sha256,
    )


def check(
    name: str, section: ReleasedStudent, data: DataSection | None, files: bool
) -> Iterator[Problem]:
    """Errors in a student with a `source` (see `harness.students.checks`)."""
    where = f"students.{name}"
    if not name.endswith(SUFFIX):
        message = f"the name of released weights must end in {SUFFIX}: they are not trained here"
        yield Problem(where, "released-name", message)
    keys = {"sha256_key": f"{where}.sha256", "required": files, "folder": True}
    yield from source_problems(f"{where}.source", section.source, section.sha256, **keys)
    if data is not None and has_texts(data):
        message = "released weights of text-to-image models cannot be imported"
        yield Problem(where, "reads-no-text", message)
    try:
        METHODS[section.method].Config(**section.settings)
    except UserError as error:
        yield Problem(f"{where}.method", error.code, str(error))
    except ValidationError as error:
        yield from translate(error, METHODS[section.method].Config, f"{where}.settings")


def import_student(run: StudentRun) -> StudentRecord:
    """Import a student's released weights as its only snapshot, and write `student.json`."""
    from harness.data import datasets
    from harness.io.artifacts import atomic_folder, digest, link, write_json
    from harness.io.locks import run_lock
    from harness.networks import save_denoiser
    from harness.students.run import describe
    from harness.teachers.stage import check_shapes, read_denoiser

    student = run.student
    denoiser, sha256 = read_denoiser(student.source, student.sha256)
    check_shapes(f"student {student.name}", denoiser, datasets.load(run.data, images=False))
    check_settings(student, denoiser)
    source = {"source": student.source, "sha256": sha256}
    run_id = digest([run.fingerprint, source])
    extra = {"sigma_init": student.settings.sigma_init, "imported": source}
    with run_lock(run.folder):
        folder = run.folder / "runs" / run_id
        with atomic_folder(folder / "snapshots" / SNAPSHOT) as temporary:
            weights = save_denoiser(denoiser, temporary, extra)
            snapshot = {"name": SNAPSHOT, "sha256": weights, "grid": [], "step": 0, "before": {}}
            write_json(temporary / "snapshot.json", snapshot)
        link(run.folder / "snapshots", folder / "snapshots")
        link(run.folder / "model", folder / "snapshots" / SNAPSHOT)
        # What its authors trained it against still decides which scores are flagged.
        needs = METHODS[student.method].requirements(student.settings)
        facts = describe(replace(run, student=replace(student, requirements=needs)))
        record = StudentRecord(
            fingerprint=digest([run.fingerprint, run.budget]),
            **facts | {"deviations": []},  # of methods here
            released=source,
            run_id=run_id,
            sha256=weights,
            parameters=sum(p.numel() for p in denoiser.parameters()),
            inputs={"source": sha256},
            snapshots=[snapshot],
            contended=False,
        )
        record.write(run.folder / "student.json")
    return record


def check_settings(student: Student, denoiser: Denoiser) -> None:
    """Compare settings that change a student's images with the network: `epsilon` of GDD's
    preconditioning, and `sigma_init` if the folder of a student states it."""
    found = {"epsilon": getattr(denoiser, "epsilon", 0.0)}
    record = Path(student.source).expanduser() / "denoiser.json"
    if record.is_file():
        from harness.networks import denoiser_record

        found["sigma_init"] = denoiser_record(record.parent).get("sigma_init")
    for key, value in found.items():
        expected = expected_value(student.settings, key)
        if value is not None and value != expected:
            message = f"the network has {value:g}, not {expected:g}; is {student.source} the file?"
            raise UserError(f"students.{student.name}.settings.{key}: {message}", "network")


def expected_value(settings: MethodConfig, key: str) -> float:
    """A setting; 0 for one that the method does not have."""
    return getattr(settings, key, 0.0)
