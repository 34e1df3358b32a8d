"""The stage that leaves a teacher's folder: trained in the workflow, or from elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from harness import data as datasets
from harness.artifacts import atomic_folder, digest, run_lock, sha256_file, write_json
from harness.augment import LABELS, edm_augment
from harness.config import Experiment, ImportedTeacher, TrainedTeacher, micro_batch
from harness.data import Dataset
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.fake_score import denoising_loss, left_out
from harness.method import Context, OptimizerConfig, Phase, Sources
from harness.networks import CODEC, FILES, NULL, WEIGHTS, build_denoiser, save_denoiser
from harness.processes import processes
from harness.prompts import Embeddings, embed_prompts
from harness.runs import link, placed, seeded, training_record
from harness.schedules import edm_weight, lognormal_sigma
from harness.trainer import TrainingRun, train


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


def _check_network(name: str, denoiser: Denoiser, expected: dict) -> None:
    """A file must hold the network that the experiment says, if it says."""
    found = {"type": type(denoiser.backbone).__name__, **denoiser.backbone.config}
    for key, value in expected.items():
        mine = found.get(key)
        if (list(mine) if isinstance(mine, tuple) else mine) != value:
            raise UserError(f"teacher {name}: the file's network has {key} {mine!r}, not {value!r}")


def _check_fit(name: str, denoiser: Denoiser, dataset: Dataset) -> None:
    """A teacher must speak of the experiment's images and labels."""
    teacher = (*denoiser.image_shape, denoiser.num_classes)
    data = (*dataset.image_shape, dataset.num_classes)
    if teacher != data:
        said = ["{}x{}x{} images with {} labels".format(*facts) for facts in (teacher, data)]
        raise UserError(f"teacher {name} makes {said[0]}, but data {dataset.name} has {said[1]}")


def import_teacher(experiment: Experiment, name: str) -> dict:
    """Bring a teacher in: a denoiser folder, an official EDM pickle, the address of one, or a
    pipeline's folder."""
    from harness.downloads import fetch
    from harness.networks import load_denoiser
    from harness.networks.import_edm import read_edm_pickle

    section, folder = experiment.teachers[name], experiment.teacher_dir(name)
    if section.pipeline:
        return import_pipeline(experiment, name)
    if Path(section.source).is_dir():
        origin = Path(section.source) / WEIGHTS
        denoiser = load_denoiser(section.source, section.sha256)
    else:
        origin = fetch(section.source, section.sha256)
        denoiser = read_edm_pickle(origin)
    _check_network(name, denoiser, section.network or {})
    _check_fit(name, denoiser, datasets.load(experiment.data_dir()))
    source = {"source": section.source, "sha256": sha256_file(origin)}
    with run_lock(folder):
        return _bring_in(experiment, name, denoiser, source)


def _bring_in(
    experiment: Experiment, name: str, denoiser: Denoiser, source: dict, codec=None, **text: dict
) -> dict:
    """Write an imported teacher's folder: its weights, its codec, if it has one, and its record.
    `text`: what its prompts became."""
    folder = experiment.teacher_dir(name)
    key = digest([experiment.teacher_spec(name), source])
    final, files = folder / "runs" / key, list(FILES)
    with atomic_folder(final) as temporary:
        record = {
            "schema": 1,
            "teacher": name,
            "spec": digest(experiment.teacher_spec(name)),
            "key": key,
            "sha256": save_denoiser(denoiser, temporary, {"imported": source}),
            "imported": source,
            "parameters": sum(p.numel() for p in denoiser.backbone.parameters()),
            **text,
        }
        if text:
            files.append(NULL)
        if codec is not None:
            codec.vae.save_pretrained(temporary / CODEC, safe_serialization=True)
            record["codec"] = {"sha256": sha256_file(temporary / CODEC / WEIGHTS)}
            files.append(CODEC)
    for file in files:
        link(folder / file, final / file)
    write_json(folder / "teacher.json", record)
    return record


def import_pipeline(experiment: Experiment, name: str) -> dict:
    """Bring a text-to-image pipeline in: its denoiser, its decoder, and what its text encoder makes
    of the experiment's prompts, which is not needed again."""
    from harness.networks.pipelines import PipelineFolder

    section, folder = experiment.teachers[name], experiment.teacher_dir(name)
    dataset = datasets.load(experiment.data_dir(), images=False)
    pipeline = PipelineFolder(Path(section.source).expanduser())
    # Real images may be of another size: whatever looks at both brings them to its own.
    shape = None if experiment.data.has_images else dataset.image_shape
    pipeline.check(name, shape, section.sampler.sigma_max)
    with run_lock(folder):
        sets = {"text": dataset.prompts, "evaluation_text": dataset.evaluation_prompts}
        if sets["text"] is sets["evaluation_text"]:
            del sets["evaluation_text"]
        encoder = pipeline.text_encoder().to(experiment.device)
        made = {
            key: Embeddings(embed_prompts(encoder, prompts, folder / "text"))
            for key, prompts in sets.items()
        }
        del encoder  # T5's would fill a host beside the other networks
        denoiser, codec = pipeline.denoiser(made["text"].null), pipeline.codec()
        _check_network(name, denoiser, section.network or {})
        source = {"source": section.source, "pipeline": pipeline.kind, "sha256": pipeline.sha256()}
        text = {key: text_record(embeddings, folder) for key, embeddings in made.items()}
        return _bring_in(experiment, name, denoiser, source, codec, **text)


def text_record(embeddings: Embeddings, folder: Path) -> dict:
    """What teacher.json says of its prompts' embeddings."""
    place = embeddings.folder.relative_to(folder)
    return {"folder": str(place), "sha256": embeddings.record["sha256"]}


def embed_captions(experiment: Experiment, name: str, dataset: Dataset) -> Embeddings:
    """What a teacher's text encoder, a CLIP of the experiment, makes of the data set's captions."""
    from harness.networks.clip import text_encoder

    section = experiment.teachers[name]
    encoder = text_encoder(experiment.features_dir(section.text_encoder), dataset)
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
