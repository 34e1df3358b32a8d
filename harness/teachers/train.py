"""The stage that makes a teacher, and the training of one."""

from __future__ import annotations

from torch import Tensor

from harness.augment import LABELS, edm_augment
from harness.config.jobs import TeacherJob
from harness.config.schema import ImportedTeacher, TrainedTeacher
from harness.context import Context, TrainingData
from harness.data import datasets
from harness.data.datasets import Dataset, placed
from harness.errors import UserError
from harness.fake_score import denoising_loss, drop_condition
from harness.io.artifacts import digest, link, write_json
from harness.io.locks import run_lock
from harness.method import OptimizerConfig, Phase
from harness.networks import FILES, NULL, build_denoiser, save_denoiser
from harness.schedules import edm_weight, lognormal_sigma
from harness.streams import seeded
from harness.teachers.importing import import_teacher, text_record
from harness.teachers.text_embeddings import Embeddings, embed_prompts
from harness.training.distributed import processes
from harness.training.loop import train
from harness.training.run import TrainingRun, loop_settings


def make_teacher(job: TeacherJob) -> dict:
    """Train or import a teacher, write its folder with `teacher.json`, and return the record."""
    imported = isinstance(job.section, ImportedTeacher)
    return import_teacher(job) if imported else train_teacher(job)


def teacher_phase(section: TrainedTeacher) -> Phase:
    """EDM's training (Karras et al. 2022): denoise real images at lognormal noise levels.

    With `label_dropout` the network also learns the unconditional score, for guidance.
    """

    def loss(context: Context) -> Tensor:
        clean, condition = context.real()
        teacher = context.networks["teacher"]
        if section.label_dropout and condition is not None:
            condition = drop_condition(context, teacher, condition, section.label_dropout)
        extras = {}
        if section.augment:
            clean, extras["augment_labels"] = edm_augment(context, clean, section.augment)
        sigma = lognormal_sigma(context.normal("sigma"), section.p_mean, section.p_std)
        noised = context.noised(clean, sigma)
        weight = edm_weight(sigma, section.sigma_data)
        return denoising_loss(teacher, clean, noised, sigma, condition, weight, **extras)

    optimizer = OptimizerConfig(
        lr=section.lr,
        betas=section.betas,
        warmup_steps=section.warmup_steps,
        decay_steps=-(-section.images // section.batch) if section.lr_schedule == "cosine" else 0,
    )
    return Phase("denoise", "teacher", loss, optimizer)


def assemble(
    job: TeacherJob, dataset: Dataset, text: Embeddings | None, run_id: str
) -> TrainingRun:
    """Build a teacher's training. `text`: embeddings of the captions, if it reads them."""
    section = job.section
    with seeded(section.seed):
        network = build_denoiser(
            section.network,
            dataset.image_shape,
            dataset.num_classes,
            section.sigma_data,
            null=text.null if text else None,
        )
    if section.augment and network.augment_labels != LABELS:
        raise UserError(
            f"teachers.{job.name}.augment: the network takes {network.augment_labels} augmentation "
            f"labels, not {LABELS}; a SongUNet with augment_dim: {LABELS} does",
            "augment-labels",
        )
    return TrainingRun(
        name=f"teacher {job.name}",
        folder=job.folder / "runs" / run_id,
        run_id=run_id,
        seed=section.seed,
        networks={"teacher": network},
        frozen={},
        main="teacher",
        phases=[teacher_phase(section)],
        data=TrainingData(
            dataset.image_shape,
            dataset.num_conditions,
            sigma_init=0.0,
            embeddings=text,
            **placed(dataset.train, "cpu" if text else job.device),
        ),
        batch=section.batch,
        budget=[{"unit": "images", "amount": section.images}],
        export=lambda ema, to: {"sha256": save_denoiser(ema, to)},
        ema_half_life=section.ema_half_life,
        ema_ramp_up=section.ema_ramp_up,
        loop=loop_settings(
            job.training, job.device, section.batch, section, max(section.images // 50, 1)
        ),
    )


def embed_captions(job: TeacherJob, dataset: Dataset) -> Embeddings:
    """Embed the data set's captions with the experiment's CLIP."""
    from harness.features.base import load_extractor

    encoder = load_extractor(job.text_encoder, dataset).text_encoder()
    return Embeddings(embed_prompts(encoder, dataset.prompts, job.folder / "text"))


def train_teacher(job: TeacherJob) -> dict:
    """Train a teacher, write its folder, and return the content of `teacher.json`."""
    dataset = datasets.load(job.data)
    text = embed_captions(job, dataset) if job.text_encoder else None
    inputs = [dataset.sha256, text.record["sha256"]] if text else [dataset.sha256]
    run_id = digest([job.fingerprint, *inputs])
    run = job.folder / "runs" / run_id
    group = processes()
    with group.leading(run_lock(job.folder)):
        outcome = train(lambda: assemble(job, dataset, text, run_id))
        if not group.first:
            return {}
        final = run / "snapshots" / outcome.snapshots[-1]["name"]
        for file in (*FILES, *[NULL] * (text is not None)):
            link(job.folder / file, final / file)
        link(job.folder / "train.csv", run / "train.csv")
        network = assemble(job, dataset, text, run_id).networks["teacher"]
        record = {
            "teacher": job.name,
            "device": job.device,
            "fingerprint": digest(job.fingerprint),
            **outcome.record(run_id),
            **({"text": text_record(text, job.folder)} if text else {}),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        write_json(job.folder / "teacher.json", record)
    return record
