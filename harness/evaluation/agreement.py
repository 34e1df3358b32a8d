"""The same images scored by this project, torch-fidelity and clean-fid: tables/agreement.{csv,md}.

Each library reads the images from disk and extracts features with this project's network, through
its hook for custom networks; everything after that is compared, with this project's definitions.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.config.jobs import Scoring
from harness.data import datasets
from harness.data.datasets import Images
from harness.evaluation.accumulator import FeatureAccumulator
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.metrics.classifier_scores import SPLITS
from harness.evaluation.metrics.kernel_distances import SIGMA
from harness.evaluation.references import Reference
from harness.evaluation.registry import FRECHET, METRICS
from harness.features.base import FeatureExtractor, load_extractor
from harness.io.artifacts import load_tensors, write_text
from harness.io.records import ScoreRecord
from harness.streams import Stream

TOLERANCE = 1e-4
COLUMNS = (
    *("quantity", "extractor", "ours", "library", "theirs"),
    *("relative_difference", "tolerance", "agrees"),
)
CLASS_SCORES = {"inception-score": SPLITS, "class-score": 1}  # -> torch-fidelity's splits
COMPARED = (*FRECHET, "kd", "cmmd", "precision", "recall", *CLASS_SCORES)


def write_agreement(scoring: Scoring, teacher: str, scores: Path, folder: Path):
    """Compare samples of a teacher, which its score file lists, with as many training images and
    write both tables in `folder`; returns them as a data frame with COLUMNS."""
    import pandas as pd
    from tabulate import tabulate

    dataset, rows = datasets.load(scoring.data), []
    samples = ScoreRecord.read(scores).kept
    generated = Images(**load_tensors(scores.with_name(samples.file), samples.sha256))
    count = min(len(generated), len(dataset.train))
    generated = Images(generated.pixels[:count], generated.labels[:count])
    drawn = Stream(0, "agreement").uniform(torch.arange(len(dataset.train))).argsort()[:count]
    real = Images(dataset.train.pixels[drawn], dataset.train.labels[drawn])
    with tempfile.TemporaryDirectory(prefix="onestep-agreement-") as temporary:
        folders = [Path(temporary) / name for name in ("generated", "real")]
        write_images(generated.pixels, folders[0])
        write_images(real.pixels, folders[1])
        for name, (_, extractor_folder) in scoring.extractors.items():
            extractor = load_extractor(extractor_folder, dataset, scoring.device)
            if extractor.unavailable:
                status = f"unavailable ({extractor.unavailable})"
                rows.append((None, name, *[None] * 4, TOLERANCE, status))
            else:
                pair = ImagePair.extract(extractor, generated, real, scoring.evaluation.neighbours)
                rows += compare_with_libraries(pair, folders)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_text(folder / "agreement.csv", table.to_csv(index=False))
    compared = table.relative_difference.dropna()
    largest = f"{compared.max():.1e}" if len(compared) else "none"
    formats = ("", "", ".8g", "", ".8g", ".1e", "g", "")
    body = tabulate(rows, COLUMNS, "pipe", floatfmt=formats, missingval="–")
    text = (
        f"# Agreement with the libraries on {scoring.experiment}\n\n{body}\n\n{count:,} samples of "
        f"teacher {teacher} against {count:,} training images, read from disk by each library and "
        f"processed by the same networks. Largest relative difference: {largest}.\n"
    )
    write_text(folder / "agreement.md", text)
    return table


def write_images(pixels: Tensor, folder: Path) -> None:
    """PNG files whose names sort in the order of the images."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(pixels):
        array = image.movedim(0, -1).squeeze(-1).numpy()
        Image.fromarray(array).save(folder / f"{i:06d}.png")


@dataclass(frozen=True)
class ImagePair:
    """Generated images with their reference in the features of one extractor."""

    extractor: FeatureExtractor
    channels: int
    features: FeatureSet

    @classmethod
    def extract(
        cls, extractor: FeatureExtractor, generated: Images, real: Images, neighbours: int
    ) -> ImagePair:
        def extracted(images: Images, reference: Reference) -> FeatureSet:
            accumulator = FeatureAccumulator([extractor])
            for pixels, _ in images.blocks():
                accumulator.add(pixels, None)
            return accumulator.feature_set(extractor.name, reference, neighbours)

        reference = Reference(extracted(real, Reference(None)).features)
        return cls(extractor, generated.pixels.shape[1], extracted(generated, reference))

    def first_of(self, names) -> str | None:
        """The first of these metrics that is defined for the extractor."""
        return next((n for n in names if METRICS[n].applies_to(self.extractor.provided)), None)

    def values(self) -> dict[str, float]:
        """Every metric that one of the libraries has, too."""
        features = replace(self.features, is_subset=True)  # without standard errors
        names = [n for n in COMPARED if METRICS[n].applies_to(self.extractor.provided)]
        return {name: METRICS[name].estimate(features).value for name in names}

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The extractor's outputs for a library's batch `(B, 3, H, W)` of 8-bit values."""
        pixels = images.round().to(torch.uint8)[:, : self.channels]
        return self.extractor.extract(pixels, torch.zeros(len(pixels), dtype=torch.int64))


def compare_with_libraries(pair: ImagePair, folders: list[Path]) -> list[tuple]:
    """The table's rows for one extractor. folders: the generated and the real images on disk."""
    values, rows = pair.values(), []
    libraries = {"torch-fidelity": with_torch_fidelity, "clean-fid": with_clean_fid}
    for library, compute in libraries.items():
        for quantity, theirs in compute(pair, folders).items():
            ours = values[quantity]
            # Both may be 0.
            relative = 0.0 if ours == theirs else abs(ours - theirs) / max(abs(theirs), 1e-12)
            agrees = "yes" if relative <= TOLERANCE else "no"
            row = quantity, pair.extractor.name, ours, library, theirs, relative, TOLERANCE, agrees
            rows.append(row)
    return rows


def torch_fidelity_arguments(pair: ImagePair, folders: list[Path]) -> dict[str, Any]:
    """Register the extractor in torch-fidelity; returns arguments of `calculate_metrics` that
    select it, on the CPU, with this project's definitions. Its features: `exact` (float64),
    `features`, `standardised` and, with probabilities, `logits`."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Hook(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("exact", "features", "standardised", "logits")

        def forward(self, images):
            outputs = pair.outputs(images)
            outputs["exact"] = outputs["features"].double()
            outputs["standardised"] = pair.features.reference.standardise(outputs["features"])
            if "probabilities" in outputs:
                outputs["logits"] = outputs["probabilities"].log()
            return tuple(outputs[name] for name in self.features_list)

    name = f"onestep-{pair.extractor.name}-{uuid.uuid4().hex}"
    register_feature_extractor(name, Hook)
    score = pair.first_of(CLASS_SCORES)
    layers = {"fid": "exact", "kid": "standardised", "prc": "features", "isc": "logits"}
    return {
        "input1": str(folders[0]),
        "input2": str(folders[1]),
        "feature_extractor": name,
        "cuda": False,
        "cache": False,  # keyed by the network's name, not by the images
        "save_cpu_ram": True,  # otherwise it starts four processes
        "verbose": False,
        **{f"feature_layer_{metric}": layer for metric, layer in layers.items()},
        **{metric: metric != "isc" or score is not None for metric in layers},
        "isc_splits": CLASS_SCORES.get(score, 1),
        "samples_shuffle": False,
        "kid_subsets": 1,  # all samples: both sets have the same size
        "kid_subset_size": len(pair.features.features),
        "prc_neighborhood": pair.features.neighbours,
    }


def with_torch_fidelity(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = calculate_metrics(**torch_fidelity_arguments(pair, folders))
    values = {
        pair.first_of(FRECHET): found["frechet_inception_distance"],
        "kd": 1000 * found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    if score := pair.first_of(CLASS_SCORES):
        values[score] = found["inception_score_mean"]
    if pair.first_of(["cmmd"]):
        both = pair.features.features, pair.features.reference.features
        found = kid_features_to_metric(
            *(normalize(features.double(), dim=1) for features in both),
            kid_subsets=1,
            kid_subset_size=len(both[0]),
            kid_kernel="rbf",
            kid_kernel_rbf_sigma=SIGMA,
            verbose=False,
        )
        values["cmmd"] = 1000 * found["kernel_inception_distance_mean"]
    return values


def with_clean_fid(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    from cleanfid import fid

    generated, real = (
        fid.get_folder_features(
            str(folder),
            lambda images: pair.outputs(images)["features"].double(),
            num_workers=0,
            device=torch.device("cpu"),
            custom_fn_resize=lambda image: image,  # otherwise to 299 x 299 pixels
            verbose=False,
        )
        for folder in folders
    )
    standardise = pair.features.reference.standardise
    both = (standardise(torch.from_numpy(features)).numpy() for features in (generated, real))
    return {
        pair.first_of(FRECHET): float(fid.fid_from_feats(generated, real)),
        "kd": 1000 * fid.kernel_distance(*both, num_subsets=1, max_subset_size=len(real)),
    }
