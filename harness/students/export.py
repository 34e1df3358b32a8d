"""Export students as diffusers pipelines with a model card: as a `OneStepPipeline`, or, if the
teacher is a text-to-image pipeline, as a pipeline of its class with a one-step scheduler."""

import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, SchedulerMixin

from harness.config.jobs import StudentRun, TeacherJob
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import (
    atomic_folder,
    load_tensors,
    read_json,
    read_text,
    write_json,
    write_text,
)
from harness.io.records import StudentRecord, TeacherRecord
from harness.io.uploads import Destination, check_destination, upload_folder
from harness.networks import BACKBONES, WEIGHTS, denoiser_record, load_denoiser
from harness.networks.vp import VPDenoiser
from harness.students.model_card import model_card
from harness.students.pipeline import OneStepPipeline
from harness.teachers.pipelines import PipelineFolder

LARGE_SIGMA = 200.0  # above it, DDIM's step is more precise for predicted velocities


def one_step_scheduler(student: VPDenoiser, sigma_init: float) -> SchedulerMixin:
    """A stock scheduler whose only step goes from the level of `sigma_init` to the clean image: its
    schedule ends at that level, where a one-step "trailing" schedule begins.

    Euler's scheduler starts at σ n, as the student does. For predicted velocities its step
    subtracts numbers of size σ, which leaves an error of about 1e-7 σ: 5e-4 at 4096, the last
    level of a zero-terminal-SNR schedule. DDIM's step computes the clean image itself, but starts
    at n instead of σ n / sqrt(1 + σ²), a relative difference of 1 / (2 σ²).
    """
    level = student.level(sigma_init)
    time = int(student.time(torch.tensor([level])))
    betas = EulerDiscreteScheduler(**student.schedule).betas[: time + 1].double()
    options = {"prediction_type": student.prediction, "timestep_spacing": "trailing"}
    options["steps_offset"] = 1  # no effect, but Stable Diffusion's pipeline warns of other values
    scheduler_class: type[SchedulerMixin] = EulerDiscreteScheduler
    if student.prediction == "v_prediction" and level > LARGE_SIGMA:
        scheduler_class, options = DDIMScheduler, options | {"clip_sample": False}
        # The last of a zero-terminal-SNR schedule is 1, for which no level is finite.
        betas[-1] = 1 - 1 / (1 + level**2) / (1 - betas[:-1]).prod()
    return scheduler_class(num_train_timesteps=time + 1, trained_betas=betas.tolist(), **options)


def export_student(
    run: StudentRun,
    teacher: TeacherJob,
    scores: Path,
    folder: Path,
    destination: Destination | None = None,
) -> str | None:
    """Write a finished student and its model card to a new or empty folder, all or nothing. scores:
    the run's score file, which need not exist.

    destination: also upload the folder, and return its address. A folder that contains this
    student is then uploaded as it is, so that the command can be repeated.
    """
    folder = folder.expanduser()
    if destination is not None:
        check_destination(destination)
    elif _has_content(folder):
        raise UserError(f"{folder} already exists; choose a new or empty folder", "exists")
    model, record = run.folder / "model", StudentRecord.read(run.folder / "student.json")
    denoiser = load_denoiser(model, record.sha256, owner=run.folder)
    sigma_init = denoiser_record(model)["sigma_init"]
    name = destination.repository if destination else folder.name
    if not _has_content(folder):
        _check_exportable(denoiser, run.student.name)
        card = model_card(run, teacher, record, denoiser, sigma_init, scores, name)
        with atomic_folder(folder) as temporary:
            if denoiser.text_width:
                _write_stock(denoiser, sigma_init, teacher, temporary)
            else:
                settings = denoiser.preconditioning, denoiser.precondition
                pipeline = OneStepPipeline(denoiser.backbone, sigma_init, *settings)
                pipeline.save_pretrained(temporary, safe_serialization=True)
            card.save(temporary / "README.md")
    elif not _contains(folder, denoiser):
        message = f"{folder} already exists, without the weights of {run.student.name}"
        raise UserError(f"{message}, seed {run.seed}; choose a new or empty folder", "exists")
    if destination is None:
        return None
    _name_repository(folder / "README.md", folder.name, destination.repository)
    return upload_folder(folder, destination)


def _has_content(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _check_exportable(denoiser: Denoiser, student: str) -> None:
    if denoiser.text_width and not isinstance(denoiser, VPDenoiser):
        encoder = "needs the experiment's own text encoder, which is not part of a pipeline"
        message = "text-to-image students can be exported if their teacher is a pipeline"
        raise UserError(f"{student} {encoder}; {message}", "not-exportable")
    if BACKBONES[kind := type(denoiser.backbone).__name__].reads_weights:
        message = f"{student} has a plain module, {kind}, which a pipeline cannot contain"
        remedy = "use its folder model/ with harness.networks.load_denoiser"
        raise UserError(f"{message}; {remedy}", "not-exportable")


def _contains(folder: Path, denoiser: Denoiser) -> bool:
    """Whether a folder is an export of this student."""
    pipeline = BACKBONES[type(denoiser.backbone).__name__].pipeline
    path = folder / (pipeline.folder if denoiser.text_width and pipeline else "network") / WEIGHTS
    if not path.is_file():
        return False
    stored, own = load_tensors(path), denoiser.backbone.state_dict()
    return stored.keys() == own.keys() and all(torch.equal(stored[key], own[key]) for key in own)


def _name_repository(card: Path, folder: str, repository: str) -> None:
    """Replace the folder's name by the repository's in the example of an earlier export."""
    text = read_text(card) if card.is_file() else ""
    named = text.replace(f'from_pretrained("{folder}")', f'from_pretrained("{repository}")')
    if named != text:
        write_text(card, named)


def _write_stock(student: VPDenoiser, sigma_init: float, teacher: TeacherJob, folder: Path) -> None:
    """Write a student as a copy of its teacher's pipeline, which must not have changed."""
    source = PipelineFolder(teacher.section.path)
    imported = TeacherRecord.read(teacher.folder / "teacher.json").imported
    if source.sha256() != imported["sha256"]:
        message = f"is not the pipeline that teacher {teacher.name} was imported from"
        raise UserError(f"{source.folder} {message}", "checksum")
    write_pipeline(student, sigma_init, source, folder)


def write_pipeline(
    student: VPDenoiser, sigma_init: float, source: PipelineFolder, folder: Path
) -> None:
    """Copy a pipeline, with a student as its network and a one-step scheduler, and without a safety
    checker."""
    copied = ("text_encoder", "tokenizer", "vae")
    for part in copied:
        shutil.copytree(source.folder / part, folder / part)
    student.backbone.save_pretrained(folder / source.network, safe_serialization=True)
    scheduler = one_step_scheduler(student, sigma_init)
    scheduler.save_pretrained(folder / "scheduler")
    index = read_json(source.folder / "model_index.json")
    parts = (*copied, source.network)
    new = {key: value for key, value in index.items() if key.startswith("_") or key in parts}
    new["scheduler"] = ["diffusers", type(scheduler).__name__]
    if "safety_checker" in index:
        new |= {key: [None, None] for key in ("safety_checker", "feature_extractor")}
        new["requires_safety_checker"] = False
    write_json(folder / "model_index.json", new)
