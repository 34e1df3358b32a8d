"""Score streams of images against an experiment's reference, the training part."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.jobs import Scoring
from harness.data import datasets
from harness.evaluation.checks import minimum_samples, small_sample_warning
from harness.evaluation.feature_set import Estimate, FeatureSet, mean_over_subsets
from harness.evaluation.protocol import protocol
from harness.evaluation.references import Reference, load_reference, published_statistics
from harness.evaluation.registry import METRICS, Metric
from harness.evaluation.sample_stream import (
    Checkpoints,
    FeatureAccumulator,
    NearestImages,
    SampleSource,
    SampleStream,
)
from harness.features.base import FeatureExtractor, load_extractor
from harness.io.artifacts import digest
from harness.io.records import ScoreRow
from harness.sampling import pixels_of, sample
from harness.training.distributed import processes

logger = logging.getLogger(__name__)


@dataclass
class Scores:
    """The result for one stream of images.

    images: the first images (`pixels`, `labels`) and those nearest to training images. per_image:
    "<extractor>/<output>" `(N,)` of the scalar outputs, and the `prompt` of each image.
    """

    rows: list[ScoreRow] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)


class Scorer:
    """Computes all metrics in the features of all extractors.

    protocols: digest -> protocol, and dimensions: extractor -> number of features, of everything
    that was scored. With several processes, all must make the same calls: they share the generation
    of samples, and the first one computes the scores.
    """

    def __init__(self, scoring: Scoring):
        self.scoring, self.first = scoring, processes().first
        self.dataset = datasets.load(scoring.data)
        datasets.check_sizes(self.dataset, minimum_samples(scoring.evaluation.neighbours))
        self.published = published_statistics(scoring)
        self.extractors: list[FeatureExtractor] = []
        self.references: dict[str, Reference] = {}  # of the available extractors
        for name, (_, folder) in scoring.extractors.items() if self.first else ():
            extractor = load_extractor(folder, self.dataset, scoring.device)
            self.extractors.append(extractor)
            if not extractor.unavailable:
                given = self.published and name == self.published.extractor
                statistics = self.published.statistics if given else None
                self.references[name] = load_reference(
                    extractor, self.dataset, folder, scoring.device, statistics
                )
        # The features in which the figure of nearest neighbours searches.
        self.nearest_in = next(iter(self.references), None) if len(self.dataset.train) else None
        self.checkpoints = Checkpoints(scoring.checkpoint_seconds)
        self.protocols: dict[str, dict] = {}
        self.dimensions: dict[str, int] = {}

    @property
    def labels_known(self) -> bool:
        """Whether the labels of real images are those that samples are requested with."""
        data = self.dataset
        if data.prompts is None:
            return True
        return self.scoring.data_section.labels and data.prompts is data.evaluation_prompts

    @property
    def floor_count(self) -> int:
        """Samples of the floor: the held-out images, at most the main sample count; of a larger
        held-out part the floor is the mean over disjoint subsets."""
        main, held_out = self.scoring.evaluation.num_samples, len(self.dataset.held_out)
        return min(main, held_out or main)

    @property
    def counts(self) -> list[int]:
        """Sample counts to score at: the main one and the floor's."""
        return list(dict.fromkeys([self.scoring.evaluation.num_samples, self.floor_count]))

    def score_samples(
        self, source: SampleSource, seed: int, folder: Path, *identity: object, keep: int, **options
    ) -> Scores:
        """Score the samples of one sampling seed. `folder`: for unfinished work; `identity`: what
        decides the samples besides the source and the seed; `options`: see `score`."""
        block, device = self.scoring.evaluation.block, self.scoring.device
        key = [*source.hashes, *identity, keep, seed, block, self.dataset.sha256]
        key += [torch.__version__, device]
        for e in self.extractors:
            key.append([e.name, e.hashes, e.settings.model_dump(), e.resize, e.details])
        count, folder = max(self.counts), folder / digest(key)
        blocks = partial(
            sample,
            pixels_of(source.generate, source.codec),
            count,
            source.shape,
            self.dataset.num_evaluated,
            seed,
            device,
            source.embeddings,
            block,
            group=processes(),
        )
        stream = SampleStream(blocks, count, folder, self.checkpoints)
        return self.score(stream, seed=seed, keep=keep, nearest=keep > 0, **options)

    def score(
        self,
        blocks: Iterable[tuple[Tensor, Tensor | None]],
        counts: list[int] | None = None,
        *,
        seed: int | None = None,
        final: bool = True,
        trained_against: Collection[str] = (),
        pretraining: Collection[str] = (),
        keep: int = 0,
        nearest: bool = False,
        per_image: bool = False,
    ) -> Scores:
        """Score a `SampleStream`, or uint8 images with labels `(B,)`, at each of `counts`.

        seed: the sampling seed, for the rows. final: whether they are of the last snapshot, which
        gets every metric. trained_against: feature networks in the generator's losses, and
        pretraining: the data sets of their training; rows of such extractors are flagged. keep: how
        many images to return. nearest: also return those nearest to training images. per_image:
        also return the values of each image.
        """
        if not self.first:
            for _ in blocks:
                pass
            return Scores()
        search = None
        if nearest and self.nearest_in is not None:
            reference = self.references[self.nearest_in]
            search = NearestImages(self.nearest_in, reference, self.dataset.train)
        available = [extractor for extractor in self.extractors if not extractor.unavailable]
        stream = blocks if isinstance(blocks, SampleStream) else None
        accumulator = FeatureAccumulator(available, self.dataset.attributes, keep, search, stream)
        for pixels, labels in blocks:
            if labels is None and self.labels_known:  # as `Images` has them without classes
                labels = torch.zeros(len(pixels), dtype=torch.int64)
            accumulator.add(pixels, labels)
        accumulator.save(ended=True)
        result, counts = Scores(images=accumulator.images()), counts or self.counts
        for extractor in self.extractors:
            name, features = extractor.name, None
            if not extractor.unavailable:
                neighbours = self.scoring.evaluation.neighbours
                features = accumulator.feature_set(name, self.references[name], neighbours)
                self._check_dimension(name, features.features.shape[1], counts)
                if per_image:
                    values = features.per_image()
                    result.per_image |= {f"{name}/{key}": t for key, t in values.items()}
                    result.per_image["prompt"] = features.labels
            flag = ""
            if {name, extractor.alias} & set(trained_against):
                flag = "trained-on-extractor"
            elif set(extractor.pretraining) & set(pretraining):
                flag = "shares-pretraining"
            for metric, count in self._measurements(extractor, features, counts, final):
                row = self._row(metric, extractor, features, count, sample_seed=seed, flag=flag)
                result.rows.append(row)
        return result

    def _check_dimension(self, name: str, dim: int, counts: list[int]) -> None:
        """Record an extractor's number of features, and warn once of too few samples."""
        floor = self.floor_count if len(self.dataset.held_out) else None
        for count in counts:
            if count <= dim and name not in self.dimensions:
                logger.warning(small_sample_warning(name, dim, count, floor))
        self.dimensions[name] = dim

    def _measurements(
        self,
        extractor: FeatureExtractor,
        features: FeatureSet | None,
        counts: list[int],
        final: bool,
    ) -> list[tuple[Metric, int]]:
        """Each metric that applies to an extractor, with each of its sample counts. For an
        unavailable extractor (no features) these are the metrics that would apply."""
        images = {
            "reference.features": self.dataset.train,
            "reference.held_out": self.dataset.held_out,
        }

        def has(need: str) -> bool:
            if features is None:
                return need not in images or len(images[need]) > 0
            return need in extractor.missing or features.has(need)

        metrics = [
            metric
            for metric in map(METRICS.__getitem__, METRICS)
            if metric.applies_to(extractor.provided)
            and (final or not metric.final_only)
            and all(map(has, metric.needs))
        ]
        dim = 0 if features is None else features.features.shape[1]
        pairs = dict.fromkeys((m.name, m.count(n)) for n in counts for m in metrics)
        return [(METRICS[name], n) for name, n in pairs if n >= METRICS[name].samples_per_dim * dim]

    def _row(
        self,
        metric: Metric,
        extractor: FeatureExtractor,
        features: FeatureSet | None,
        count: int,
        **facts: Any,
    ) -> ScoreRow:
        """The number of a metric, or a row with a `status` if a network is unavailable."""
        reasons = [extractor.unavailable, *map(extractor.missing.get, metric.requires)]
        unavailable = next(filter(None, reasons), None)
        value = Estimate(None, None)
        if unavailable is None:
            value = mean_over_subsets(list(map(metric.estimate, features.subsets(count))))
        record = protocol(metric, extractor, count, self.dataset, self.scoring, self.published)
        key = digest(record)
        self.protocols[key] = record
        return ScoreRow(
            metric=metric.name,
            extractor=extractor.name,
            num_samples=count,
            **value._asdict(),
            protocol=key,
            status=f"unavailable ({unavailable})" if unavailable else None,
            **facts,
        )
