"""The scoring stage: one job for all snapshots of a run, one for a teacher and the floor.

A score file holds rows; each row is one number: sampling seed, metric, extractor, sample count,
value, standard error, estimates that leave one group of samples out, protocol hash and flag. The
protocols themselves stand beside them.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import SCORES_FORMAT
from harness.config.experiment import Experiment
from harness.data import datasets
from harness.data.datasets import Dataset, Images
from harness.errors import UserError
from harness.evaluation.accumulate import FeatureAccumulator
from harness.evaluation.checks import minimum_samples, small_sample_warning
from harness.evaluation.estimates import mean_over_subsets
from harness.evaluation.feature_set import PAIRWISE_LIMIT, FeatureSet, Reference
from harness.evaluation.frechet import Moments, load_statistics
from harness.evaluation.neighbours import nearest
from harness.evaluation.registry import METRICS, Metric
from harness.features import inception
from harness.features.base import FeatureExtractor, load_extractor
from harness.io.artifacts import (
    digest,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
    write_text,
)
from harness.io.downloads import fetch
from harness.io.locks import run_lock
from harness.networks import denoiser_record, load_codec, load_denoiser, parts_sha256
from harness.sampling import Generator, heun_generator, one_step_generator, pixels_of, sample
from harness.streams import Stream
from harness.teachers.text_embeddings import Embeddings, load_embeddings
from harness.training.distributed import processes

# Of a teacher's samples, those kept to be scored by other libraries: enough for full-rank
# covariances of Inception's features, and no more bytes than that.
KEPT, KEPT_BYTES = 5000, 2 << 30
CLOSEST = 10  # pairs in the figure of nearest neighbours
QUANTISATION = "uint8: x * 127.5 + 128, clipped"

Blocks = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """What samples come from: `generate` and the shape of its noise; of a generator of latents the
    codec, of one that reads prompts their embeddings."""

    generate: Generator
    shape: tuple[int, int, int]
    codec: nn.Module
    embeddings: Embeddings | None
    made_of: tuple = ()  # hashes of what decides its images beside the network

    @classmethod
    def of(cls, teacher: Path, device: str) -> Callable[..., Source]:
        """(denoiser, generate) -> source, of a teacher and its students."""
        codec, embeddings = load_codec(teacher, device), load_embeddings(teacher, evaluation=True)
        rest = (
            codec,
            embeddings,
            (parts_sha256(teacher), embeddings and embeddings.record["sha256"]),
        )
        return lambda denoiser, generate: cls(generate, denoiser.image_shape, *rest)

    @property
    def pixels(self) -> int:
        """Bytes of an image."""
        if isinstance(self.codec, nn.Identity):
            return math.prod(self.shape)
        config = self.codec.vae.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        return config.out_channels * self.shape[1] * self.shape[2] * scale**2


@dataclass
class Clock:
    """`seconds` between two writes of one stage; `last`: when it began, or wrote."""

    seconds: float
    last: float = field(default_factory=time.monotonic)
    long: bool = False  # whether it has ever written

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.seconds


class Progress:
    """What has been seen of one stream of samples, kept on disk now and then, so that a stage that
    is interrupted goes on from there; short stages leave nothing.

    `count`: how many samples are kept. Every part's hash stands in `parts.json`, written last.
    """

    def __init__(self, folder: Path, clock: Clock):
        self.folder, self.clock, self.parts, self._blocks = folder, clock, [], 0
        self.told = time.monotonic()
        if processes().first:
            with contextlib.suppress(UserError):  # nothing is there yet
                self.parts = read_json(folder / "parts.json")
        self.count = int(processes().agree(sum(part["count"] for part in self.parts)))

    def tell(self, done: int, of: int) -> None:
        """Once a minute, how many samples have been seen."""
        if time.monotonic() - self.told >= 60:
            self.told = time.monotonic()
            print(f"  {done} of {of} samples", file=sys.stderr, flush=True)

    def again(self) -> Iterator[dict[str, Tensor]]:
        """What is kept, part by part."""
        for part in self.parts:
            yield load_tensors(self.folder / part["file"], part["sha256"], owner=self.folder)

    def keep(self, watch: Watch, last: bool = False) -> None:
        """After each block, and after the `last`: write what was seen since the last time, if that
        is long ago; of a stage that has become long, the end of each stream, too."""
        self._blocks += not last
        if not self._blocks or not (self.clock.due() or (last and self.clock.long)):
            return
        tensors, count = watch.last(self._blocks)
        file = f"part-{len(self.parts):05d}.safetensors"
        sha256 = save_tensors(self.folder / file, tensors)
        self.parts.append({"file": file, "sha256": sha256, "count": count})
        write_json(self.folder / "parts.json", self.parts)
        self.clock.last, self.clock.long, self._blocks = time.monotonic(), True, 0


class Closest:
    """Of the images that stream by, those that come nearest to a training image."""

    def __init__(self, reference: Reference, train: Images):
        self.reference, self.train = reference, train
        self.pixels, self.distance, self.neighbour = torch.empty(0), torch.empty(0), torch.empty(0)

    def add(self, pixels: Tensor, features: Tensor) -> None:
        distance, neighbour = (t.cpu() for t in nearest(features, self.reference.features))
        if len(self.pixels):
            pixels = torch.cat([self.pixels, pixels])
            distance = torch.cat([self.distance, distance])
            neighbour = torch.cat([self.neighbour, neighbour])
        best = distance.argsort(stable=True)[:CLOSEST]
        self.pixels, self.distance = pixels[best], distance[best]
        self.neighbour = neighbour[best]

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("pixels", "distance", "neighbour")}

    def tensors(self) -> dict[str, Tensor]:
        """`closest` images, nearest first, the `closest_training` images, and their distances:
        over the median of the held-out images', where there is one. Nothing if images are of
        another size than those."""
        if not len(self.pixels):
            return {}
        unit = self.reference.typical_nearest or 1.0
        index = self.reference.index[self.neighbour]
        return {
            "closest": self.pixels,
            "closest_training": self.train.pixels[index],
            "closest_distance": self.distance / unit,
        }


class Watch:
    """All that is looked at and kept of one stream of images: what the extractors see, the first
    `wanted` images themselves, and those that are `closest` to the training images.

    `closest`: that, and the extractor in whose features it looks.
    """

    def __init__(
        self, observer: FeatureAccumulator, wanted: int, closest: tuple[Closest, str] | None
    ):
        self.observer, self.wanted, self.closest = observer, wanted, closest
        self.counts: list[int] = []  # of images in each block
        self.pixels: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, pixels: Tensor, labels: Tensor | None) -> None:
        seen = self.observer.add(pixels, labels)
        if sum(self.counts) < self.wanted:
            self.pixels.append(pixels)
            self.labels += [labels] if labels is not None else []
        if self.closest and pixels.shape[1:] == self.closest[0].train.pixels.shape[1:]:
            closest, extractor = self.closest
            closest.add(pixels, seen[extractor]["features"])
        self.counts.append(len(pixels))

    def last(self, blocks: int) -> tuple[dict[str, Tensor], int]:
        """What the last so many blocks have added, and of how many images."""
        tensors, before = self.observer.last(blocks), len(self.counts) - blocks
        for name, parts in (("pixels", self.pixels), ("pixel_labels", self.labels)):
            if parts[before:]:
                tensors[name] = torch.cat(parts[before:])
        if self.closest:
            tensors |= {f"closest/{k}": t for k, t in self.closest[0].state().items()}
        return tensors, sum(self.counts[before:])

    def again(self, tensors: dict[str, Tensor], count: int) -> None:
        """Take up what `last` gave, as one block."""
        self.observer.again(tensors)
        self.counts.append(count)
        self.pixels += [tensors["pixels"]] if "pixels" in tensors else []
        self.labels += [tensors["pixel_labels"]] if "pixel_labels" in tensors else []
        if self.closest:
            prefix = "closest/"
            vars(self.closest[0]).update(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )

    def first(self, count: int) -> dict[str, Tensor]:
        """The first images and their labels."""
        if not self.pixels:
            return {}
        kept = {"pixels": torch.cat(self.pixels)[:count]}
        return kept | ({"labels": torch.cat(self.labels)[:count]} if self.labels else {})


class Scorer:
    """Scores streams of images against an experiment's reference: the training part."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.first = experiment, processes().first
        self.dataset: Dataset = datasets.load(experiment.data_dir())
        datasets.check_sizes(self.dataset, minimum_samples(experiment.evaluation.neighbours))
        self.extractors: list[FeatureExtractor] = [
            load_extractor(experiment.features_dir(name), self.dataset, experiment.device)
            for name in experiment.evaluation.extractors
            if self.first  # other processes help to make samples
        ]
        available = [e for e in self.extractors if not e.unavailable]
        self.statistics, self.statistics_sha256 = self._published_statistics()
        self._reference = {e.name: self._reference_of(e) for e in available}
        # The features in which the figure of nearest neighbours looks, if it can.
        self.pairs_in = available[0].name if available and len(self.dataset.train) else None
        self.clock = Clock(experiment.training.checkpoint_seconds)
        self.protocols: dict[str, dict] = {}
        self.dimensions: dict[str, int] = {}  # how many features each extractor gives

    def _published_statistics(self) -> tuple[tuple[Tensor, Tensor] | None, str | None]:
        """The mean and covariance that an FID compares with, where the experiment names a file of
        them, and the file's sha256."""
        evaluation = self.experiment.evaluation
        if evaluation.statistics is None:
            return None, None
        path = fetch(evaluation.statistics, evaluation.statistics_sha256)
        return load_statistics(path, inception.DIM), sha256_file(path)

    def _reference_of(self, extractor: FeatureExtractor) -> Reference:
        """What an extractor sees of the real images. It is the same for all generators, so the
        first job that scores keeps it beside the extractor, and the others read it."""
        given = extractor.name == self.experiment.statistics_extractor
        published = self.statistics if given else None
        if not len(self.dataset.train):
            return Reference(None, published)
        folder = self.experiment.features_dir(extractor.name)
        key = {
            "extractor": extractor.hashes,
            "type": extractor.settings.type,
            "resize": extractor.resize,
        }
        key |= {"data": self.dataset.sha256, "draw": PAIRWISE_LIMIT, "moments": published is None}
        key |= {"torch": torch.__version__, "device": self.experiment.device}
        path = folder / f"reference-{digest(key)}.safetensors"
        with run_lock(folder):
            record = path.with_suffix(".json")
            try:
                tensors = load_tensors(path, read_json(record)["sha256"])
            except UserError:  # not there yet, or damaged
                tensors = self._see_reference(extractor, moments=published is None)
                write_json(record, {"sha256": save_tensors(path, tensors)})
        own = (tensors["mean"], tensors["covariance"]) if "mean" in tensors else None
        return Reference(
            tensors["features"], published or own, tensors.get("held_out"), tensors["index"]
        )

    def _see_reference(self, extractor: FeatureExtractor, moments: bool) -> dict[str, Tensor]:
        """Features of the training part: of a large one those of a fixed draw, and with `moments`
        the mean and covariance of all, which are summed while it streams by; and of the held-out
        part, if there is one."""
        train, held, parts, sums = self.dataset.train, self.dataset.held_out, [], None
        everything = torch.arange(len(train))
        drawn = Stream(0, "reference").uniform(everything).argsort()[:PAIRWISE_LIMIT].sort().values
        for index in (everything if moments else drawn).split(256):
            features = extractor.extract(train.pixels[index], None)["features"]
            parts.append(features[torch.isin(index, drawn)])
            if moments and len(drawn) < len(train):
                sums = sums + Moments.of(features) if sums else Moments.of(features)
        tensors = {"features": torch.cat(parts), "index": drawn}
        if sums:
            tensors |= dict(zip(("mean", "covariance"), sums.statistics(), strict=True))
        if len(held):
            seen = [extractor.extract(pixels, None)["features"] for pixels, _ in held.blocks()]
            tensors["held_out"] = torch.cat(seen)
        return tensors

    def pairs_record(self) -> dict:
        """What the nearest neighbours of a figure are: in which features, among how many images, in
        which unit their distances are."""
        if self.pairs_in is None:
            return {}
        reference = self._reference[self.pairs_in]
        return {
            "pairs_in": self.pairs_in,
            "pairs_among": len(reference.features),
            "pairs_unit": "held-out median" if reference.typical_nearest else "features",
        }

    def _reference_record(self, metric: Metric, extractor: FeatureExtractor) -> dict:
        """What of a protocol says what the metric compares with."""
        published = extractor.name == self.experiment.statistics_extractor
        if published and "reference.statistics" in metric.needs:
            return {
                "reference": f"{self.dataset.name}-statistics",
                "reference_sha256": self.statistics_sha256,
            }
        train = len(self.dataset.train)
        record = {"reference": f"{self.dataset.name}-train{train}"}
        if metric.limit and train > metric.limit:
            record["reference_draw"] = f"{metric.limit} images, always the same"
        return record | {"reference_sha256": self.dataset.images_sha256}

    def counts(self) -> list[int]:
        """The main sample count, and the one at which the floor stands."""
        return list(dict.fromkeys([self.experiment.evaluation.num_samples, self.floor_count]))

    @property
    def floor_count(self) -> int:
        """The size of the held-out part, or the main sample count if that is smaller: the floor is
        then the mean over disjoint parts of it."""
        main, held_out = self.experiment.evaluation.num_samples, len(self.dataset.held_out)
        return min(main, held_out or main)

    def _protocol(self, metric: Metric, extractor: FeatureExtractor, count: int) -> str:
        """Register the record that identifies a number; returns its hash."""
        from importlib.metadata import version

        from harness import __version__

        evaluation, settings = self.experiment.evaluation, dict(metric.settings)
        prompts = self.dataset.evaluation_prompts
        library = f"harness {__version__}"
        if "inception" in extractor.provided:
            library += f", torch-fidelity {version('torch-fidelity')}"
        if metric.name in ("precision", "recall"):
            settings["k"] = evaluation.neighbours
        record = {
            "metric": metric.name,
            "settings": settings,
            "extractor": extractor.name,
            "extractor_sha256": extractor.hashes,
            "num_samples": count,
            "subsets": "all disjoint ones of this size, averaged",
            **self._reference_record(metric, extractor),
            **({"prompts_sha256": prompts.sha256} if prompts else {}),
            "quantisation": QUANTISATION,
            "resize": extractor.resize,
            **extractor.details,
            "sampling": "image i from (sampling seed, i), balanced labels; every seed by itself",
            "sampling_seeds": evaluation.sampling_seeds,
            "library": library,
        }
        name = digest(record)
        self.protocols[name] = record
        return name

    def score(
        self,
        blocks: Blocks,
        counts: list[int],
        against: Collection[str] = (),
        pretraining: Collection[str] = (),
        final: bool = True,
        kept: dict[str, Tensor] | None = None,
        wanted: int = 0,
        progress: Progress | None = None,
        each: dict[str, Tensor] | None = None,
    ) -> list[dict]:
        """Rows for the images in `blocks` (uint8 pixels, labels), at each of `counts`.

        `final`: whether they are a run's last, which get every metric. `against`: feature networks
        that the generator was trained on; `pretraining`: what such networks had been trained on.
        The rows of an extractor that is one of them, or shares that with one, are flagged.
        `kept`: gets the first `wanted` images and those that come nearest to the training images
        in the first extractor. `progress`: where it goes on from. `each`: gets what was measured
        of every single image.
        Other processes than the first make their share of the images, and have no rows.
        """
        if not self.first:
            for _ in blocks:
                pass
            return []
        available = [e for e in self.extractors if not e.unavailable]
        observer = FeatureAccumulator(available, self.dataset.attributes)
        closest = None
        if kept is not None and self.pairs_in:
            reference = self._reference[self.pairs_in]
            closest = Closest(reference, self.dataset.train), self.pairs_in
        watch = Watch(observer, wanted, closest)
        if progress:
            for tensors, part in zip(progress.again(), progress.parts, strict=True):
                watch.again(tensors, part["count"])
        for pixels, labels in blocks:
            if labels is None and self.labelled:  # as `Images` has them, of a set without classes
                labels = torch.zeros(len(pixels), dtype=torch.int64)
            watch.add(pixels, labels)
            if progress:
                progress.keep(watch)
                progress.tell(sum(watch.counts), max(counts))
        if progress:
            progress.keep(watch, last=True)
        if kept is not None:
            kept |= watch.first(wanted)
            kept |= closest[0].tensors() if closest else {}
        rows = []
        for extractor in self.extractors:
            views = None
            if not extractor.unavailable:
                views = observer.feature_set(
                    extractor.name,
                    self._reference[extractor.name],
                    self.experiment.evaluation.neighbours,
                )
                if each is not None:
                    each |= {f"{extractor.name}/{k}": t for k, t in views.per_image().items()}
                    each["prompt"] = views.labels
            flag = ""
            if {extractor.name, extractor.alias} & set(against):
                flag = "trained-on-extractor"
            elif set(extractor.pretraining) & set(pretraining):
                flag = "shares-pretraining"
            if views is not None and extractor.name not in self.dimensions:
                dim = self.dimensions[extractor.name] = views.features.shape[1]
                floor = self.floor_count if len(self.dataset.held_out) else None
                for count in (count for count in counts if count <= dim):
                    told = small_sample_warning(extractor.name, dim, count, floor)
                    print(f"warning: {told}", file=sys.stderr)
            for metric, count in self._measurements(extractor, views, counts, final):
                value = stderr = None
                left: tuple[float, ...] = ()
                lacking = extractor.unavailable or next(
                    filter(None, map(extractor.missing.get, metric.requires)), None
                )
                if lacking is None:
                    parts = views.subsets(count)
                    value, stderr, left = mean_over_subsets([metric.estimate(p) for p in parts])
                row = {
                    "metric": metric.name,
                    "extractor": extractor.name,
                    "num_samples": count,
                    "value": value,
                    "stderr": stderr,
                    "leave_out": left,
                    "protocol": self._protocol(metric, extractor, count),
                    "flag": flag,
                }
                if value is None:
                    row["status"] = f"unavailable ({lacking})"
                rows.append(row)
        return rows

    def _measurements(
        self, extractor: FeatureExtractor, views: FeatureSet | None, counts: list[int], final: bool
    ) -> list[tuple[Metric, int]]:
        """Each metric that applies to an extractor, with the sample counts it is computed at.
        `views` None: the extractor is unavailable, and its metrics are those that would apply."""

        def applies(metric: Metric) -> bool:
            if not metric.applies_to(extractor.provided) or (metric.final_only and not final):
                return False
            if views is None:
                there = {
                    "reference.features": len(self.dataset.train) > 0,
                    "reference.held_out": len(self.dataset.held_out) > 0,
                }
                return all(there.get(need, True) for need in metric.needs)
            return all(need in extractor.missing or views.has(need) for need in metric.needs)

        names = [name for name in METRICS if applies(METRICS[name])]
        wanted = dict.fromkeys((name, METRICS[name].count(n)) for n in counts for name in names)
        dim = 0 if views is None else views.features.shape[1]
        return [
            (METRICS[name], n) for name, n in wanted if n >= METRICS[name].samples_per_dim * dim
        ]

    def generated(self, source: Source, seed: int, start: int = 0) -> Blocks:
        """Quantised samples for one sampling seed, from number `start`, on the host, as the
        protocol says."""
        count, evaluation = max(self.counts()), self.experiment.evaluation
        return sample(
            pixels_of(source.generate, source.codec),
            count,
            source.shape,
            self.dataset.num_evaluated,
            seed,
            self.experiment.device,
            source.embeddings,
            evaluation.block,
            start,
        )

    def progress(self, path: Path, source: Source, *what: object) -> Progress:
        """Where samples go on from; `what` decides them beside the source, and what is kept of
        them. `path`: of the score file."""
        key = [*source.made_of, *what, self.experiment.evaluation.block, self.dataset.sha256]
        key += [torch.__version__, self.experiment.device]
        key += [[e.name, e.hashes, e.settings.type, e.resize, e.details] for e in self.extractors]
        folder = path.with_suffix(".parts") / digest(key)
        return Progress(folder, self.clock)

    @property
    def labelled(self) -> bool:
        """Whether the labels of real images say what samples are asked for."""
        data = self.dataset
        if data.prompts is None:
            return True
        return self.experiment.data.labels and data.prompts is data.evaluation_prompts


def _finish(
    path: Path,
    record: dict,
    scorer: Scorer,
    kept: dict[str, Tensor],
    each: dict[int, dict[str, Tensor]] | None = None,
) -> None:
    """The samples for figures first, the declared file last: it names their hash. `each`: what was
    measured of every image of a sampling seed."""
    if not scorer.first:
        return
    if any((each or {}).values()):  # else there was no network to see them
        file = path.with_suffix(EACH)
        record["each"] = {"file": file.name, "sha256": write_each(file, each)}
    file = path.with_suffix(".samples.safetensors")
    record["samples"] = {"file": file.name, "sha256": save_tensors(file, kept)}
    record["samples"] |= scorer.pairs_record()
    record |= {"protocols": scorer.protocols, "dimensions": scorer.dimensions}
    write_json(path, {"schema": SCORES_FORMAT, **record})
    shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)


EACH = ".prompts.csv"


def write_each(path: Path, each: dict[int, dict[str, Tensor]]) -> str:
    """One row for each image; returns the file's sha256. Columns: sampling seed, number, prompt
    (line of the evaluation's prompts, from 0) and what was measured. Image i of a sampling seed has
    one noise and one prompt, whichever student made it."""
    import pandas as pd

    tables = []
    for seed, columns in each.items():
        table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        table.insert(0, "prompt", table.pop("prompt"))
        table.insert(0, "image", range(len(table)))
        table.insert(0, "sample_seed", seed)
        tables.append(table)
    write_text(path, pd.concat(tables).to_csv(index=False, float_format="%.6g"))
    return sha256_file(path)


def score_run(experiment: Experiment, student: str, seed: int) -> None:
    """Score every snapshot of a run; write `scores/<student>/seed<k>.json`."""
    run_dir = experiment.run_dir(student, seed)
    run = read_json(run_dir / "student.json")
    scorer = Scorer(experiment)
    device, entries, kept = experiment.device, [], {}
    source_of = Source.of(experiment.teacher_dir(run["teacher"]), device)
    path, shown = experiment.score_path(student, seed), experiment.evaluation.grid_samples
    each: dict[int, dict[str, Tensor]] = {}
    for snapshot in run["snapshots"]:
        folder = run_dir / "snapshots" / snapshot["name"]
        denoiser = load_denoiser(folder, snapshot["sha256"], device, owner=run_dir)
        sigma_init = denoiser_record(folder)["sigma_init"]
        source = source_of(denoiser, one_step_generator(denoiser, sigma_init))
        final, rows = snapshot is run["snapshots"][-1], []
        for sampling_seed in experiment.evaluation.seeds_of_snapshot(final):
            wanted = shown if final and not kept else 0
            texts = final and scorer.dataset.prompts is not None
            progress = scorer.progress(path, source, snapshot["sha256"], sampling_seed, wanted)
            scored = scorer.score(
                scorer.generated(source, sampling_seed, progress.count),
                scorer.counts(),
                run["trained_against"],
                run["pretraining"],
                final=final,
                kept=kept if wanted else None,
                wanted=wanted,
                progress=progress,
                each=each.setdefault(sampling_seed, {}) if texts else None,
            )
            rows += [{"sample_seed": sampling_seed} | row for row in scored]
        entries.append(
            {
                "snapshot": snapshot["name"],
                "final": final,
                "grid": snapshot["grid"],
                "sha256": snapshot["sha256"],
                "nfe": 1,
                "ema": snapshot["ema_half_life"],
                "images": snapshot["ledger"]["images"],
                "flops": snapshot["ledger"]["flops"],
                "seconds": snapshot["ledger"]["seconds"],
                "rows": rows,
            }
        )
        print(f"{student}/seed{seed}: scored {snapshot['name']}", file=sys.stderr, flush=True)
    record = {"student": student, "method": run["method"], "seed": seed, "weights": run["sha256"]}
    record["spec"] = digest(experiment.score_spec())
    record |= {"contended": run["contended"], "entries": entries}
    _finish(path, record, scorer, kept, each)


def score_references(experiment: Experiment, teacher: str) -> None:
    """Score a teacher with its sampler and with one step, and the floor: real held-out images, if
    any are held out."""
    folder = experiment.teacher_dir(teacher)
    sampler = experiment.teachers[teacher].sampler
    scorer, device, kept = Scorer(experiment), experiment.device, {}
    record = read_json(folder / "teacher.json")
    denoiser = load_denoiser(folder, record["sha256"], device)
    source_of, path = Source.of(folder, device), experiment.reference_score_path(teacher)
    many = heun_generator(denoiser, sampler.settings())
    one = one_step_generator(denoiser, sampler.sigma_max)
    evaluation, held_out = experiment.evaluation, scorer.dataset.held_out
    whole: dict[str, Tensor] = {}  # of the first sampling seed's, for other libraries
    common = {"snapshot": "", "final": True, "grid": [], "sha256": record["sha256"]}
    # Nothing is known of how an imported teacher was trained.
    common |= {"ema": getattr(experiment.teachers[teacher], "ema_half_life", None)}
    common |= {key: record.get("ledger", {}).get(key) for key in ("images", "flops", "seconds")}
    nothing = dict.fromkeys(("ema", "images", "flops", "seconds", "sha256"))
    entries, each = [], {}

    def add(name: str, nfe: int | None, rows: list[dict]) -> None:
        entry = common | {"student": name, "nfe": nfe, "rows": rows}
        entries.append(entry | (nothing if name == "floor" else {}))
        print(f"{teacher}: scored {name}", file=sys.stderr, flush=True)

    for name, nfe, generate in (
        ("teacher", sampler.nfe, many),
        ("teacher-1step", 1, one),
    ):
        rows = []
        for seed in evaluation.sampling_seeds:
            source = source_of(denoiser, generate)
            others = min(evaluation.num_samples, KEPT, KEPT_BYTES // source.pixels)
            wanted = 0 if kept else max(others, evaluation.grid_samples)
            settings = sampler.settings() if name == "teacher" else sampler.sigma_max
            progress = scorer.progress(path, source, record["sha256"], settings, seed, wanted)
            scored = scorer.score(
                scorer.generated(source, seed, progress.count),
                scorer.counts(),
                kept=kept if wanted else None,
                wanted=wanted,
                progress=progress,
                each=each.setdefault(seed, {})
                if name == "teacher" and scorer.dataset.prompts
                else None,
            )
            if wanted and scorer.first:
                whole = {key: kept[key][:others] for key in ("pixels", "labels")}
                kept |= {key: kept[key][: evaluation.grid_samples] for key in whole}
            rows += [{"sample_seed": seed} | row for row in scored]
        add(name, nfe, rows)
    if len(held_out):
        pairs: dict[str, Tensor] = {}
        blocks = ((pixels, y if scorer.labelled else None) for pixels, y in held_out.blocks())
        rows = scorer.score(blocks, [scorer.floor_count], kept=pairs)
        kept |= {f"floor_{name}": tensor for name, tensor in pairs.items()}
        add("floor", None, [{"sample_seed": None} | row for row in rows])
    if not scorer.first:
        return
    file = path.with_suffix(".kept.safetensors")
    _finish(
        path,
        {
            "kept": {"file": file.name, "sha256": save_tensors(file, whole)},
            "teacher": teacher,
            "method": None,
            "seed": None,
            "weights": record["sha256"],
            "spec": digest(experiment.reference_score_spec(teacher)),
            "entries": entries,
        },
        scorer,
        kept,
        each,
    )
