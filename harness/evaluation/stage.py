"""The scoring stages: all snapshots of a run, or a teacher and the floor."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from torch import Tensor

from harness.config.jobs import ReferenceScoring, RunScoring
from harness.evaluation.protocol import fingerprint, reference_fingerprint
from harness.evaluation.sample_stream import SampleSource, load_decoding
from harness.evaluation.scorer import Scorer, Scores
from harness.io.artifacts import digest, save_tensors, sha256_file, write_text
from harness.io.records import (
    File,
    Samples,
    ScoreEntry,
    ScoreRecord,
    StudentRecord,
    TeacherRecord,
)
from harness.networks import denoiser_record, load_denoiser
from harness.sampling import heun_generator, one_step_generator

logger = logging.getLogger(__name__)

# A teacher's samples for the check against other libraries: enough for full-rank covariances of
# Inception's features, within a bound on the file's size.
KEPT_IMAGES, KEPT_BYTES = 5000, 2 << 30
PER_IMAGE = ".prompts.csv"


def score_run(job: RunScoring) -> None:
    """Score every snapshot of a run and write its score file."""
    run, scorer = StudentRecord.read(job.run / "student.json"), Scorer(job.scoring)
    evaluation, device = job.scoring.evaluation, job.scoring.device
    decoding, entries = load_decoding(job.teacher, device), []
    images: dict[str, Tensor] = {}
    per_image: dict[int, dict[str, Tensor]] = {}
    for snapshot in run.snapshots:
        folder, final = job.run / "snapshots" / snapshot.name, snapshot is run.snapshots[-1]
        denoiser = load_denoiser(folder, snapshot.sha256, device, owner=job.run)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        source, rows = SampleSource(generate, denoiser.image_shape, *decoding), []
        for seed in evaluation.seeds_of_snapshot(final):
            keep = evaluation.grid_samples if final and not images else 0
            scores = scorer.score(
                scorer.stream(source, seed, _unfinished(job.output), snapshot.sha256, keep),
                seed=seed,
                final=final,
                trained_against=run.trained_against,
                pretraining=run.pretraining,
                keep=keep,
                nearest=keep > 0,
                per_image=final and scorer.dataset.prompts is not None,
            )
            rows += scores.rows
            images, per_image[seed] = images or scores.images, scores.per_image
        costs = snapshot.ledger
        entries.append(
            ScoreEntry(
                snapshot=snapshot.name,
                final=final,
                grid=snapshot.grid,
                sha256=snapshot.sha256,
                nfe=1,
                ema=snapshot.ema_half_life,
                images=costs.images,
                flops=costs.flops,
                seconds=costs.seconds,
                rows=rows,
            )
        )
        logger.info("scored %s", snapshot.name)
    if scorer.first:
        record = ScoreRecord(
            student=job.student,
            method=run.method,
            seed=job.seed,
            weights=run.sha256,
            fingerprint=digest(fingerprint(job.scoring)),
            contended=run.contended,
            entries=entries,
            protocols=scorer.protocols,
            dimensions=scorer.dimensions,
        )
        _write(job.output, record, scorer, images, per_image)


def score_references(job: ReferenceScoring) -> None:
    """Score a teacher with its sampler and with one step, and the floor (real held-out images, if
    any); write the score file."""
    teacher = TeacherRecord.read(job.teacher / "teacher.json")
    scorer, sampler = Scorer(job.scoring), job.section.sampler
    evaluation, device = job.scoring.evaluation, job.scoring.device
    denoiser = load_denoiser(job.teacher, teacher.sha256, device)
    decoding, entries = load_decoding(job.teacher, device), []
    images: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}  # samples of the first sampling seed, for other libraries
    per_image: dict[int, dict[str, Tensor]] = {}
    settings = sampler.model_dump()
    for name, nfe, generate, identity in (
        ("teacher", sampler.nfe, heun_generator(denoiser, settings), settings),
        ("teacher-1step", 1, one_step_generator(denoiser, sampler.sigma_max), sampler.sigma_max),
    ):
        source, rows = SampleSource(generate, denoiser.image_shape, *decoding), []
        for seed in evaluation.sampling_seeds:
            count = min(evaluation.num_samples, KEPT_IMAGES, KEPT_BYTES // source.image_bytes)
            keep = 0 if images else max(count, evaluation.grid_samples)
            prompted = name == "teacher" and scorer.dataset.prompts is not None
            scores = scorer.score(
                scorer.stream(
                    source, seed, _unfinished(job.output), teacher.sha256, identity, keep
                ),
                seed=seed,
                keep=keep,
                nearest=keep > 0,
                per_image=prompted,
            )
            rows += scores.rows
            if prompted:
                per_image[seed] = scores.per_image
            if scores.images:
                images = scores.images
                kept = {key: images[key][:count] for key in ("pixels", "labels")}
                images |= {key: images[key][: evaluation.grid_samples] for key in kept}
        costs = teacher.ledger
        entries.append(
            ScoreEntry(
                student=name,
                snapshot="",
                final=True,
                grid=[],
                sha256=teacher.sha256,
                nfe=nfe,
                ema=getattr(job.section, "ema_half_life", None),  # unknown of imported teachers
                images=costs and costs.images,
                flops=costs and costs.flops,
                seconds=costs and costs.seconds,
                rows=rows,
            )
        )
        logger.info("scored %s", name)
    if len(scorer.dataset.held_out):
        scores = _score_floor(scorer)
        images |= {f"floor_{name}": tensor for name, tensor in scores.images.items()}
        entries.append(
            ScoreEntry(student="floor", snapshot="", final=True, grid=[], rows=scores.rows)
        )
        logger.info("scored floor")
    if scorer.first:
        file = job.output.with_suffix(".kept.safetensors")
        record = ScoreRecord(
            teacher=job.name,
            weights=teacher.sha256,
            fingerprint=digest(reference_fingerprint(job)),
            entries=entries,
            protocols=scorer.protocols,
            dimensions=scorer.dimensions,
            kept=File(file=file.name, sha256=save_tensors(file, kept)),
        )
        _write(job.output, record, scorer, images, per_image)


def _score_floor(scorer: Scorer) -> Scores:
    held_out = scorer.dataset.held_out.blocks()
    blocks = ((pixels, labels if scorer.labels_known else None) for pixels, labels in held_out)
    return scorer.score(blocks, [scorer.floor_count], nearest=True)


def _unfinished(output: Path) -> Path:
    return output.with_suffix(".parts")


def _write(
    path: Path,
    record: ScoreRecord,
    scorer: Scorer,
    images: dict[str, Tensor],
    per_image: dict[int, dict[str, Tensor]],
) -> None:
    """Write the files that the record names, then the record; delete unfinished work."""
    if any(per_image.values()):  # not without an available extractor
        file = path.with_suffix(PER_IMAGE)
        record.per_image = File(file=file.name, sha256=write_per_image(file, per_image))
    file = path.with_suffix(".samples.safetensors")
    record.samples = Samples(file=file.name, sha256=save_tensors(file, images))
    if scorer.nearest_in is not None:
        reference = scorer.references[scorer.nearest_in]
        record.samples.neighbour_extractor = scorer.nearest_in
        record.samples.neighbour_rows = len(reference.features)
        unit = "held-out median" if reference.typical_nearest else "features"
        record.samples.neighbour_unit = unit
    record.write(path)
    shutil.rmtree(_unfinished(path), ignore_errors=True)


def write_per_image(path: Path, per_image: dict[int, dict[str, Tensor]]) -> str:
    """Write a CSV file with one row per image; returns its sha256.

    per_image: sampling seed -> column -> values `(N,)`, with the column `prompt` (line number in
    the evaluation prompts, from 0). Image i of a sampling seed has the same noise and prompt for
    every student.
    """
    import pandas as pd

    tables = []
    for seed, columns in per_image.items():
        if columns:
            table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
            table.insert(0, "prompt", table.pop("prompt"))
            table.insert(0, "image", range(len(table)))
            table.insert(0, "sample_seed", seed)
            tables.append(table)
    write_text(path, pd.concat(tables).to_csv(index=False, float_format="%.6g"))
    return sha256_file(path)
