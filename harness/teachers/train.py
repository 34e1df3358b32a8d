"""The stage that leaves a teacher's folder: trained in the workflow, or from elsewhere."""

from __future__ import annotations

from torch import Tensor

from harness.augment import LABELS, edm_augment
from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher, TrainedTeacher, micro_batch
from harness.context import Context, Sources
from harness.data import datasets
from harness.data.datasets import Dataset, placed
from harness.errors import UserError
from harness.fake_score import denoising_loss, left_out
from harness.io.artifacts import digest, link, write_json
from harness.io.locks import run_lock
from harness.method import OptimizerConfig, Phase
from harness.networks import FILES, NULL, build_denoiser, save_denoiser
from harness.schedules import edm_weight, lognormal_sigma
from harness.streams import seeded
from harness.teachers.importing import import_teacher, text_record
from harness.teachers.text_embeddings import Embeddings, embed_prompts
from harness.training.distributed import processes
from harness.training.trainer import TrainingRun, train, training_record


def teacher_phase(section: TrainedTeacher) -> Phase:
    """EDM's training (Karras et al. 2022): denoise real images at lognormal noise levels. Labels or
    captions are left out now and then, so that the network knows both scores of a guided one."""

    def loss(context: Context) -> Tensor:
        clean, condition = context.real()
        teacher = context.networks["teacher"]
        if section.label_dropout and condition is not None:
            condition = left_out(context, teacher, condition, section.label_dropout)
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


def make_teacher(experiment: Experiment, name: str) -> dict:
    """Leave `teachers/<name>/` with its `teacher.json`; returns what that says."""
    if isinstance(experiment.teachers[name], ImportedTeacher):
        return import_teacher(experiment, name)
    return train_teacher(experiment, name)


def embed_captions(experiment: Experiment, name: str, dataset: Dataset) -> Embeddings:
    """What a teacher's text encoder, a CLIP of the experiment, makes of the data set's captions."""
    from harness.features.base import load_extractor

    section = experiment.teachers[name]
    folder = experiment.features_dir(section.text_encoder)
    encoder = load_extractor(folder, dataset).text_encoder()
    folder = experiment.teacher_dir(name) / "text"
    return Embeddings(embed_prompts(encoder, dataset.prompts, folder))


def train_teacher(experiment: Experiment, name: str) -> dict:
    """Train teacher `name` and write `teachers/<name>/`; returns what `teacher.json` says."""
    section, folder = experiment.teachers[name], experiment.teacher_dir(name)
    dataset = datasets.load(experiment.data_dir())
    text = embed_captions(experiment, name, dataset) if section.text_encoder else None
    inputs = [dataset.sha256, text.record["sha256"]] if text else [dataset.sha256]
    key = digest([experiment.teacher_spec(name), *inputs])
    device = experiment.device

    def make() -> TrainingRun:
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
                f"teachers.{name}.augment: the network takes {network.augment_labels} augmentation "
                f"labels, not {LABELS}; a SongUNet with augment_dim: {LABELS} does"
            )
        return TrainingRun(
            name=f"teacher {name}",
            folder=folder / "runs" / key,
            key=key,
            seed=section.seed,
            networks={"teacher": network},
            frozen={},
            main="teacher",
            phases=[teacher_phase(section)],
            sources=Sources(
                dataset.image_shape,
                dataset.num_conditions,
                sigma_init=0.0,
                embeddings=text,
                **placed(dataset.train, "cpu" if text else device),
            ),
            batch=section.batch,
            budget=[{"unit": "images", "amount": section.images}],
            export=lambda ema, to: {"sha256": save_denoiser(ema, to)},
            ema_half_life=section.ema_half_life,
            ema_ramp_up=section.ema_ramp_up,
            device=device,
            micro_batch=micro_batch(section.batch, section.micro_batch),
            precision=section.precision,
            channels_last=section.channels_last,
            compile=section.compile,
            gradient_checkpointing=section.gradient_checkpointing,
            checkpoint_seconds=experiment.training.checkpoint_seconds,
            max_nonfinite=experiment.training.max_nonfinite,
            tick_images=max(section.images // 50, 1),
        )

    group = processes()
    with group.leading(run_lock(folder)):
        outcome = train(make)
        if not group.first:
            return {}
        final = folder / "runs" / key / "snapshots" / outcome.snapshots[-1]["name"]
        for file in (*FILES, *[NULL] * (text is not None)):
            link(folder / file, final / file)
        link(folder / "train.csv", folder / "runs" / key / "train.csv")
        record = {"teacher": name, "device": device, "spec": digest(experiment.teacher_spec(name))}
        record |= training_record(outcome, key)
        if text:
            record["text"] = text_record(text, folder)
        record["parameters"] = sum(p.numel() for p in make().networks["teacher"].parameters())
        write_json(folder / "teacher.json", record)
    return record
