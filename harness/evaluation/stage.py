"""What can be scored: the snapshots of a run, a teacher and the floor, or a folder of images."""

import logging
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.jobs import Scoring, StudentRun, TeacherJob
from harness.data.datasets import Dataset
from harness.data.image_sources import ImageSource, PixelReader
from harness.data.layouts.class_folders import ClassFolders
from harness.data.order import content_order
from harness.errors import UserError
from harness.evaluation.accumulator import stored_images
from harness.evaluation.checks import minimum_samples
from harness.evaluation.fingerprints import (
    fingerprint,
    number_fingerprint,
    reference_fingerprint,
)
from harness.evaluation.pruned import PrunedSnapshots
from harness.evaluation.registry import column_name
from harness.evaluation.scorer import Scorer, Scores
from harness.evaluation.selection import Criterion, best, criterion, scores_of
from harness.features.chance import network_warnings, teacher_warnings
from harness.io import artifacts, records
from harness.io.shards import TensorShards
from harness.networks import denoiser_record, load_codec, load_denoiser, pipeline_sha256
from harness.precision import set_precision
from harness.sampling import Generator, heun, one_step_generator, placed_for_sampling, sample
from harness.teachers.text_embeddings import load_embeddings
from harness.training.distributed import processes
from harness.training.ledger import device_name

logger = logging.getLogger(__name__)

KEPT_IMAGES = 5000  # of a teacher, for other libraries: Inception's covariances have full rank


class ScoreFile:
    """The score file of a job: its entries, and images and values of single images for figures.

    codec: decoder of latents, or the identity. embeddings: of the evaluation prompts, if the
    networks read prompts. A teacher shares both with its students; released weights have neither.
    """

    def __init__(self, scoring: Scoring, teacher: Path | None, path: Path):
        self.scoring, self.path = scoring, path
        self.unfinished = path.with_suffix(".parts")  # folder of an interrupted job
        self.scorer = Scorer(scoring)
        self.codec, self.embeddings, self.hashes = nn.Identity(), None, (None, None)
        if teacher is not None:
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
        evaluation, rows = self.scoring.evaluation, []
        full = facts["final"] or facts.get("selected") is not None
        prompts = self.scorer.dataset.prompts is not None
        options |= {"final": full, "per_image": per_image and prompts}
        for seed in evaluation.sampling_seeds[: None if full else evaluation.snapshot_seeds]:
            kept = None if self.images else keep
            pixels = self.scorer.per_image_metrics(full)
            shards = self._shards(*identity, seed, kept, *filter(None, [pixels]))
            scores = self._score(generate, shape, seed, shards, keep=kept, **options)
            rows += scores.rows
            self.images = self.images or scores.images
            self.per_image += [scores.per_image] if scores.per_image else []
        self.entries.append(records.ScoreEntry(**facts, rows=rows))
        logger.info("scored %s", facts["snapshot"] or facts["student"])

    def add_selection(
        self,
        facts: dict[str, Any],
        generate: Generator,
        shape: tuple[int, int, int],
        *identity: object,
        only: Criterion,
        **options: Any,
    ) -> None:
        """Add an entry with one row, for samples of the selection seed. The row stays until the
        score file is written, in place of the features, of which many snapshots would fill a disk.
        """
        seed, scorer, protocol = self.scoring.evaluation.selection_seed, self.scorer, None
        if scorer.first:
            protocol = scorer.protocol(only.metric, only.num_samples, only.extractor)
        number = protocol and number_fingerprint(self.scoring, protocol)
        shards = self._shards(*identity, seed, number)
        path = shards.folder.with_suffix(".json")
        if not processes().agree(path.exists()):
            scores = self._score(generate, shape, seed, shards, only=only, **options)
            if scorer.first:
                artifacts.write_json(path, [row.model_dump() for row in scores.rows])
                shutil.rmtree(shards.folder, ignore_errors=True)
        if scorer.first:
            key = scorer.add_protocol(protocol)
            rows = [
                records.ScoreRow(**row | {"protocol": key}) for row in artifacts.read_json(path)
            ]
            self.entries.append(records.ScoreEntry(**facts, selection=True, rows=rows))
        logger.info("scored %s with the selection seed", facts["snapshot"])

    def _shards(self, *identity: object) -> TensorShards:
        """The store of an interrupted stream of samples. identity: what decides them."""
        data, evaluation = self.scorer.dataset, self.scoring.evaluation
        key = [*self.hashes, evaluation.block, evaluation.tf32, evaluation.precision, data.sha256]
        key += [torch.__version__, self.scoring.device]
        for e in self.scorer.extractors:
            key.append([e.name, e.hashes, e.settings.model_dump(), e.resize, e.details])
        return TensorShards(self.unfinished / artifacts.digest([*key, *identity]))

    def _score(
        self,
        generate: Generator,
        shape: tuple[int, int, int],
        seed: int,
        shards: TensorShards,
        **options: Any,
    ) -> Scores:
        scorer, scoring, evaluation = self.scorer, self.scoring, self.scoring.evaluation
        blocks = sample(
            generate,
            max(scorer.counts),
            shape,
            scorer.dataset.num_evaluated,
            seed,
            scoring.device,
            self.embeddings,
            evaluation.block,
            start=stored_images(shards),
            group=processes(),
            codec=self.codec,
            precision=evaluation.precision,
        )
        return scorer.score(blocks, seed=seed, shards=shards, **options)

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
            tf32=self.scoring.evaluation.tf32,
            precision=self.scoring.evaluation.precision,
            device_name=device_name(self.scoring.device),
            protocols=scorer.protocols,
            dimensions=scorer.dimensions,
            **facts,
        ).write(path)
        shutil.rmtree(self.unfinished, ignore_errors=True)


class SnapshotSource:
    """What the entries of a run's snapshots are made from."""

    def __init__(self, job: StudentRun, run: records.StudentRecord, scoring: Scoring):
        self.job, self.run, self.scoring = job, run, scoring
        self.networks = {"trained_against": run.trained_against, "pretraining": run.pretraining}

    def facts(self, snapshot: records.Snapshot) -> dict[str, Any]:
        facts = snapshot.model_dump(include={"grid", "sha256"}) | _costs(snapshot.ledger)
        facts |= {"snapshot": snapshot.name, "final": False, "ema": snapshot.ema_half_life}
        return facts | {"nfe": 1}

    def load(self, snapshot: records.Snapshot) -> tuple[dict[str, Any], Generator, tuple, str]:
        """The facts, and the network's samples and their identity (see `ScoreFile.add`)."""
        folder, owner = self.job.folder / "snapshots" / snapshot.name, self.job.folder
        denoiser = load_denoiser(folder, snapshot.sha256, self.scoring.device, owner=owner)
        denoiser = placed_for_sampling(denoiser, self.scoring.evaluation.precision)
        generate = one_step_generator(denoiser, denoiser_record(folder)["sigma_init"])
        return self.facts(snapshot), generate, denoiser.image_shape, snapshot.sha256


def score_run(scoring: Scoring, job: StudentRun, output: Path) -> None:
    """Score the snapshots of a run and write its score file: all of them or, with a selection seed,
    the last one and the best of all by that seed. Snapshots without weights keep the scores that
    `harness prune` left, as far as they are those of the settings."""
    set_precision(scoring.device, scoring.evaluation.tf32, static_shapes=True)
    run, evaluation = records.StudentRecord.read(job.folder / "student.json"), scoring.evaluation
    pruned = PrunedSnapshots(run, job.folder)
    selects = evaluation.selection_seed is not None and run.released is None
    if selects:  # before networks are loaded
        pruned.check_selection(scoring, pruned.rows)
    file = ScoreFile(scoring, job.teacher, output)
    source, kept = SnapshotSource(job, run, scoring), pruned.valid_rows(file.scorer)
    *earlier, last = run.snapshots
    selected, seeds = None, evaluation.sampling_seeds[: evaluation.snapshot_seeds]
    if selects:
        if file.scorer.first:
            pruned.check_selection(scoring, kept)
        selected, earlier = _select(file, source, kept), []
        if selected != last.name:
            earlier = [snapshot for snapshot in run.snapshots if snapshot.name == selected]
    elif changed := pruned.scored_otherwise(scoring):
        logger.warning(
            "%d of %d snapshots have no weights: they keep the scores that the changed settings "
            "leave valid, and get no others",
            len(changed),
            len(run.snapshots),
        )
    for snapshot in [*earlier, last]:
        if snapshot.name in pruned.missing:
            rows = [row for row in kept.get(snapshot.name, ()) if row.sample_seed in seeds]
            if rows:
                file.entries.append(records.ScoreEntry(**source.facts(snapshot), rows=rows))
            continue
        final, (facts, *inputs) = snapshot is last, source.load(snapshot)
        facts["final"] = final
        if snapshot.name == selected:
            facts["selected"] = len(run.snapshots)
        keep = evaluation.grid_samples if final else None
        file.add(facts, *inputs, keep=keep, per_image=final, **source.networks)
    facts = {"student": job.student.name, "seed": job.seed, "weights": run.sha256}
    facts |= {"method": run.method, "contended": run.contended}
    facts["trained_on"] = run.device_name or (None if run.released else run.device)
    facts["released"] = None if run.released is None else True
    file.write(fingerprint(scoring), **facts)


def _select(file: ScoreFile, source: SnapshotSource, kept: Mapping[str, list]) -> str:
    """Score all snapshots with the selection seed; return the name of the best one. A single
    snapshot is not scored. kept: rows that need not be computed again, by snapshot."""
    scoring, snapshots, group = file.scoring, source.run.snapshots, processes()
    chosen, seed = criterion(scoring), scoring.evaluation.selection_seed
    if file.scorer.first:
        file.scorer.check_available(chosen)
    if len(snapshots) == 1:
        return snapshots[0].name
    for snapshot in snapshots:
        rows = chosen.rows(kept.get(snapshot.name, ()), seed)
        if group.agree(bool(rows)):
            facts = source.facts(snapshot) | {"selection": True, "rows": rows}
            file.entries.append(records.ScoreEntry(**facts))
        else:
            file.add_selection(*source.load(snapshot), only=chosen, **source.networks)
    names = [snapshot.name for snapshot in snapshots]
    values = scores_of(file.entries, chosen)
    if group.first and not values:
        what = f"no snapshot has a value of {chosen.metric.name} in {chosen.extractor}"
        message = f"evaluation.selection_seed: {what}; choose another evaluation.main_metric"
        raise UserError(message, "no-scores")
    name = best(values, chosen) if group.first else names[0]
    name = names[int(group.agree(names.index(name)))]
    logger.info("selected %s among %d snapshots by %s", name, len(names), chosen.metric.name)
    return name


def score_references(scoring: Scoring, job: TeacherJob, output: Path) -> None:
    """Score a teacher with its sampler and with one step, and the floor (real held-out images, if
    any); write the score file."""
    set_precision(scoring.device, scoring.evaluation.tf32, static_shapes=True)
    teacher = records.TeacherRecord.read(job.folder / "teacher.json")
    file, sampler = ScoreFile(scoring, job.folder, output), job.section.sampler
    scorer, evaluation, settings = file.scorer, scoring.evaluation, sampler.model_dump()
    denoiser = load_denoiser(job.folder, teacher.sha256, scoring.device)
    denoiser = placed_for_sampling(denoiser, evaluation.precision)
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
    if scorer.first:
        blind = network_warnings(scoring.extractors, scorer.dataset, len(scorer.dataset.held_out))
        for line in teacher_warnings(job.name, file.entries[0].rows, scorer.dataset, blind):
            logger.warning(line)
    facts = {"teacher": job.name, "weights": teacher.sha256}
    facts["trained_on"] = teacher.device_name or teacher.device
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
    """Rows for the images in `path`, in any layout of a data set (docs/data.md). They are resized
    as the experiment's data are.

    Labels are required if the experiment has classes, and optional for prompts. The sample counts
    are the experiment's as far as there are enough images, otherwise the number of images. Images
    are scored in an order by content, so that names of files do not matter: subsets and groups of
    consecutive images would otherwise hold few classes.
    """
    set_precision(scoring.device)
    scorer, section = Scorer(scoring), scoring.data_section
    data, source = scorer.dataset, ImageSource(path, section.label_column)
    labels, every = requested_labels(data, source), torch.arange(len(source.single().names))
    pixels = PixelReader(path, section.resize).read([(source.single(), every)])[0]
    # Pretrained networks, as they score text to image, resize images.
    if not is_prompted(data) and tuple(pixels.shape[1:]) != data.image_shape:
        size, expected = ("x".join(map(str, s)) for s in (pixels.shape[1:], data.image_shape))
        raise UserError(f"{path}: images are {size}; those of {data.name} are {expected}", "shape")
    minimum = minimum_samples(scoring.evaluation.neighbours)[1]
    if len(pixels) < minimum:
        message = f"{path}: {len(pixels)} images; the metrics need at least {minimum}"
        raise UserError(message, "too-few")
    counts = [n for n in scorer.counts if n <= len(pixels)] or [len(pixels)]
    order = content_order(pixels, torch.zeros_like(every) if labels is None else labels)
    blocks = ((pixels[i], None if labels is None else labels[i]) for i in order.split(256))
    return scorer.score(blocks, counts).rows


def is_prompted(data: Dataset) -> bool:
    """Whether images are scored by prompts that no program can check."""
    return data.evaluation_prompts is not None and data.attributes is None


def requested_labels(data: Dataset, source: ImageSource) -> Tensor | None:
    """The class or prompt of each image of a source, int64 `(N,)`: required if the experiment has
    classes, all 0 if it has none. None for an experiment with prompts, if they are unknown: folders
    need not be named by prompts."""
    listing = source.single()
    texts = data.evaluation_prompts.texts if data.evaluation_prompts else data.class_names
    if not data.num_evaluated:
        return torch.zeros(len(listing.names), dtype=torch.int64)
    if is_prompted(data):
        unnamed = source.layout is ClassFolders and not set(listing.labels or ()) <= set(texts)
        if listing.labels is None or unnamed:
            return None
    return source.numbers(listing, texts)


def print_folder(scoring: Scoring, path: Path) -> None:
    from tabulate import tabulate

    lines = []
    for row in score_folder(scoring, path):
        column = column_name(row.metric, row.num_samples, row.extractor)
        error = None if row.stderr is None or math.isnan(row.stderr) else row.stderr
        lines.append((column, row.status or row.value, error))
    print(tabulate(lines, ("column", "value", "standard error"), "github", ".4g", missingval="–"))
    print(
        f"\n{path} against the training part of {scoring.data_section.name}, scored like the "
        f"students of {scoring.experiment}. How these images were selected is unknown."
        + (f" They were resized: {resize}." if (resize := scoring.data_section.resize) else "")
    )
