"""Real images that samples are compared with, by their features and statistics."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.config.jobs import Scoring
from harness.data.datasets import Dataset
from harness.errors import UserError
from harness.evaluation import frechet
from harness.evaluation.neighbours import nearest, neighbour_radii
from harness.features.base import FEATURES, FeatureExtractor, provides, start_checked
from harness.features.inception import DIM
from harness.io import artifacts
from harness.io.downloads import fetch
from harness.io.locks import run_lock
from harness.streams import Stream
from harness.transfers import ahead

# Samples that metrics over all pairs use at most, generated and reference: memory grows with the
# square, to 800 MB of float64 here.
PAIRWISE_LIMIT = 10_000

Statistics = tuple[Tensor, Tensor]  # mean `(D,)` and covariance `(D, D)`


@dataclass(eq=False)
class Reference:
    """Real images to compare with.

    features: `(M, D)`, at most PAIRWISE_LIMIT; None if only statistics are known.
    given_statistics: default: those of `features`.
    held_out: features of real images outside the reference, if there are any.
    index: positions of `features` in the training part, `(M,)`, if known.
    """

    features: Tensor | None
    given_statistics: Statistics | None = None
    held_out: Tensor | None = None
    index: Tensor | None = None
    _computed: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def cached(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which all comparisons share under this name."""
        if name not in self._computed:
            self._computed[name] = compute()
        return self._computed[name]

    @cached_property
    def _own_statistics(self) -> Statistics | None:
        return None if self.features is None else frechet.gaussian_statistics(self.features)

    @property
    def statistics(self) -> Statistics | None:
        return self.given_statistics or self._own_statistics

    @cached_property
    def _factor(self) -> Tensor:
        return frechet.factor(self.statistics[1])

    def frechet(self, features: Tensor) -> float:
        """Fréchet distance of samples `(N, D)`."""
        if len(features) <= features.shape[1]:
            return frechet.frechet_of_few(features, *self.statistics)
        return self.frechet_of_moments(frechet.Moments.over(features.split(frechet.BLOCK)))

    def frechet_of_moments(self, moments: frechet.Moments) -> float:
        return frechet.distance_of_factor(self.statistics[0], self._factor, *moments.statistics())

    def standardise(self, x: Tensor) -> Tensor:
        """Features in float64, scaled by the mean and standard deviation of `features`."""
        mean, covariance = self._own_statistics
        return (x.double() - mean) / covariance.diagonal().sqrt().clamp_min(1e-6)

    @cached_property
    def typical_nearest(self) -> float | None:
        """The unit for distances to training images: the median distance of held-out images to the
        nearest one. None if nothing is held out, or if half of it duplicates training images."""
        if self.held_out is None:
            return None
        return nearest(self.held_out, self.features)[0].double().quantile(0.5).item() or None

    def radii(self, k: int) -> Tensor:
        return self.cached(f"radii of {k}", lambda: neighbour_radii(self.features, k))


def statistics_extractor(provided: Mapping[str, Collection[str]]) -> str | None:
    """The extractor that a statistics file belongs to, from what each provides: Inception with
    EDM's resize, as for published files, or the first Inception."""
    inception = [name for name, names in provided.items() if "inception" in names]
    return next((n for n in inception if "fid-edm" in provided[n]), next(iter(inception), None))


def published_statistics(scoring: Scoring) -> tuple[str, Statistics, str] | tuple[None, None, None]:
    """The statistics file that an experiment names, if any: the extractor that it belongs to, its
    content and its sha256."""
    evaluation = scoring.evaluation
    if evaluation.statistics is None:
        return None, None, None
    provided = {name: provides(settings) for name, (settings, _) in scoring.extractors.items()}
    extractor = statistics_extractor(provided)
    path = fetch(evaluation.statistics, evaluation.statistics_sha256)
    return extractor, frechet.load_statistics(path, DIM), artifacts.sha256_file(path)


def load_reference(
    scoring: Scoring, extractor: FeatureExtractor, dataset: Dataset, published: Statistics | None
) -> Reference:
    """The training part in an extractor's features, if it has features. `published`: statistics
    that replace its own.

    The first scoring job stores the features in the extractor's folder; the others read them.
    """
    if not len(dataset.train) or "features" not in extractor.provided:
        return Reference(None, published)
    key = [extractor.hashes, extractor.settings.type, extractor.resize, dataset.sha256]
    key += [PAIRWISE_LIMIT, published is None, torch.__version__, scoring.device]
    if sha256 := FEATURES.plugin_sha256(extractor.settings.type):  # it may read any setting
        key += [sha256, extractor.settings.model_dump()]
    folder = scoring.extractors[extractor.name][1]
    path = folder / f"reference-{artifacts.digest(key)}.safetensors"
    record = path.with_suffix(".json")

    def extracted() -> dict[str, Tensor]:
        return _extract(extractor, dataset, scoring.device, moments=published is None)

    def stored() -> dict[str, Tensor] | None:
        try:
            return artifacts.load_tensors(path, artifacts.read_json(record)["sha256"])
        except UserError:  # missing, damaged, or not yet complete
            return None

    if (tensors := stored()) is None:
        try:
            with run_lock(folder):
                if (tensors := stored()) is None:
                    tensors = extracted()
                    artifacts.write_json(record, {"sha256": artifacts.save_tensors(path, tensors)})
        except OSError as error:  # another user's results: `harness score-folder` only reads them
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            tensors = tensors or extracted()
    if "mean" in tensors:
        published = tensors["mean"], tensors["covariance"]
    return Reference(tensors["features"], published, tensors.get("held_out"), tensors["index"])


def _extract(
    extractor: FeatureExtractor, dataset: Dataset, device: str, moments: bool
) -> dict[str, Tensor]:
    """`features` of the training part, or of a fixed draw of PAIRWISE_LIMIT images (`index`);
    `held_out`: those of the held-out part. With `moments`, also the `mean` and `covariance` of a
    training part larger than the draw, summed block by block."""
    train, held_out, parts, sums = dataset.train, dataset.held_out, [], None
    everything = torch.arange(len(train))
    drawn = Stream(0, "reference").uniform(everything).argsort()[:PAIRWISE_LIMIT].sort().values
    blocks = (everything if moments else drawn).split(256)
    started = ahead(lambda index: start_checked(extractor, train.pixels[index]), blocks, device)
    for index, outputs in zip(blocks, started, strict=True):
        features = outputs()["features"]
        parts.append(features[torch.isin(index, drawn)])
        if moments and len(drawn) < len(train):
            sums = sums + frechet.Moments.of(features) if sums else frechet.Moments.of(features)
    tensors = {"features": torch.cat(parts), "index": drawn}
    if sums:
        tensors |= dict(zip(("mean", "covariance"), sums.statistics(), strict=True))
    if len(held_out):
        held_blocks = held_out.blocks()
        started = ahead(lambda block: start_checked(extractor, block[0]), held_blocks, device)
        tensors["held_out"] = torch.cat([outputs()["features"] for outputs in started])
    return tensors
