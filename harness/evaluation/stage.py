"""What can be scored: the snapshots of a run, a teacher and the floor, or a folder of images."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.config.jobs import Scoring, StudentRun, TeacherJob
from harness.data.datasets import Images
from harness.data.image_archive import has_labels, read_images
from harness.errors import UserError
from harness.evaluation.checks import minimum_samples
from harness.evaluation.protocol import fingerprint, reference_fingerprint
from harness.evaluation.registry import column_name
from harness.evaluation.sample_stream import SampleSource, load_decoding
from harness.evaluation.scorer import Scorer
from harness.io import artifacts
from harness.io.records import (
    Costs,
    File,
    Samples,
    ScoreEntry,
    ScoreRecord,
    ScoreRow,
    StudentRecord,
    TeacherRecord,
)
from harness.networks import denoiser_record, load_denoiser
from harness.sampling import heun, one_step_generator

logger = logging.getLogger(__name__)

# A teacher's samples for the check against other libraries: enough for full-rank covariances of
# Inception's features, within a bound on the file's size.
KEPT_IMAGES, KEPT_BYTES = 5000, 2 << 30
PARTS = ".parts"  # suffix of the folder for unfinished work

Figures = dict[str, Tensor]  # images, with what figures show of them
PerImage = dict[int, dict[str, Tensor]]  # sampling seed -> column -> values `(N,)`


def score_run(scoring: Scoring, job: StudentRun, output: Path) -> None:
    """Score every snapshot of a run and write its score file."""
    run, scorer = StudentRecord.read(job.folder / "student.json"), Scorer(scoring)
    evaluation, device = scoring.evaluation, scoring.device
    decoding = load_decoding(job.teacher, device)
    entries: list[ScoreEntry] = []
    images: Figures = {}
    per_image: PerImage = {}
    for snapshot in run.snapshots:
        folder, final = job.folder / "snapshots" / snapshot.name, snapshot is run.snapshots[-1]
        denoiser = load_denoiser(folder, snapshot.sha256, device, owner=job.folder)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        source, rows = SampleSource(generate, denoiser.image_shape, *decoding), []
        for seed in evaluation.seeds_of_snapshot(final):
            scores = scorer.score_samples(
                source,
                seed,
                output.with_suffix(PARTS),
                snapshot.sha256,
                keep=evaluation.grid_samples if final and not images else 0,
                final=final,
                trained_against=run.trained_against,
                pretraining=run.pretraining,
                per_image=final and scorer.dataset.prompts is not None,
            )
            rows += scores.rows
            images, per_image[seed] = images or scores.images, scores.per_image
        facts = snapshot.model_dump(include={"grid", "sha256"}) | _costs(snapshot.ledger)
        facts |= {"snapshot": snapshot.name, "final": final, "ema": snapshot.ema_half_life}
        entries.append(ScoreEntry(**facts, nfe=1, rows=rows))
        logger.info("scored %s", snapshot.name)
    facts = {"student": job.student.name, "seed": job.seed, "weights": run.sha256}
    facts |= {"method": run.method, "contended": run.contended}
    _write(output, scorer, entries, images, per_image, fingerprint(scoring), **facts)


def score_references(scoring: Scoring, job: TeacherJob, output: Path) -> None:
    """Score a teacher with its sampler and with one step, and the floor (real held-out images, if
    any); write the score file."""
    teacher = TeacherRecord.read(job.folder / "teacher.json")
    scorer, sampler = Scorer(scoring), job.section.sampler
    evaluation, device = scoring.evaluation, scoring.device
    denoiser = load_denoiser(job.folder, teacher.sha256, device)
    decoding, settings = load_decoding(job.folder, device), sampler.model_dump()
    entries: list[ScoreEntry] = []
    images: Figures = {}
    stored: Figures = {}  # samples of the first sampling seed, for other libraries
    per_image: PerImage = {}
    common = {"snapshot": "", "final": True, "grid": []}
    for name, nfe, generate, identity in (
        ("teacher", sampler.nfe, partial(heun, denoiser, **settings), settings),
        ("teacher-1step", 1, one_step_generator(denoiser, sampler.sigma_max), sampler.sigma_max),
    ):
        source, rows = SampleSource(generate, denoiser.image_shape, *decoding), []
        prompted = name == "teacher" and scorer.dataset.prompts is not None
        count = min(evaluation.num_samples, KEPT_IMAGES, KEPT_BYTES // source.image_bytes)
        for seed in evaluation.sampling_seeds:
            keep = 0 if images else max(count, evaluation.grid_samples)
            what = output.with_suffix(PARTS), teacher.sha256, identity
            scores = scorer.score_samples(source, seed, *what, keep=keep, per_image=prompted)
            rows += scores.rows
            if prompted:
                per_image[seed] = scores.per_image
            if scores.images:
                images = scores.images
                stored = {key: images[key][:count] for key in ("pixels", "labels")}
                images |= {key: images[key][: evaluation.grid_samples] for key in stored}
        facts = {"student": name, "sha256": teacher.sha256, "nfe": nfe} | _costs(teacher.ledger)
        facts["ema"] = getattr(job.section, "ema_half_life", None)  # unknown of imported teachers
        entries.append(ScoreEntry(**common, **facts, rows=rows))
        logger.info("scored %s", name)
    if len(scorer.dataset.held_out):
        blocks = scorer.dataset.held_out.blocks()
        real = ((pixels, labels if scorer.labels_known else None) for pixels, labels in blocks)
        scores = scorer.score(real, [scorer.floor_count], nearest=True)
        images |= {f"floor_{name}": tensor for name, tensor in scores.images.items()}
        entries.append(ScoreEntry(**common, student="floor", rows=scores.rows))
        logger.info("scored floor")
    facts = {"teacher": job.name, "weights": teacher.sha256}
    if scorer.first:
        file = output.with_suffix(".kept.safetensors")
        facts["kept"] = File(file=file.name, sha256=artifacts.save_tensors(file, stored))
    key = reference_fingerprint(scoring, sampler)
    _write(output, scorer, entries, images, per_image, key, **facts)


def score_folder(scoring: Scoring, path: Path) -> list[ScoreRow]:
    """Rows for the images in `path`, in the layout of a data set (`harness.data.image_archive`).

    Labels are required if the experiment has classes, and optional for prompts. The sample counts
    are the experiment's as far as there are enough images, otherwise the number of images.
    """
    scorer = Scorer(scoring)
    data = scorer.dataset
    # With prompts labels are optional, and pretrained networks resize the images.
    prompted = data.evaluation_prompts is not None and data.attributes is None
    labelled = data.num_evaluated > 0 and (not prompted or has_labels(path))
    pixels, labels, _ = read_images(path, labelled, data.num_evaluated or None)
    if not prompted and tuple(pixels.shape[1:]) != data.image_shape:
        size, expected = ("x".join(map(str, s)) for s in (pixels.shape[1:], data.image_shape))
        raise UserError(f"{path}: images are {size}; those of {data.name} are {expected}", "shape")
    minimum = minimum_samples(scoring.evaluation.neighbours)[1]
    if len(pixels) < minimum:
        message = f"{path}: {len(pixels)} images; the metrics need at least {minimum}"
        raise UserError(message, "too-few")
    counts = [n for n in scorer.counts if n <= len(pixels)] or [len(pixels)]
    blocks = Images(pixels, labels).blocks()
    if prompted and not labelled:
        blocks = ((block, None) for block, _ in blocks)
    return scorer.score(blocks, counts).rows


def print_folder(scoring: Scoring, path: Path) -> None:
    from tabulate import tabulate

    lines = []
    for row in score_folder(scoring, path):
        column = column_name(row.metric, row.num_samples, row.extractor)
        lines.append((column, row.status or row.value, row.stderr))
    print(tabulate(lines, ("column", "value", "standard error"), "github", floatfmt=".4g"))
    print(
        f"\n{path} against the training part of {scoring.data_section.name}, scored like the "
        f"students of {scoring.experiment}. How these images were selected is unknown."
    )


def _costs(ledger: Costs | None) -> dict[str, Any]:
    return ledger.model_dump(include={"images", "flops", "seconds"}) if ledger else {}


def _write(
    path: Path,
    scorer: Scorer,
    entries: list[ScoreEntry],
    images: Figures,
    per_image: PerImage,
    fingerprint: dict,
    **facts: Any,
) -> None:
    """Write a score file after the files that it names, then delete unfinished work."""
    if not scorer.first:
        return
    if any(per_image.values()):  # not without an available extractor
        file = path.with_suffix(".prompts.csv")
        _write_per_image(file, per_image)
        facts["per_image"] = File(file=file.name, sha256=artifacts.sha256_file(file))
    file = path.with_suffix(".samples.safetensors")
    samples = Samples(file=file.name, sha256=artifacts.save_tensors(file, images))
    if scorer.nearest_in is not None:
        reference = scorer.references[scorer.nearest_in]
        samples.neighbour_extractor = scorer.nearest_in
        samples.neighbour_rows = len(reference.features)
        samples.neighbour_unit = "held-out median" if reference.typical_nearest else "features"
    ScoreRecord(
        fingerprint=artifacts.digest(fingerprint),
        entries=entries,
        samples=samples,
        protocols=scorer.protocols,
        dimensions=scorer.dimensions,
        **facts,
    ).write(path)
    shutil.rmtree(path.with_suffix(PARTS), ignore_errors=True)


def _write_per_image(path: Path, per_image: PerImage) -> None:
    """Write a CSV file with one row per image. The column `prompt` has line numbers of the
    evaluation prompts, from 0. Image i of a sampling seed has the same noise and prompt for every
    student."""
    import pandas as pd

    tables = []
    for seed, columns in per_image.items():
        if columns:
            values = {name: tensor.numpy() for name, tensor in columns.items()}
            prompts = values.pop("prompt")
            first = {"sample_seed": seed, "image": range(len(prompts)), "prompt": prompts}
            tables.append(pd.DataFrame(first | values))
    artifacts.write_text(path, pd.concat(tables).to_csv(index=False, float_format="%.6g"))
