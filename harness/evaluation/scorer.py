"""Score images against an experiment's reference, the training part."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.config.jobs import Scoring
from harness.data import datasets
from harness.evaluation.accumulator import Checkpoints, FeatureAccumulator, NearestImages
from harness.evaluation.checks import minimum_samples, small_sample_warning
from harness.evaluation.feature_set import Estimate, FeatureSet, mean_over_subsets
from harness.evaluation.protocol import protocol
from harness.evaluation.references import Reference, load_reference, published_statistics
from harness.evaluation.registry import METRICS
from harness.features.base import FeatureExtractor, load_extractor
from harness.io.artifacts import digest
from harness.io.records import ScoreRow
from harness.io.shards import TensorShards
from harness.training.distributed import processes

logger = logging.getLogger(__name__)


@dataclass
class Scores:
    """The result for one stream of images.

    images: the first images (`pixels`, `labels`) and those nearest to training images. per_image:
    the `prompt` of each image, and "<extractor>/<output>" `(N,)` of the scalar outputs.
    """

    rows: list[ScoreRow] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)


class Scorer:
    """Computes all metrics in the features of all extractors.

    labels_known: whether the labels of real images are those that samples are requested with.
    floor_count: samples of the floor: the held-out images, at most the main sample count; of a
    larger held-out part the floor is the mean over disjoint subsets. counts: sample counts to score
    at: the main one and the floor's. protocols: digest -> protocol, and dimensions: extractor ->
    number of features, of everything that was scored. With several processes, all must make the
    same calls: they share the generation of samples, and the first one computes the scores.
    """

    def __init__(self, scoring: Scoring):
        self.scoring, self.first = scoring, processes().first
        self.dataset = data = datasets.load(scoring.data)
        datasets.check_sizes(data, minimum_samples(scoring.evaluation.neighbours))
        self.labels_known = data.prompts is None or (
            scoring.data_section.labels and data.prompts is data.evaluation_prompts
        )
        main, held_out = scoring.evaluation.num_samples, len(data.held_out)
        self.floor_count = min(main, held_out or main)
        self.counts = list(dict.fromkeys([main, self.floor_count]))
        self.published = published_statistics(scoring)
        self.extractors: list[FeatureExtractor] = []
        self.references: dict[str, Reference] = {}  # of the available extractors
        for name, (_, folder) in scoring.extractors.items() if self.first else ():
            extractor = load_extractor(folder, data, scoring.device)
            self.extractors.append(extractor)
            if not extractor.unavailable:
                given = self.published[name].statistics if name in self.published else None
                self.references[name] = load_reference(
                    extractor, data, folder, scoring.device, given
                )
        # The features in which the figure of nearest neighbours searches.
        self.nearest_in = next(iter(self.references), None) if len(data.train) else None
        self.checkpoints = Checkpoints(scoring.checkpoint_seconds)
        self.protocols: dict[str, dict] = {}
        self.dimensions: dict[str, int] = {}

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
        shards: TensorShards | None = None,
    ) -> Scores:
        """Score blocks of uint8 images with labels `(B,)`, at each of `counts`.

        seed: the sampling seed, for the rows. final: whether they are of the last snapshot, which
        gets every metric. trained_against: feature networks in the generator's losses, and
        pretraining: the data sets of their training; rows of such extractors are flagged. keep: how
        many images to return. nearest: also return those nearest to training images. per_image:
        also return the values of each image. shards: unfinished work, to which `blocks` add.
        """
        if not self.first:
            for _ in blocks:
                pass
            return Scores()
        counts, search, logged = counts or self.counts, None, time.monotonic()
        if nearest and self.nearest_in is not None:
            reference = self.references[self.nearest_in]
            search = NearestImages(self.nearest_in, reference, self.dataset.train)
        accumulator = FeatureAccumulator(
            [extractor for extractor in self.extractors if not extractor.unavailable],
            self.dataset.attributes,
            keep,
            search,
            shards,
            self.checkpoints,
        )
        for pixels, labels in blocks:
            if labels is None and self.labels_known:  # as `Images` has them without classes
                labels = torch.zeros(len(pixels), dtype=torch.int64)
            accumulator.add(pixels, labels)
            if shards is not None and time.monotonic() - logged >= 60:
                logged = time.monotonic()
                logger.info("%d of %d samples", accumulator.count, max(counts))
        accumulator.save(ended=True)
        result = Scores(images=accumulator.images())
        for extractor in self.extractors:
            name, features = extractor.name, None
            if not extractor.unavailable:
                neighbours = self.scoring.evaluation.neighbours
                features = accumulator.feature_set(name, self.references[name], neighbours)
                if per_image:
                    values = features.per_image()
                    result.per_image["prompt"] = features.labels
                    result.per_image |= {f"{name}/{key}": t for key, t in values.items()}
            flag = ""
            if {name, extractor.alias} & set(trained_against):
                flag = "trained-on-extractor"
            elif set(extractor.pretraining) & set(pretraining):
                flag = "shares-pretraining"
            facts = {"sample_seed": seed, "flag": flag}
            result.rows += self._rows(extractor, features, counts, final, **facts)
        return result

    def _rows(
        self,
        extractor: FeatureExtractor,
        features: FeatureSet | None,
        counts: list[int],
        final: bool,
        **facts: Any,
    ) -> Iterator[ScoreRow]:
        """The number of each metric that applies to an extractor, at each of its sample counts, or
        a `status` if a network is unavailable (without features: for metrics that would apply)."""
        data, dim = self.dataset, 0 if features is None else features.features.shape[1]
        if features is not None and extractor.name not in self.dimensions:
            floor = self.floor_count if len(data.held_out) else None
            for few in (count for count in counts if count <= dim):
                logger.warning(small_sample_warning(extractor.name, dim, few, floor))
            self.dimensions[extractor.name] = dim
        parts = {"reference.features": data.train, "reference.held_out": data.held_out}

        def has(need: str) -> bool:
            if features is None:
                return need not in parts or len(parts[need]) > 0
            return need in extractor.missing or features.has(need)

        metrics = [
            metric
            for metric in map(METRICS.__getitem__, METRICS)
            if metric.applies_to(extractor.provided)
            and (final or not metric.final_only)
            and all(map(has, metric.needs))
        ]
        for name, count in dict.fromkeys((m.name, m.count(n)) for n in counts for m in metrics):
            metric, value = METRICS[name], Estimate(None, None)
            if count < metric.samples_per_dim * dim:
                continue
            reasons = [extractor.unavailable, *map(extractor.missing.get, metric.requires)]
            unavailable = next(filter(None, reasons), None)
            if unavailable is None:
                value = mean_over_subsets(list(map(metric.estimate, features.subsets(count))))
            published = self.published.get(extractor.name)
            record = protocol(metric, extractor, count, data, self.scoring, published)
            key = digest(record)
            self.protocols[key] = record
            yield ScoreRow(
                metric=name,
                extractor=extractor.name,
                num_samples=count,
                **value._asdict(),
                protocol=key,
                status=f"unavailable ({unavailable})" if unavailable else None,
                **facts,
            )
