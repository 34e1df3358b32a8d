"""Import existing teachers: denoiser folders, EDM pickles and diffusers pipelines."""

from pathlib import Path

from harness.config.jobs import TeacherJob
from harness.data import datasets
from harness.data.datasets import Dataset
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import atomic_folder, digest, link, sha256_file
from harness.io.downloads import fetch
from harness.io.locks import run_lock
from harness.io.records import TeacherRecord
from harness.networks import CODEC, FILES, NULL, WEIGHTS, load_denoiser, save_denoiser
from harness.networks.vp import Codec
from harness.teachers.edm_pickle import read_edm_pickle
from harness.teachers.pipelines import PipelineFolder
from harness.teachers.text_embeddings import TextEmbeddings, embed, embed_prompts


def import_teacher(job: TeacherJob) -> TeacherRecord:
    """Write the folder of a teacher whose section has a `source`."""
    section = job.section
    if section.pipeline:
        return _import_pipeline(job)
    if Path(section.source).is_dir():
        origin = Path(section.source) / WEIGHTS
        denoiser = load_denoiser(section.source, section.sha256)
    else:
        origin = fetch(section.source, section.sha256)
        denoiser = read_edm_pickle(origin)
    _check_network(job, denoiser)
    _check_data(job.name, denoiser, datasets.load(job.data))
    source = {"source": section.source, "sha256": sha256_file(origin)}
    with run_lock(job.folder):
        return write_imported_teacher(job, denoiser, source)


def _import_pipeline(job: TeacherJob) -> TeacherRecord:
    """Import a pipeline's denoiser and decoder, and embed the experiment's prompts."""
    section = job.section
    dataset = datasets.load(job.data, images=False)
    pipeline = PipelineFolder(Path(section.source).expanduser())
    # Real images may have another size: whatever compares the two resizes them.
    shape = None if job.data_section.has_images else dataset.image_shape
    pipeline.check(job.name, shape, section.sampler.sigma_max)
    with run_lock(job.folder):
        sets = {"text": dataset.prompts}
        if dataset.evaluation_prompts is not dataset.prompts:
            sets["evaluation_text"] = dataset.evaluation_prompts
        encoder = pipeline.text_encoder(job.device)
        folder = job.folder / "text"
        embeddings = {key: embed_prompts(encoder, prompts, folder) for key, prompts in sets.items()}
        null = embed(encoder, ("",))
        del encoder  # a T5 would fill the host's memory together with the other networks
        denoiser = pipeline.denoiser(null)
        _check_network(job, denoiser)
        source = {"source": section.source, "pipeline": pipeline.kind, "sha256": pipeline.sha256()}
        return write_imported_teacher(job, denoiser, source, pipeline.codec(), **embeddings)


def write_imported_teacher(
    job: TeacherJob,
    denoiser: Denoiser,
    source: dict[str, str],
    codec: Codec | None = None,
    **texts: TextEmbeddings,
) -> TeacherRecord:
    """Write weights, decoder and `teacher.json` of an imported teacher. texts: embeddings of its
    prompts, under the record's fields `text` and `evaluation_text`."""
    run_id = digest([job.fingerprint, source])
    run, files = job.folder / "runs" / run_id, FILES
    with atomic_folder(run) as temporary:
        record = TeacherRecord(
            teacher=job.name,
            fingerprint=digest(job.fingerprint),
            run_id=run_id,
            sha256=save_denoiser(denoiser, temporary, {"imported": source}),
            parameters=sum(p.numel() for p in denoiser.backbone.parameters()),
            imported=source,
            **{key: stored.record(job.folder) for key, stored in texts.items()},
        )
        if codec is not None:
            files += (NULL, CODEC)
            codec.vae.save_pretrained(temporary / CODEC, safe_serialization=True)
            record.codec = {"sha256": sha256_file(temporary / CODEC / WEIGHTS)}
    for file in files:
        link(job.folder / file, run / file)
    record.write(job.folder / "teacher.json")
    return record


def _check_network(job: TeacherJob, denoiser: Denoiser) -> None:
    """Compare the imported network with the teacher's key `network`."""
    config = {"type": type(denoiser.backbone).__name__, **denoiser.backbone.config}
    for key, expected in (job.section.network or {}).items():
        value = config.get(key)
        if (list(value) if isinstance(value, tuple) else value) != expected:
            raise UserError(
                f"teachers.{job.name}.network.{key}: the imported network has {value!r}, not "
                f"{expected!r}",
                "network",
            )


def _check_data(name: str, denoiser: Denoiser, dataset: Dataset) -> None:
    """Compare the shape of images and the number of classes with the data set's."""
    teacher = (*denoiser.image_shape, denoiser.num_classes)
    data = (*dataset.image_shape, dataset.num_classes)
    if teacher != data:
        own, other = ("{}x{}x{} images in {} classes".format(*facts) for facts in (teacher, data))
        message = f"teacher {name} generates {own}, but data {dataset.name} has {other}"
        raise UserError(message, "shape")
