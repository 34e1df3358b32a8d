"""Features and statistics of the real images that samples are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.config.jobs import Scoring
from harness.data.datasets import Dataset
from harness.errors import UserError
from harness.evaluation.feature_set import PAIRWISE_LIMIT, Reference
from harness.evaluation.frechet import Moments, load_statistics
from harness.features.base import FeatureExtractor, provides
from harness.features.inception import DIM
from harness.io.artifacts import (
    digest,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)
from harness.io.downloads import fetch
from harness.io.locks import run_lock
from harness.streams import Stream


@dataclass(frozen=True)
class PublishedStatistics:
    """Mean and covariance from `evaluation.statistics`, and the extractor that they belong to."""

    extractor: str
    statistics: tuple[Tensor, Tensor]
    sha256: str


def published_statistics(scoring: Scoring) -> PublishedStatistics | None:
    """The statistics file of an experiment, if it names one. It belongs to Inception: the one with
    EDM's resize, as for published files, or the first one."""
    evaluation = scoring.evaluation
    if evaluation.statistics is None:
        return None
    provided = {name: provides(settings) for name, (settings, _) in scoring.extractors.items()}
    inception = [name for name, names in provided.items() if "inception" in names]
    extractor = next((name for name in inception if "fid-edm" in provided[name]), inception[0])
    path = fetch(evaluation.statistics, evaluation.statistics_sha256)
    return PublishedStatistics(extractor, load_statistics(path, DIM), sha256_file(path))


def load_reference(
    extractor: FeatureExtractor,
    dataset: Dataset,
    folder: Path,
    device: str,
    published: tuple[Tensor, Tensor] | None = None,
) -> Reference:
    """Real images as an extractor sees them.

    They are the same for all generators: the first scoring job stores them in the extractor's
    `folder`, and the others read them. published: statistics that replace the training part's.
    """
    if not len(dataset.train):
        return Reference(None, published)
    key = {
        "extractor": extractor.hashes,
        "type": extractor.settings.type,
        "resize": extractor.resize,
        "data": dataset.sha256,
        "draw": PAIRWISE_LIMIT,
        "moments": published is None,
        "torch": torch.__version__,
        "device": device,
    }
    path = folder / f"reference-{digest(key)}.safetensors"
    with run_lock(folder):
        record = path.with_suffix(".json")
        try:
            tensors = load_tensors(path, read_json(record)["sha256"])
        except UserError:  # missing or damaged
            tensors = _extract_reference(extractor, dataset, moments=published is None)
            write_json(record, {"sha256": save_tensors(path, tensors)})
    own = (tensors["mean"], tensors["covariance"]) if "mean" in tensors else None
    return Reference(
        tensors["features"], published or own, tensors.get("held_out"), tensors["index"]
    )


def _extract_reference(
    extractor: FeatureExtractor, dataset: Dataset, moments: bool
) -> dict[str, Tensor]:
    """`features` of the training part, or of a fixed draw of PAIRWISE_LIMIT images (`index`);
    `held_out`: those of the held-out part. With `moments`, also the `mean` and `covariance` of a
    training part larger than the draw, summed block by block."""
    train, held_out, parts, sums = dataset.train, dataset.held_out, [], None
    everything = torch.arange(len(train))
    drawn = Stream(0, "reference").uniform(everything).argsort()[:PAIRWISE_LIMIT].sort().values
    for index in (everything if moments else drawn).split(256):
        features = extractor.extract(train.pixels[index])["features"]
        parts.append(features[torch.isin(index, drawn)])
        if moments and len(drawn) < len(train):
            sums = sums + Moments.of(features) if sums else Moments.of(features)
    tensors = {"features": torch.cat(parts), "index": drawn}
    if sums:
        tensors |= dict(zip(("mean", "covariance"), sums.statistics(), strict=True))
    if len(held_out):
        blocks = [extractor.extract(pixels)["features"] for pixels, _ in held_out.blocks()]
        tensors["held_out"] = torch.cat(blocks)
    return tensors
