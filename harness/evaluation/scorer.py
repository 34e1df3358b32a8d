"""Score images against an experiment's reference, the training part."""

import logging
import math
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from harness import __version__
from harness.config.jobs import Scoring
from harness.config.schema import EvaluationSection
from harness.data import datasets
from harness.errors import UserError
from harness.evaluation.accumulator import (
    Checkpoints,
    FeatureAccumulator,
    NearestImages,
    StartedBlock,
)
from harness.evaluation.checks import check_pixels, minimum_samples, small_sample_warning
from harness.evaluation.feature_set import FeatureSet, mean_over_subsets
from harness.evaluation.references import Reference, load_reference, published_statistics
from harness.evaluation.registry import METRICS, Metric, defined_for
from harness.evaluation.selection import Criterion
from harness.features.base import FEATURES, FeatureExtractor, load_extractor
from harness.features.pixels import PerImage, PixelExtractor
from harness.io.artifacts import digest
from harness.io.records import ScoreRow
from harness.io.shards import TensorShards
from harness.training.distributed import processes
from harness.transfers import ahead

logger = logging.getLogger(__name__)


@dataclass
class Scores:
    """The result for one stream of images; `images`: see `FeatureAccumulator.images`; `per_image`:
    columns `sample_seed`, `image` (its number), `prompt` and "<extractor>/<output>" of a table."""

    rows: list[ScoreRow] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Any] = field(default_factory=dict)


def sampling_precision(evaluation: EvaluationSection) -> str:
    """The precision of the generating networks in words; empty for float32."""
    tf32 = "float32, with TensorFloat-32 on GPUs" if evaluation.tf32 else "float32"
    if evaluation.precision == "bf16":
        return f"bfloat16 where autocast allows it, else {tf32}"
    return tf32 if evaluation.tf32 else ""


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
        self.published, statistics, self.published_sha256 = published_statistics(scoring)
        self.extractors: list[FeatureExtractor] = []
        self.references: dict[str, Reference] = {}  # of the available extractors
        for name, (_, folder) in scoring.extractors.items() if self.first else ():
            extractor = load_extractor(folder, data, scoring.device)
            self.extractors.append(extractor)
            if not extractor.unavailable:
                given = statistics if name == self.published else None
                self.references[name] = load_reference(scoring, extractor, data, given)
        # The features in which the figure of nearest neighbours searches.
        compared = (name for name, known in self.references.items() if known.features is not None)
        self.nearest_in = next(compared, None) if len(data.train) else None
        self.checkpoints = Checkpoints(scoring.checkpoint_seconds)
        self.protocols: dict[str, dict] = {}
        self.dimensions: dict[str, int] = {}

        wanted = [metric for e in self.extractors for metric in self.metrics(e.provided)]
        size = scoring.evaluation.num_samples * math.prod(data.image_shape)
        for metric in wanted:
            check_pixels(metric, size)

    def metrics(
        self, provided: Collection[str], final: bool = True, only: Criterion | None = None
    ) -> list[Metric]:
        """The selected metrics of an extractor that provides these outputs, see `score`."""
        found = defined_for([provided], self.scoring.evaluation.metrics)
        found = [metric for metric in found if final or not metric.final_only]
        return [metric for metric in found if only is None or metric is only.metric]

    def per_image_metrics(self, final: bool) -> dict[str, str | None]:
        """The metrics of single images that `score` computes, with the hashes of their plug-ins."""
        found = [metric for e in self.extractors for metric in self.metrics(e.provided, final)]
        pixels = [metric.name for metric in found if metric.per_image or metric.stores_pixels]
        return {name: METRICS.plugin_sha256(name) for name in sorted(pixels)}

    def check_available(self, chosen: Criterion) -> None:
        """Raise a `UserError` (code "unavailable") if a criterion can have no number, as far as
        this is known without samples."""
        extractor = next(e for e in self.extractors if e.name == chosen.extractor)
        metric, reason = chosen.metric, None
        missing = [extractor.unavailable, *map(extractor.missing.get, metric.requires)]
        if lacks := next(filter(None, missing), None):
            reason = f"is unavailable ({lacks}); provide its weights"
        else:
            reference = self.references[extractor.name]
            parts = [need.split(".")[1] for need in metric.needs if need.startswith("reference.")]
            if any(getattr(reference, part) is None for part in parts):
                reason = "has no real images or statistics to compare with"
            elif metric.samples_per_dim:
                known = reference.features is not None
                dim = reference.features.shape[1] if known else len(reference.statistics[0])
                if (least := metric.samples_per_dim * dim) > chosen.num_samples:
                    reason = f"needs {least:,} samples; raise num_samples"
        if reason is not None:
            what = f"selects by {metric.name} in {chosen.extractor}, which {reason}"
            remedy = "choose another evaluation.main_metric, or remove the key"
            raise UserError(f"evaluation.selection_seed {what}; {remedy}", "unavailable")

    def score(
        self,
        blocks: Iterable[tuple[Tensor, Tensor | None]],
        counts: list[int] | None = None,
        *,
        seed: int | None = None,
        final: bool = True,
        trained_against: Collection[str] = (),
        pretraining: Collection[str] = (),
        keep: int | None = None,
        per_image: bool = False,
        shards: TensorShards | None = None,
        only: Criterion | None = None,
    ) -> Scores:
        """Score blocks of uint8 images with labels `(B,)`, at each of `counts`.

        seed: the sampling seed, for the rows. final: whether they are of the last or the selected
        snapshot, which get every metric. trained_against: feature networks in the generator's
        losses, and pretraining: the data sets of their training; rows of such extractors are
        flagged. keep: how many images to return, and those nearest to training images; None: no
        images. per_image: also return the values of each image. shards: unfinished work, to which
        `blocks` add. only: the only row to compute.
        """
        if not self.first:
            deque(blocks, maxlen=0)
            return Scores()
        counts, search, logged = counts or self.counts, None, time.monotonic()
        extractors = [e for e in self.extractors if only is None or e.name == only.extractor]
        if keep is not None and self.nearest_in is not None:
            inputs = self.references[self.nearest_in], self.dataset.train, self.scoring.device
            search = NearestImages(self.nearest_in, *inputs)
        available = [extractor for extractor in extractors if not extractor.unavailable]
        for extractor in available:
            if isinstance(extractor, PixelExtractor):
                metrics = self.metrics(extractor.provided, final, only)
                extractor.stores_pixels = any(metric.stores_pixels for metric in metrics)
                extractor.functions = {
                    m.name: PerImage(m.per_image, METRICS.plugin(m.name), "texts" in m.requires)
                    for m in metrics
                    if m.per_image
                }
        options = keep or 0, search, shards, self.checkpoints
        accumulator = FeatureAccumulator(available, self.dataset.attributes, *options)

        def start(block: tuple[Tensor, Tensor | None]) -> StartedBlock:
            pixels, labels = block
            if labels is None and self.labels_known:  # as `Images` has them without classes
                labels = torch.zeros(len(pixels), dtype=torch.int64)
            return accumulator.start(pixels, labels)

        for block in ahead(start, blocks, self.scoring.device):
            accumulator.complete(block)
            if shards is not None and time.monotonic() - logged >= 60:
                logged = time.monotonic()
                logger.info("%d of %d samples", accumulator.count, max(counts))
        accumulator.save(ended=True)
        result = Scores(images=accumulator.images())
        for extractor in extractors:
            name, features = extractor.name, None
            if extractor in available:
                neighbours = self.scoring.evaluation.neighbours
                features = accumulator.feature_set(name, self.references[name], neighbours)
                if per_image:
                    facts = {"sample_seed": seed, "image": range(accumulator.count)}
                    result.per_image |= facts | {"prompt": features.labels.numpy()}
                    values = features.per_image().items()
                    result.per_image |= {f"{name}/{key}": t.numpy() for key, t in values}
            flag = "shares-pretraining" if set(extractor.pretraining) & set(pretraining) else ""
            if {name, extractor.alias} & set(trained_against):
                flag = "trained-on-extractor"
            for row in self._rows(extractor, features, counts, final, only):
                result.rows.append(ScoreRow(**row, sample_seed=seed, flag=flag))
        return result

    def _rows(
        self,
        extractor: FeatureExtractor,
        features: FeatureSet | None,
        counts: list,
        final: bool,
        only: Criterion | None,
    ) -> Iterator[dict[str, Any]]:
        """The number of each metric that applies to an extractor, at each of its sample counts, or
        a `status` if a network is unavailable (without features: for metrics that would apply)."""
        data, name, dim = self.dataset, extractor.name, 0
        if features is not None and "features" in features.outputs:
            dim = features.features.shape[1]
            floor = self.floor_count if len(data.held_out) else None
            for few in counts if name not in self.dimensions else ():
                if few <= dim:
                    logger.warning(small_sample_warning(name, dim, few, floor))
            self.dimensions[name] = dim
        parts = {"reference.features": data.train, "reference.held_out": data.held_out}

        def has(need: str) -> bool:
            if features is None:
                return need not in parts or len(parts[need]) > 0
            return need in extractor.missing or features.has(need)

        metrics = self.metrics(extractor.provided, final, only)
        metrics = [metric for metric in metrics if all(map(has, metric.needs))]
        if only is not None:
            counts = [only.num_samples]
        for metric, count in dict.fromkeys((m, m.count(n)) for n in counts for m in metrics):
            if count < metric.samples_per_dim * dim:
                continue
            reasons = [extractor.unavailable, *map(extractor.missing.get, metric.requires)]
            if unavailable := next(filter(None, reasons), None):
                result = {"status": f"unavailable ({unavailable})"}
            else:
                estimates = list(map(metric.estimate, features.subsets(count)))
                result = mean_over_subsets(estimates)._asdict()
            key = self.add_protocol(self.protocol(metric, count, name))
            names = {"metric": metric.name, "extractor": name, "num_samples": count}
            yield names | {"protocol": key} | result

    def add_protocol(self, protocol: dict[str, Any]) -> str:
        """Add a protocol to `protocols`; returns its key."""
        self.protocols[key := digest(protocol)] = protocol
        return key

    def protocol(self, metric: Metric, count: int, name: str) -> dict[str, Any]:
        """The record that identifies a number in the features of the extractor `name`. Its digest
        is the key in the score file and the tables; numbers of two protocols never share a column.
        Without `sampling_precision` the generating networks compute in float32, as feature networks
        always do."""
        data, settings = self.dataset, dict(metric.settings)
        extractor = next(e for e in self.extractors if e.name == name)
        library, reference = f"harness {__version__}", f"train{len(data.train)}"
        if "inception" in extractor.provided:
            library += f", torch-fidelity {version('torch-fidelity')}"
        if metric.name in ("precision", "recall"):
            settings["k"] = self.scoring.evaluation.neighbours
        sha256, extra = data.images_sha256, {}
        if extractor.name == self.published and "reference.statistics" in metric.needs:
            reference, sha256 = "statistics", self.published_sha256
        elif metric.limit and len(data.train) > metric.limit:
            extra["reference_draw"] = f"a fixed draw of {metric.limit} images"
        if precision := sampling_precision(self.scoring.evaluation):
            extra["sampling_precision"] = precision
        plugins = {
            "metric": METRICS.plugin_sha256(metric.name),
            "extractor": FEATURES.plugin_sha256(extractor.settings.type),
        }
        if plugins := {key: sha256 for key, sha256 in plugins.items() if sha256}:
            extra["plugin_sha256"] = plugins
        if data.resize:
            extra["data_resize"] = data.resize
        if data.evaluation_prompts:
            extra["prompts_sha256"] = data.evaluation_prompts.sha256
        return {
            "metric": metric.name,
            "settings": settings,
            "extractor": extractor.name,
            "extractor_sha256": extractor.hashes,
            "num_samples": count,
            "subsets": "mean over all disjoint subsets of this size",
            "reference": f"{data.name}-{reference}",
            "reference_sha256": sha256,
            **extra,
            "quantisation": "uint8: x * 127.5 + 128, clipped",
            "resize": extractor.resize,
            **extractor.details,
            "sampling": "image i from (sampling seed, i), balanced labels",
            "sampling_seeds": self.scoring.evaluation.sampling_seeds,
            "library": library,
        }
