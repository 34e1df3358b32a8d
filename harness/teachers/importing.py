"""Teachers from elsewhere: denoiser folders, EDM pickles and diffusers pipelines."""

from __future__ import annotations

from pathlib import Path

from harness.config.jobs import TeacherJob
from harness.data import datasets
from harness.data.datasets import Dataset
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, digest, link, sha256_file, write_json
from harness.io.locks import run_lock
from harness.networks import CODEC, FILES, NULL, WEIGHTS, save_denoiser
from harness.teachers.text_embeddings import Embeddings, embed_prompts


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


def import_teacher(job: TeacherJob) -> dict:
    """Bring a teacher in: a denoiser folder, an official EDM pickle, the address of one, or a
    pipeline's folder."""
    from harness.io.downloads import fetch
    from harness.networks import load_denoiser
    from harness.teachers.edm_pickle import read_edm_pickle

    name, section, folder = job.name, job.section, job.folder
    if section.pipeline:
        return import_pipeline(job)
    if Path(section.source).is_dir():
        origin = Path(section.source) / WEIGHTS
        denoiser = load_denoiser(section.source, section.sha256)
    else:
        origin = fetch(section.source, section.sha256)
        denoiser = read_edm_pickle(origin)
    _check_network(name, denoiser, section.network or {})
    _check_fit(name, denoiser, datasets.load(job.data))
    source = {"source": section.source, "sha256": sha256_file(origin)}
    with run_lock(folder):
        return _bring_in(job, denoiser, source)


def _bring_in(job: TeacherJob, denoiser: Denoiser, source: dict, codec=None, **text: dict) -> dict:
    """Write an imported teacher's folder: its weights, its codec, if it has one, and its record.
    `text`: what its prompts became."""
    folder = job.folder
    key = digest([job.fingerprint, source])
    final, files = folder / "runs" / key, list(FILES)
    with atomic_folder(final) as temporary:
        record = {
            "schema": 1,
            "teacher": job.name,
            "fingerprint": digest(job.fingerprint),
            "run_id": key,
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


def import_pipeline(job: TeacherJob) -> dict:
    """Bring a text-to-image pipeline in: its denoiser, its decoder, and what its text encoder makes
    of the experiment's prompts, which is not needed again."""
    from harness.teachers.pipelines import PipelineFolder

    name, section, folder = job.name, job.section, job.folder
    dataset = datasets.load(job.data, images=False)
    pipeline = PipelineFolder(Path(section.source).expanduser())
    # Real images may be of another size: whatever looks at both brings them to its own.
    shape = None if job.data_section.has_images else dataset.image_shape
    pipeline.check(name, shape, section.sampler.sigma_max)
    with run_lock(folder):
        sets = {"text": dataset.prompts, "evaluation_text": dataset.evaluation_prompts}
        if sets["text"] is sets["evaluation_text"]:
            del sets["evaluation_text"]
        encoder = pipeline.text_encoder().to(job.device)
        made = {
            key: Embeddings(embed_prompts(encoder, prompts, folder / "text"))
            for key, prompts in sets.items()
        }
        del encoder  # T5's would fill a host beside the other networks
        denoiser, codec = pipeline.denoiser(made["text"].null), pipeline.codec()
        _check_network(name, denoiser, section.network or {})
        source = {"source": section.source, "pipeline": pipeline.kind, "sha256": pipeline.sha256()}
        text = {key: text_record(embeddings, folder) for key, embeddings in made.items()}
        return _bring_in(job, denoiser, source, codec, **text)


def text_record(embeddings: Embeddings, folder: Path) -> dict:
    """What teacher.json says of its prompts' embeddings."""
    place = embeddings.folder.relative_to(folder)
    return {"folder": str(place), "sha256": embeddings.record["sha256"]}
