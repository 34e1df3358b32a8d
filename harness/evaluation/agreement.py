"""The same images scored by this project, torch-fidelity and clean-fid: tables/agreement.{csv,md}.

Each library reads the images from disk and extracts features with this project's network, through
its hook for custom networks; everything after that is compared, with this project's definitions.
"""

import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.config.jobs import Scoring
from harness.data import datasets
from harness.evaluation.accumulator import FeatureAccumulator
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.metrics.distances import SIGMA
from harness.evaluation.metrics.scores import SPLITS
from harness.evaluation.references import Reference
from harness.evaluation.registry import FRECHET, METRICS
from harness.features.base import FeatureExtractor, load_extractor, provides
from harness.io.artifacts import load_tensors, write_text
from harness.io.records import ScoreRecord
from harness.precision import set_precision
from harness.streams import Stream

TOLERANCE = 1e-4
COLUMNS = ("quantity", "extractor", "ours", "library", "theirs")
COLUMNS += ("relative_difference", "tolerance", "agrees")
CLASS_SCORES = {"inception-score": SPLITS, "class-score": 1}  # -> torch-fidelity's splits
COMPARED = (*FRECHET, "kd", "cmmd", "precision", "recall", *CLASS_SCORES)


def write_agreement(scoring: Scoring, teacher: str, scores: Path, folder: Path):
    """Compare samples of a teacher, which its score file lists, with as many training images and
    write both tables in `folder`; returns them as a data frame with COLUMNS."""
    import pandas as pd
    from tabulate import tabulate

    set_precision(scoring.device)
    dataset, rows = datasets.load(scoring.data), []
    samples, train = ScoreRecord.read(scores).kept, dataset.train.pixels
    generated = load_tensors(scores.with_name(samples.file), samples.sha256)["pixels"]
    count = min(len(generated), len(train))
    drawn = Stream(0, "agreement").uniform(torch.arange(len(train))).argsort()[:count]
    with tempfile.TemporaryDirectory(prefix="onestep-agreement-") as temporary:
        folders = [Path(temporary) / name for name in ("generated", "real")]
        both = generated[:count], train[drawn]
        for pixels, images in zip(both, folders, strict=True):
            write_images(pixels, images)
        for name, (settings, extractor_folder) in scoring.extractors.items():
            if "features" not in provides(settings):
                continue
            extractor = load_extractor(extractor_folder, dataset, scoring.device)
            if extractor.unavailable:
                status = f"unavailable ({extractor.unavailable})"
                rows.append((None, name, *[None] * 4, TOLERANCE, status))
            else:
                pair = ImagePair(extractor, *both, scoring.evaluation.neighbours)
                rows += compare_with_libraries(pair, folders)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_text(folder / "agreement.csv", table.to_csv(index=False))
    compared = table.relative_difference.dropna()
    largest = f"{compared.max():.1e}" if len(compared) else "none"
    formats = ("", "", ".8g", "", ".8g", ".1e", "g", "")
    body = tabulate(rows, COLUMNS, "pipe", floatfmt=formats, missingval="–")
    write_text(
        folder / "agreement.md",
        f"# Agreement with the libraries on {scoring.experiment}\n\n{body}\n\n{count:,} samples of "
        f"teacher {teacher} against {count:,} training images, read from disk by each library and "
        f"processed by the same networks. Largest relative difference: {largest}.\n",
    )
    return table


def write_images(pixels: Tensor, folder: Path) -> None:
    """PNG files whose names sort in the order of the images."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(pixels.movedim(1, -1).squeeze(-1).numpy()):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


class ImagePair:
    """Generated and real images, uint8 `(N, C, H, W)`, in the features of one extractor.

    values: every metric of theirs that one of the libraries computes, too.
    """

    def __init__(self, extractor: FeatureExtractor, generated: Tensor, real: Tensor, k: int):
        def extracted(pixels: Tensor, reference: Reference) -> FeatureSet:
            accumulator = FeatureAccumulator([extractor])
            for block in pixels.split(256):
                accumulator.add(block, None)
            return accumulator.feature_set(extractor.name, reference, k)

        self.extractor, self.channels = extractor, generated.shape[1]
        self.reference = Reference(extracted(real, Reference(None)).features)
        # As a subset: without standard errors.
        self.features = replace(extracted(generated, self.reference), is_subset=True)
        metrics = [METRICS[n] for n in COMPARED if METRICS[n].applies_to(extractor.provided)]
        self.values = {metric.name: metric.estimate(self.features).value for metric in metrics}
        self.distance = metrics[0].name  # every extractor has one Fréchet distance
        self.class_score = next(filter(CLASS_SCORES.get, self.values), None)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The extractor's outputs for a library's batch `(B, 3, H, W)` of 8-bit values."""
        return self.extractor.extract(images.round().to(torch.uint8)[:, : self.channels])


def compare_with_libraries(pair: ImagePair, folders: list[Path]) -> list[tuple]:
    """The table's rows for one extractor. folders: the generated and the real images on disk."""
    rows = []
    libraries = {"torch-fidelity": with_torch_fidelity, "clean-fid": with_clean_fid}
    for library, compute in libraries.items():
        for quantity, theirs in compute(pair, folders).items():
            ours = pair.values[quantity]
            relative = abs(ours - theirs) / max(abs(theirs), 1e-12)  # both may be 0
            agrees = "yes" if relative <= TOLERANCE else "no"
            row = quantity, pair.extractor.name, ours, library, theirs, relative, TOLERANCE, agrees
            rows.append(row)
    return rows


def torch_fidelity_arguments(pair: ImagePair, folders: list[Path]) -> dict[str, Any]:
    """Register the extractor in torch-fidelity; returns arguments of `calculate_metrics` that
    select it, on the CPU, with this project's definitions."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    layers = {"fid": "exact", "kid": "standardised", "prc": "features", "isc": "logits"}

    class Hook(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return tuple(layers.values())

        def forward(self, images):
            outputs = pair.outputs(images)
            outputs["exact"] = outputs["features"].double()
            outputs["standardised"] = pair.reference.standardise(outputs["features"])
            if pair.class_score:
                outputs["logits"] = outputs["probabilities"].log()
            return tuple(outputs[name] for name in self.features_list)

    name = f"onestep-{pair.extractor.name}-{uuid.uuid4().hex}"
    register_feature_extractor(name, Hook)
    return {
        **dict(zip(("input1", "input2"), map(str, folders), strict=True)),
        "feature_extractor": name,
        "cuda": False,
        "cache": False,  # keyed by the network's name, not by the images
        "save_cpu_ram": True,  # otherwise it starts four processes
        "verbose": False,
        **{f"feature_layer_{metric}": layer for metric, layer in layers.items()},
        **{metric: metric != "isc" or pair.class_score is not None for metric in layers},
        "isc_splits": CLASS_SCORES.get(pair.class_score, 1),
        "samples_shuffle": False,
        "kid_subsets": 1,  # all samples: both sets have the same size
        "kid_subset_size": len(pair.features.features),
        "prc_neighborhood": pair.features.neighbours,
    }


def with_torch_fidelity(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric

    arguments = torch_fidelity_arguments(pair, folders)
    found = calculate_metrics(**arguments)
    values = {pair.distance: found["frechet_inception_distance"]}
    values["kd"] = 1000 * found["kernel_inception_distance_mean"]
    values |= {key: found[key] for key in ("precision", "recall")}
    if pair.class_score:
        values[pair.class_score] = found["inception_score_mean"]
    if "cmmd" in pair.values:
        both = (normalize(s.features.double(), dim=1) for s in (pair.features, pair.reference))
        kernel = {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": SIGMA}
        found = kid_features_to_metric(*both, **arguments, **kernel)
        values["cmmd"] = 1000 * found["kernel_inception_distance_mean"]
    return values


def with_clean_fid(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    from cleanfid import fid

    def extract(images: Tensor) -> Tensor:
        return pair.outputs(images)["features"].double()

    settings = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    settings["custom_fn_resize"] = lambda image: image  # otherwise to 299 x 299 pixels
    generated, real = (fid.get_folder_features(str(f), extract, **settings) for f in folders)
    standardise = pair.reference.standardise
    both = (standardise(torch.from_numpy(features)).numpy() for features in (generated, real))
    return {
        pair.distance: float(fid.fid_from_feats(generated, real)),
        "kd": 1000 * fid.kernel_distance(*both, num_subsets=1, max_subset_size=len(real)),
    }
