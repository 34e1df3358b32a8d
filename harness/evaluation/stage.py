"""What can be scored: the snapshots of a run, a teacher and the floor, or a folder of images."""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.jobs import Scoring, StudentRun, TeacherJob
from harness.data.datasets import Images
from harness.data.image_archive import has_labels, read_images
from harness.errors import UserError
from harness.evaluation.accumulator import stored_images
from harness.evaluation.checks import minimum_samples
from harness.evaluation.fingerprints import fingerprint, reference_fingerprint
from harness.evaluation.registry import column_name
from harness.evaluation.scorer import Scorer
from harness.io import artifacts, records
from harness.io.shards import TensorShards
from harness.networks import denoiser_record, load_codec, load_denoiser, pipeline_sha256
from harness.sampling import Generator, heun, one_step_generator, pixels_of, sample
from harness.teachers.text_embeddings import load_embeddings
from harness.training.distributed import processes

logger = logging.getLogger(__name__)

KEPT_IMAGES = 5000  # of a teacher, for other libraries: Inception's covariances have full rank


class ScoreFile:
    """The score file of a job: its entries, and images and values of single images for figures.

    codec: decoder of latents, or the identity. embeddings: of the evaluation prompts, if the
    networks read prompts. A teacher shares both with its students.
    """

    def __init__(self, scoring: Scoring, teacher: Path, path: Path):
        self.scoring, self.path = scoring, path
        self.unfinished = path.with_suffix(".parts")  # folder of an interrupted job
        self.scorer = Scorer(scoring)
        self.codec = load_codec(teacher, scoring.device)
        self.embeddings = load_embeddings(teacher, evaluation=True)
        self.hashes = pipeline_sha256(teacher), self.embeddings and self.embeddings.sha256
        self.entries: list[records.ScoreEntry] = []
        self.images: dict[str, Tensor] = {}
        self.per_image: list[dict[str, Any]] = []  # columns of a table for each sampling seed

    def add(
        self,
        facts: dict[str, Any],
        generate: Generator,
        shape: tuple[int, int, int],
        *identity: object,
        keep: int | None,
        per_image: bool,
        **options: Any,
    ) -> None:
        """Add an entry: rows for samples of `generate`, whose noise has `shape`, with each seed.

        facts: the other fields of the entry. identity: what decides the samples, with the seed.
        keep: how many images of the first seed to keep, unless there are some already (None: none).
        per_image: keep the values of each image, if there are prompts. options: see `Scorer.score`.
        """
        scorer, device, evaluation = self.scorer, self.scoring.device, self.scoring.evaluation
        final, block = facts["final"], evaluation.block
        data, pixels, rows = scorer.dataset, pixels_of(generate, self.codec), []
        options |= {"final": final, "per_image": per_image and data.prompts is not None}
        draw = partial(sample, pixels, max(scorer.counts), shape, data.num_evaluated)
        key = [*self.hashes, *identity, block, data.sha256, torch.__version__, device]
        for e in scorer.extractors:
            key.append([e.name, e.hashes, e.settings.model_dump(), e.resize, e.details])
        for seed in evaluation.sampling_seeds[: None if final else evaluation.snapshot_seeds]:
            kept = None if self.images else keep
            shards = TensorShards(self.unfinished / artifacts.digest([*key, seed, kept]))
            blocks = draw(seed, device, self.embeddings, block, stored_images(shards), processes())
            scores = scorer.score(blocks, seed=seed, keep=kept, shards=shards, **options)
            rows += scores.rows
            self.images = self.images or scores.images
            self.per_image += [scores.per_image] if scores.per_image else []
        self.entries.append(records.ScoreEntry(**facts, rows=rows))
        logger.info("scored %s", facts["snapshot"] or facts["student"])

    def write(self, fingerprint: dict, **facts: Any) -> None:
        """Write the score file after the files that it names, then delete unfinished work.

        The CSV file of single images has one row per image. Its column `prompt` has line numbers of
        the evaluation prompts, from 0. Image i of a sampling seed has the same noise and prompt for
        every student.
        """
        scorer, path = self.scorer, self.path
        if not scorer.first:
            return
        if self.per_image:  # not without an available extractor
            import pandas as pd

            file = path.with_suffix(".prompts.csv")
            table = pd.concat(map(pd.DataFrame, self.per_image))
            artifacts.write_text(file, table.to_csv(index=False, float_format="%.6g"))
            facts["per_image"] = records.File(file=file.name, sha256=artifacts.sha256_file(file))
        file = path.with_suffix(".samples.safetensors")
        samples = records.Samples(file=file.name, sha256=artifacts.save_tensors(file, self.images))
        if scorer.nearest_in is not None:
            reference = scorer.references[scorer.nearest_in]
            samples.neighbour_extractor = scorer.nearest_in
            samples.neighbour_rows = len(reference.features)
            samples.neighbour_unit = "held-out median" if reference.typical_nearest else "features"
        records.ScoreRecord(
            fingerprint=artifacts.digest(fingerprint),
            entries=self.entries,
            samples=samples,
            protocols=scorer.protocols,
            dimensions=scorer.dimensions,
            **facts,
        ).write(path)
        shutil.rmtree(self.unfinished, ignore_errors=True)


def score_run(scoring: Scoring, job: StudentRun, output: Path) -> None:
    """Score every snapshot of a run and write its score file."""
    run = records.StudentRecord.read(job.folder / "student.json")
    file = ScoreFile(scoring, job.teacher, output)
    for snapshot in run.snapshots:
        folder, final = job.folder / "snapshots" / snapshot.name, snapshot is run.snapshots[-1]
        denoiser = load_denoiser(folder, snapshot.sha256, scoring.device, owner=job.folder)
        facts = snapshot.model_dump(include={"grid", "sha256"}) | _costs(snapshot.ledger)
        facts |= {"snapshot": snapshot.name, "final": final}
        file.add(
            facts | {"ema": snapshot.ema_half_life, "nfe": 1},
            one_step_generator(denoiser, denoiser_record(folder)["sigma_init"]),
            denoiser.image_shape,
            snapshot.sha256,
            keep=scoring.evaluation.grid_samples if final else None,
            per_image=final,
            trained_against=run.trained_against,
            pretraining=run.pretraining,
        )
    facts = {"student": job.student.name, "seed": job.seed, "weights": run.sha256}
    facts |= {"method": run.method, "contended": run.contended}
    file.write(fingerprint(scoring), **facts)


def score_references(scoring: Scoring, job: TeacherJob, output: Path) -> None:
    """Score a teacher with its sampler and with one step, and the floor (real held-out images, if
    any); write the score file."""
    teacher = records.TeacherRecord.read(job.folder / "teacher.json")
    file, sampler = ScoreFile(scoring, job.folder, output), job.section.sampler
    scorer, evaluation, settings = file.scorer, scoring.evaluation, sampler.model_dump()
    denoiser = load_denoiser(job.folder, teacher.sha256, scoring.device)
    count, grid = min(evaluation.num_samples, KEPT_IMAGES), evaluation.grid_samples
    common = {"snapshot": "", "final": True, "grid": []}
    for name, nfe, generate, identity in (
        ("teacher", sampler.nfe, partial(heun, denoiser, **settings), settings),
        ("teacher-1step", 1, one_step_generator(denoiser, sampler.sigma_max), sampler.sigma_max),
    ):
        facts = {"student": name, "sha256": teacher.sha256, "nfe": nfe} | _costs(teacher.ledger)
        facts["ema"] = getattr(job.section, "ema_half_life", None)  # unknown of imported teachers
        inputs = generate, denoiser.image_shape, teacher.sha256, identity
        file.add(common | facts, *inputs, keep=max(count, grid), per_image=name == "teacher")
    facts = {"teacher": job.name, "weights": teacher.sha256}
    if scorer.first:  # samples of the first sampling seed, for other libraries
        kept = {key: file.images[key] for key in ("pixels", "labels")}
        path = output.with_suffix(".kept.safetensors")
        sha256 = artifacts.save_tensors(path, {key: t[:count] for key, t in kept.items()})
        facts["kept"] = records.File(file=path.name, sha256=sha256)
        file.images |= {key: t[:grid] for key, t in kept.items()}
    if len(scorer.dataset.held_out):
        blocks = scorer.dataset.held_out.blocks()
        real = ((pixels, labels if scorer.labels_known else None) for pixels, labels in blocks)
        scores = scorer.score(real, [scorer.floor_count], keep=0)
        file.images |= {f"floor_{name}": tensor for name, tensor in scores.images.items()}
        file.entries.append(records.ScoreEntry(**common, student="floor", rows=scores.rows))
        logger.info("scored floor")
    file.write(reference_fingerprint(scoring, sampler), **facts)


def _costs(ledger: records.Costs | None) -> dict[str, Any]:
    return ledger.model_dump(include={"images", "flops", "seconds"}) if ledger else {}


def score_folder(scoring: Scoring, path: Path) -> list[records.ScoreRow]:
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
    known = labelled or not prompted
    blocks = ((block, y if known else None) for block, y in Images(pixels, labels).blocks())
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
