"""The stage that makes a teacher: it trains one, or imports a denoiser folder, an EDM pickle or a
diffusers pipeline."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import networks
from harness.augment import LABELS
from harness.config.jobs import TeacherJob
from harness.config.schema import ImportedTeacher, TrainedTeacher
from harness.context import Context, TrainingData
from harness.data import datasets
from harness.data.datasets import Dataset, placed
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.fake_score import augmented_loss
from harness.io.artifacts import atomic_folder, digest, link, sha256_file
from harness.io.downloads import fetch
from harness.io.locks import run_lock
from harness.io.records import File, TeacherRecord
from harness.method import OptimizerConfig, Phase
from harness.networks.plain import read_module
from harness.precision import set_precision
from harness.schedules import edm_weight, lognormal_sigma
from harness.streams import seeded
from harness.teachers import sources
from harness.teachers.denoising_check import check_denoiser
from harness.teachers.edm_pickle import read_edm_pickle
from harness.teachers.pipelines import PipelineFolder
from harness.teachers.text_embeddings import TextEmbeddings, embed_dataset
from harness.training.distributed import processes
from harness.training.loop import train
from harness.training.run import TrainingRun, loop_settings

logger = logging.getLogger(__name__)


def make_teacher(job: TeacherJob) -> TeacherRecord | None:
    """Train or import a teacher and write its folder with `teacher.json`; the first process returns
    the record."""
    if isinstance(job.section, ImportedTeacher):
        set_precision(job.device)  # for text encoders
        return _import(job)
    set_precision(job.device, job.section.tf32, static_shapes=True)
    dataset, texts, null = datasets.load(job.data), {}, None
    if job.text_encoder is not None:
        from harness.features.base import load_extractor

        encoder = load_extractor(job.text_encoder, dataset)
        texts, null = embed_dataset(encoder, dataset, job.folder / "text")
    embeddings = texts.get("text")
    run_id = digest([job.fingerprint, dataset.sha256, embeddings and embeddings.sha256])
    group = processes()
    with group.leading(run_lock(job.folder)):
        run = assemble(job, dataset, run_id, embeddings, null)
        outcome = train(run)
        if not group.first:
            return None
        link(job.folder / "train.csv", run.folder / "train.csv")
        folder, network = run.snapshot(outcome.snapshots[-1]["name"]), run.networks["teacher"]
        facts = {"device": job.device, **outcome.record(run_id)}
        return _write_record(job, folder, network, texts, **facts)


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

    decay_steps = -(-section.images // section.batch) if section.lr_schedule == "cosine" else 0
    rates = {"warmup_steps": section.warmup_steps, "decay_steps": decay_steps}
    optimizer = OptimizerConfig(lr=section.lr, betas=section.betas, **rates)
    return Phase("denoise", "teacher", loss, optimizer)


def assemble(
    job: TeacherJob,
    dataset: Dataset,
    run_id: str,
    embeddings: TextEmbeddings | None = None,
    null: dict[str, Tensor] | None = None,
) -> TrainingRun:
    """Build a teacher's training. With captions: their embeddings, and the empty prompt's."""
    section, shape = job.section, dataset.image_shape
    with seeded(section.seed):
        classes, scale = dataset.num_classes, section.sigma_data
        network = networks.build_denoiser(section.network, shape, classes, scale, null=null)
    if section.augment and network.augment_labels != LABELS:
        found = f"the network takes {network.augment_labels} augmentation labels, not {LABELS}"
        message = f"{found}; a SongUNet with augment_dim: {LABELS} does"
        raise UserError(f"teachers.{job.name}.augment: {message}", "augment-labels")
    on_host = embeddings and job.device != "meta"  # embeddings are read there
    images = placed(dataset.train, "cpu" if on_host else job.device)
    conditions = {"sigma_init": 0.0, "embeddings": embeddings}
    return TrainingRun(
        name=f"teacher {job.name}",
        folder=job.folder / "runs" / run_id,
        run_id=run_id,
        seed=section.seed,
        networks={"teacher": network},
        main="teacher",
        phases=[teacher_phase(section)],
        data=TrainingData(shape, dataset.num_conditions, **conditions, **images),
        batch=section.batch,
        budget=[{"unit": "images", "amount": section.images}],
        export=networks.save_denoiser,
        ema_half_life=section.ema_half_life,
        ema_ramp_up=section.ema_ramp_up,
        loop=loop_settings(job.training, section, max(section.images // 50, 1)),
        device=job.device,
    )


@dataclass
class _Imported:
    """What an import gives. source: what teacher.json records of it. codec: the pipeline whose
    decoder maps latents to pixels."""

    denoiser: Denoiser
    source: dict[str, str]
    texts: dict[str, TextEmbeddings] = field(default_factory=dict)
    codec: PipelineFolder | None = None


def _read(job: TeacherJob, dataset: Dataset) -> _Imported:
    """Read a teacher whose section has a `source`."""
    section = job.section
    sources.download(section)
    kind = sources.kind_of(section)
    if kind not in ("text-to-image", "ddpm"):
        path = section.source if section.path is None else str(section.path)
        denoiser, sha256 = read_denoiser(path, section.sha256, section.network)
        return _Imported(denoiser, {"sha256": sha256})
    folder = sources.open_folder(section)
    folder.check(job, dataset.image_shape)
    source = {"pipeline": folder.kind or folder.network, "sha256": folder.sha256()}
    if kind == "ddpm":
        if folder.clips:
            logger.info("%s clips denoised images when it samples; here they are not", job.name)
        return _Imported(folder.denoiser(dataset.num_classes), source)
    encoder = folder.text_encoder(job.device)
    texts, null = embed_dataset(encoder, dataset, job.folder / "text")
    del encoder  # a T5 would fill the host's memory together with the other networks
    return _Imported(folder.denoiser(null), source, texts, folder)


def _import(job: TeacherJob) -> TeacherRecord:
    """Import a teacher whose section has a `source`."""
    section, dataset = job.section, datasets.load(job.data, images=False)
    read = _read(job, dataset)
    _check_import(job, read.denoiser, dataset)
    logger.info("imported %s, sha256 %s", section.source, read.source["sha256"])
    warnings = check_denoiser(read.denoiser, section.sampler, dataset, job.data, job.device)
    for warning in warnings:
        logger.warning("teacher %s: %s", job.name, warning)
    revision = {"revision": section.revision} if section.revision else {}
    source = {"source": section.source, **revision, **read.source}
    run_id, codec = digest([job.fingerprint, source]), None
    folder = job.folder / "runs" / run_id
    with run_lock(job.folder):
        with atomic_folder(folder) as temporary:
            sha256 = networks.save_denoiser(read.denoiser, temporary, {"imported": source})
            if read.codec is not None:
                decoder = temporary / networks.CODEC
                read.codec.codec().vae.save_pretrained(decoder, safe_serialization=True)
                codec = {"sha256": sha256_file(decoder / networks.WEIGHTS)}
        facts = {"run_id": run_id, "sha256": sha256, "imported": source, "codec": codec}
        return _write_record(job, folder, read.denoiser, read.texts, warnings=warnings, **facts)


def read_denoiser(
    source: str, sha256: str | None, network: dict[str, Any] | None = None
) -> tuple[Denoiser, str]:
    """The denoiser in an official pickle (file or URL), in a denoiser folder or, if `network` is a
    plain module, with the weights in a file; and the sha256 of the file or the folder's weights."""
    path = Path(source).expanduser()
    if path.is_dir():
        return networks.load_denoiser(path, sha256), sha256_file(path / networks.WEIGHTS)
    file = fetch(source, sha256)
    if network and networks.BACKBONES[network["type"]].reads_weights:
        return read_module(file, network), sha256_file(file)
    return read_edm_pickle(file), sha256_file(file)


def check_shapes(name: str, denoiser: Denoiser, dataset: Dataset) -> None:
    """Raise a `UserError` if a network generates other images or classes than a data set's."""
    network = (*denoiser.image_shape, denoiser.num_classes)
    data = (*dataset.image_shape, dataset.num_classes)
    if network != data:
        own, other = ("{}x{}x{} images in {} classes".format(*facts) for facts in (network, data))
        raise UserError(f"{name} generates {own}, but data {dataset.name} has {other}", "shape")


def _check_import(job: TeacherJob, denoiser: Denoiser, dataset: Dataset) -> None:
    """Compare the imported network with the teacher's key `network`, and the images and classes of
    one that is not a pipeline's with the data set's. Keys that are not given have the defaults of
    the network's class; of a pipeline, only the given keys are compared."""
    expected, found = job.section.network or {}, _config(denoiser)
    text = denoiser.text_width > 0
    if expected and denoiser.preconditioning == "edm" and expected.get("type") == found["type"]:
        with torch.device("meta"):
            shape = denoiser.image_shape, denoiser.num_classes
            expected = _config(networks.build_denoiser(expected, *shape))
    for key, value in expected.items():
        if found.get(key) != value:
            message = f"the imported network has {found.get(key)!r}, not {value!r}"
            raise UserError(f"teachers.{job.name}.network.{key}: {message}", "network")
    if not text:
        check_shapes(f"teacher {job.name}", denoiser, dataset)


def _config(denoiser: Denoiser) -> dict[str, Any]:
    """The class and the arguments of a denoiser's backbone, with lists as in an experiment."""
    config = {k: v for k, v in denoiser.backbone.config.items() if not k.startswith("_")}
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return {"type": type(denoiser.backbone).__name__, **lists}


def _write_record(
    job: TeacherJob, run: Path, denoiser: Denoiser, texts: dict[str, TextEmbeddings], **facts: Any
) -> TeacherRecord:
    """Link the network's files in the folder `run`, and write `teacher.json`. texts: embeddings of
    prompts, by their field in the record."""
    for file in (*networks.FILES, networks.NULL, networks.CODEC):
        if (run / file).exists():
            link(job.folder / file, run / file)
    files = {
        field: File(file=str(stored.folder.relative_to(job.folder)), sha256=stored.sha256)
        for field, stored in texts.items()
    }
    record = TeacherRecord(
        teacher=job.name,
        fingerprint=digest(job.fingerprint),
        parameters=sum(p.numel() for p in denoiser.parameters()),
        **files,
        **facts,
    )
    record.write(job.folder / "teacher.json")
    return record
