"""The stage that makes a teacher, and the training of one."""

from torch import Tensor

from harness.augment import LABELS
from harness.config.jobs import TeacherJob
from harness.config.schema import ImportedTeacher, TrainedTeacher
from harness.context import Context, TrainingData
from harness.data import datasets
from harness.data.datasets import Dataset, placed
from harness.errors import UserError
from harness.fake_score import augmented_loss
from harness.io.artifacts import digest, link
from harness.io.locks import run_lock
from harness.io.records import TeacherRecord
from harness.method import OptimizerConfig, Phase
from harness.networks import FILES, NULL, build_denoiser, save_denoiser
from harness.schedules import edm_weight, lognormal_sigma
from harness.streams import seeded
from harness.teachers.importing import import_teacher
from harness.teachers.text_embeddings import TextEmbeddings, embed, embed_prompts
from harness.training.distributed import processes
from harness.training.loop import train
from harness.training.run import TrainingRun, loop_settings


def teacher_phase(section: TrainedTeacher) -> Phase:
    """EDM's training (Karras et al. 2022): denoise real images at lognormal noise levels.

    With `label_dropout` the network also learns the unconditional score, for guidance.
    """

    def loss(context: Context) -> Tensor:
        clean, condition = context.real()
        sigma = lognormal_sigma(context.normal("sigma"), section.p_mean, section.p_std)
        weight = edm_weight(sigma, section.sigma_data)
        network, rates = context.networks["teacher"], (section.augment, section.label_dropout)
        return augmented_loss(context, network, clean, condition, sigma, weight, *rates)

    optimizer = OptimizerConfig(
        lr=section.lr,
        betas=section.betas,
        warmup_steps=section.warmup_steps,
        decay_steps=-(-section.images // section.batch) if section.lr_schedule == "cosine" else 0,
    )
    return Phase("denoise", "teacher", loss, optimizer)


def assemble(
    job: TeacherJob,
    dataset: Dataset,
    run_id: str,
    embeddings: TextEmbeddings | None = None,
    null: dict[str, Tensor] | None = None,
) -> TrainingRun:
    """Build a teacher's training. With captions: their embeddings, and the empty prompt's."""
    section = job.section
    with seeded(section.seed):
        shape, classes = dataset.image_shape, dataset.num_classes
        network = build_denoiser(section.network, shape, classes, section.sigma_data, null=null)
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
        main="teacher",
        phases=[teacher_phase(section)],
        data=TrainingData(
            shape,
            dataset.num_conditions,
            sigma_init=0.0,
            embeddings=embeddings,
            **placed(dataset.train, "cpu" if embeddings else job.device),
        ),
        batch=section.batch,
        budget=[{"unit": "images", "amount": section.images}],
        export=save_denoiser,
        ema_half_life=section.ema_half_life,
        ema_ramp_up=section.ema_ramp_up,
        loop=loop_settings(job.training, section, max(section.images // 50, 1)),
        device=job.device,
    )


def make_teacher(job: TeacherJob) -> TeacherRecord | None:
    """Train or import a teacher and write its folder with `teacher.json`; the first process returns
    the record."""
    if isinstance(job.section, ImportedTeacher):
        return import_teacher(job)
    dataset = datasets.load(job.data)
    embeddings = null = None
    if job.text_encoder is not None:
        from harness.features.base import load_extractor

        encoder = load_extractor(job.text_encoder, dataset)
        embeddings = embed_prompts(encoder, dataset.prompts, job.folder / "text")
        null = embed(encoder, ("",))
    run_id = digest([job.fingerprint, dataset.sha256, embeddings and embeddings.sha256])
    group = processes()
    with group.leading(run_lock(job.folder)):
        run = assemble(job, dataset, run_id, embeddings, null)
        outcome = train(run)
        if not group.first:
            return None
        final = run.snapshot(outcome.snapshots[-1]["name"])
        for file in (*FILES, NULL) if embeddings else FILES:
            link(job.folder / file, final / file)
        link(job.folder / "train.csv", run.folder / "train.csv")
        record = TeacherRecord(
            teacher=job.name,
            fingerprint=digest(job.fingerprint),
            parameters=sum(p.numel() for p in run.networks["teacher"].parameters()),
            device=job.device,
            text=embeddings and embeddings.record(job.folder),
            **outcome.record(run_id),
        )
        record.write(job.folder / "teacher.json")
    return record
