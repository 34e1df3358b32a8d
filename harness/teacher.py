"""Teachers: training in the workflow, and the stage that leaves a teacher's folder."""

from __future__ import annotations

import torch
from torch import Tensor

from harness import data as datasets
from harness.artifacts import digest, run_lock, write_json
from harness.config import Experiment, TeacherSection
from harness.fake_score import denoising_loss
from harness.method import Context, OptimizerConfig, Phase, Sources
from harness.networks import WEIGHTS, build_denoiser, save_denoiser
from harness.runs import link, seeded, training_record
from harness.schedules import lognormal_sigma
from harness.trainer import TrainingRun, train


def teacher_phase(section: TeacherSection, null_label: int) -> Phase:
    """EDM's training (Karras et al. 2022): denoise real images at lognormal noise levels."""

    def loss(context: Context) -> Tensor:
        clean, labels = context.real()
        if section.label_dropout and labels is not None:
            drop = context.uniform("label_dropout") < section.label_dropout
            labels = torch.where(drop, null_label, labels)
        sigma = lognormal_sigma(context.normal("sigma"), section.p_mean, section.p_std)
        teacher = context.networks["teacher"]
        noised = context.noised(clean, sigma)
        return denoising_loss(teacher, clean, noised, sigma, labels, section.sigma_data)

    optimizer = OptimizerConfig(
        lr=section.lr,
        warmup_steps=section.warmup_steps,
        decay_steps=-(-section.images // section.batch) if section.lr_schedule == "cosine" else 0,
    )
    return Phase("denoise", "teacher", loss, optimizer)


def train_teacher(experiment: Experiment, name: str) -> dict:
    """Train teacher `name` and write `teachers/<name>/`; returns what `teacher.json` says."""
    section, folder = experiment.teachers[name], experiment.teacher_dir(name)
    dataset = datasets.load(experiment.data_dir())
    key = digest([experiment.teacher_spec(name), dataset.sha256])
    device = experiment.device

    def make() -> TrainingRun:
        with seeded(section.seed):
            network = build_denoiser(
                section.network, dataset.image_shape, dataset.num_classes, section.sigma_data
            )
        return TrainingRun(
            name=f"teacher {name}",
            folder=folder / "runs" / key,
            key=key,
            seed=section.seed,
            networks={"teacher": network},
            frozen={},
            main="teacher",
            phases=[teacher_phase(section, dataset.num_classes)],
            sources=Sources(
                dataset.image_shape,
                dataset.num_classes,
                sigma_init=0.0,
                pixels=dataset.train.pixels.to(device),
                labels=dataset.train.labels.to(device),
            ),
            batch=section.batch,
            budget=[{"unit": "images", "amount": section.images}],
            export=lambda ema, to: {"sha256": save_denoiser(ema, to)},
            ema_half_life=section.ema_half_life,
            ema_ramp_up=section.ema_ramp_up,
            device=device,
            checkpoint_seconds=experiment.training.checkpoint_seconds,
            max_nonfinite=experiment.training.max_nonfinite,
            tick_images=max(section.images // 50, 1),
        )

    with run_lock(folder):
        outcome = train(make)
        final = folder / "runs" / key / "snapshots" / outcome.snapshots[-1]["name"]
        for file in ("config.json", "denoiser.json", WEIGHTS):
            link(folder / file, final / file)
        link(folder / "train.csv", folder / "runs" / key / "train.csv")
        record = {"teacher": name, "device": device, "spec": digest(experiment.teacher_spec(name))}
        record |= training_record(outcome, key)
        record["parameters"] = sum(p.numel() for p in make().networks["teacher"].parameters())
        write_json(folder / "teacher.json", record)
    return record
