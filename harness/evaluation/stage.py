"""The scoring stages: all snapshots of a run, or a teacher and the floor."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.config.jobs import ReferenceScoring, RunScoring
from harness.evaluation.protocol import fingerprint, reference_fingerprint
from harness.evaluation.sample_stream import SampleSource, load_decoding
from harness.evaluation.scorer import Scorer
from harness.io import artifacts
from harness.io.records import (
    Costs,
    File,
    Samples,
    ScoreEntry,
    ScoreRecord,
    StudentRecord,
    TeacherRecord,
)
from harness.networks import denoiser_record, load_denoiser
from harness.sampling import heun, one_step_generator

logger = logging.getLogger(__name__)

# A teacher's samples for the check against other libraries: enough for full-rank covariances of
# Inception's features, within a bound on the file's size.
KEPT_IMAGES, KEPT_BYTES = 5000, 2 << 30

Images = dict[str, Tensor]  # for the figures
PerImage = dict[int, dict[str, Tensor]]  # sampling seed -> column -> values `(N,)`


def score_run(job: RunScoring) -> None:
    """Score every snapshot of a run and write its score file."""
    run, scorer = StudentRecord.read(job.run / "student.json"), Scorer(job.scoring)
    evaluation, device = job.scoring.evaluation, job.scoring.device
    decoding = load_decoding(job.teacher, device)
    entries: list[ScoreEntry] = []
    images: Images = {}
    per_image: PerImage = {}
    for snapshot in run.snapshots:
        folder, final = job.run / "snapshots" / snapshot.name, snapshot is run.snapshots[-1]
        denoiser = load_denoiser(folder, snapshot.sha256, device, owner=job.run)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        source, rows = SampleSource(generate, denoiser.image_shape, *decoding), []
        for seed in evaluation.seeds_of_snapshot(final):
            scores = scorer.score_samples(
                source,
                seed,
                _unfinished(job.output),
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
    facts = {"student": job.student, "seed": job.seed, "weights": run.sha256}
    facts |= {"method": run.method, "contended": run.contended}
    _write(job.output, scorer, entries, images, per_image, fingerprint(job.scoring), **facts)


def score_references(job: ReferenceScoring) -> None:
    """Score a teacher with its sampler and with one step, and the floor (real held-out images, if
    any); write the score file."""
    teacher = TeacherRecord.read(job.teacher / "teacher.json")
    scorer, sampler = Scorer(job.scoring), job.section.sampler
    evaluation, device = job.scoring.evaluation, job.scoring.device
    denoiser = load_denoiser(job.teacher, teacher.sha256, device)
    decoding, settings = load_decoding(job.teacher, device), sampler.model_dump()
    entries: list[ScoreEntry] = []
    images: Images = {}
    stored: Images = {}  # samples of the first sampling seed, for other libraries
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
            what = _unfinished(job.output), teacher.sha256, identity
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
        file = job.output.with_suffix(".kept.safetensors")
        facts["kept"] = File(file=file.name, sha256=artifacts.save_tensors(file, stored))
    _write(job.output, scorer, entries, images, per_image, reference_fingerprint(job), **facts)


def _costs(ledger: Costs | None) -> dict[str, Any]:
    return ledger.model_dump(include={"images", "flops", "seconds"}) if ledger else {}


def _unfinished(output: Path) -> Path:
    return output.with_suffix(".parts")


def _write(
    path: Path,
    scorer: Scorer,
    entries: list[ScoreEntry],
    images: Images,
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
    shutil.rmtree(_unfinished(path), ignore_errors=True)


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
