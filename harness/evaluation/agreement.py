"""The same images scored by this project, torch-fidelity and clean-fid: tables/agreement.{csv,md}.

Each library reads the images from disk and extracts features with this project's network, through
its hook for custom networks; everything after that is compared. Where definitions differ, the
libraries are set to this project's:

* clean-fid resizes to 299 x 299 even for custom networks: its resize is replaced by the identity.
* Kernel distances use standardised features and all samples: the libraries' subset is the whole
  set, so both sets have the same size.
* torch-fidelity's cache of features is keyed by a name, not by the images: it is off.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.config.jobs import ReferenceScoring
from harness.data import datasets
from harness.data.datasets import Images
from harness.evaluation.accumulate import FeatureAccumulator
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.kernels import SIGMA
from harness.evaluation.metrics.classifier_scores import SPLITS
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


def write_agreement(job: ReferenceScoring, folder: Path):
    """Score samples of a teacher against as many training images and write both tables in
    `folder`; returns them as a data frame with COLUMNS."""
    import pandas as pd

    scoring, rows = job.scoring, []
    dataset = datasets.load(scoring.data)
    samples = ScoreRecord.read(job.output).kept
    generated = Images(**load_tensors(job.output.with_name(samples.file), samples.sha256))
    count = min(len(generated), len(dataset.train))
    generated = Images(generated.pixels[:count], generated.labels[:count])
    drawn = Stream(0, "agreement").uniform(torch.arange(len(dataset.train))).argsort()[:count]
    real = Images(dataset.train.pixels[drawn], dataset.train.labels[drawn])
    with tempfile.TemporaryDirectory(prefix="onestep-agreement-") as temporary:
        folders = [Path(temporary) / name for name in ("generated", "real")]
        for images, place in zip((generated, real), folders, strict=True):
            write_images(images.pixels, place)
        for name, (_, extractor_folder) in scoring.extractors.items():
            extractor = load_extractor(extractor_folder, dataset, scoring.device)
            if extractor.unavailable:
                status = f"unavailable ({extractor.unavailable})"
                rows.append({"extractor": name, "tolerance": TOLERANCE, "agrees": status})
            else:
                pair = ImagePair.extract(extractor, generated, real, scoring.evaluation.neighbours)
                rows += compare_with_libraries(pair, folders)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_text(folder / "agreement.csv", table.to_csv(index=False))
    caption = (
        f"{count:,} samples of teacher {job.name} against {count:,} training images, read from "
        "disk by each library and processed by the same networks."
    )
    write_text(folder / "agreement.md", _markdown(scoring.experiment, table, caption))
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
        channels = generated.pixels.shape[1]
        return cls(extractor, channels, extracted(generated, reference))

    @property
    def reference(self) -> Reference:
        return self.features.reference

    def values(self) -> dict[str, float]:
        """Every metric that one of the libraries has, too."""
        # As one of several subsets, to skip the standard errors.
        features = replace(self.features, is_subset=True)
        return {
            name: METRICS[name].estimate(features).value
            for name in COMPARED
            if METRICS[name].applies_to(self.extractor.provided)
        }

    def class_score(self) -> str | None:
        """The class score that the extractor has, if any."""
        provided = self.extractor.provided
        return next((q for q in CLASS_SCORES if METRICS[q].applies_to(provided)), None)

    def distance(self) -> str:
        """The name of the extractor's Fréchet distance."""
        return next(name for name in FRECHET if name in self.extractor.provided)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The extractor's outputs for a library's batch `(B, 3, H, W)` of 8-bit values."""
        pixels = images.round().to(torch.uint8)[:, : self.channels]
        return self.extractor.extract(pixels, torch.zeros(len(pixels), dtype=torch.int64))


def compare_with_libraries(pair: ImagePair, folders: list[Path]) -> list[dict]:
    """The table's rows for one extractor. folders: the generated and the real images on disk."""
    ours, rows = pair.values(), []
    for library, theirs in (
        ("torch-fidelity", with_torch_fidelity(pair, folders)),
        ("clean-fid", with_clean_fid(pair, folders)),
    ):
        for quantity, value in theirs.items():
            row = {"quantity": quantity, "extractor": pair.extractor.name, "ours": ours[quantity]}
            row |= {"library": library, "theirs": value}
            rows.append(row | difference(ours[quantity], value))
    return rows


def difference(ours: float, theirs: float) -> dict:
    """The last three columns of a row."""
    relative = abs(ours - theirs) / max(abs(theirs), 1e-12)
    if ours == theirs:  # both may be 0
        relative = 0.0
    agrees = "yes" if relative <= TOLERANCE else "no"
    return {"relative_difference": relative, "tolerance": TOLERANCE, "agrees": agrees}


def torch_fidelity_values(folders: list[Path], name: str, **options) -> dict[str, float]:
    """`torch_fidelity.calculate_metrics` of two folders with a registered network, on the CPU, in
    this process, without cache."""
    import torch_fidelity

    common = {"feature_extractor": name, "cuda": False, "cache": False, "verbose": False}
    common["save_cpu_ram"] = True  # otherwise it starts four processes
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), **common | options
    )


def register_in_torch_fidelity(pair: ImagePair) -> tuple[str, dict]:
    """Register the extractor in torch-fidelity; returns its name there and the options that select
    this project's definitions. Its features: `exact` (float64), `features`, `standardised` and,
    with probabilities, `logits`."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Hook(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("exact", "features", "standardised", "logits")

        def forward(self, images):
            outputs = pair.outputs(images)
            features = {
                "exact": lambda: outputs["features"].double(),
                "features": lambda: outputs["features"],
                "standardised": lambda: pair.reference.standardise(outputs["features"]),
                "logits": lambda: outputs["probabilities"].log(),
            }
            return tuple(features[name]() for name in self.features_list)

    name = f"onestep-{pair.extractor.name}-{uuid.uuid4().hex}"
    torch_fidelity.register_feature_extractor(name, Hook)
    score = pair.class_score()
    return name, {
        "fid": True,
        "kid": True,
        "prc": True,
        "isc": score is not None,
        "feature_layer_fid": "exact",
        "feature_layer_kid": "standardised",
        "feature_layer_prc": "features",
        "feature_layer_isc": "logits",
        "isc_splits": CLASS_SCORES.get(score, 1),
        "samples_shuffle": False,
        "kid_subsets": 1,
        "kid_subset_size": len(pair.features.features),
        "prc_neighborhood": pair.features.neighbours,
    }


def with_torch_fidelity(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    import torch_fidelity
    from torch_fidelity.metric_kid import kid_features_to_metric

    name, options = register_in_torch_fidelity(pair)
    found = torch_fidelity_values(folders, name, **options)
    values = {
        pair.distance(): found[torch_fidelity.KEY_METRIC_FID],
        "kd": 1000 * found[torch_fidelity.KEY_METRIC_KID_MEAN],
        "precision": found[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": found[torch_fidelity.KEY_METRIC_RECALL],
    }
    if score := pair.class_score():
        values[score] = found[torch_fidelity.KEY_METRIC_ISC_MEAN]
    if METRICS["cmmd"].applies_to(pair.extractor.provided):
        both = (pair.features.features, pair.reference.features)
        found = kid_features_to_metric(
            *(normalize(features.double(), dim=1) for features in both),
            kid_subsets=1,
            kid_subset_size=len(both[0]),
            kid_kernel="rbf",
            kid_kernel_rbf_sigma=SIGMA,
            verbose=False,
        )
        values["cmmd"] = 1000 * found[torch_fidelity.KEY_METRIC_KID_MEAN]
    return values


def with_clean_fid(pair: ImagePair, folders: list[Path]) -> dict[str, float]:
    from cleanfid import fid

    generated, real = (
        fid.get_folder_features(
            str(folder),
            lambda images: pair.outputs(images)["features"].double(),
            num_workers=0,
            device=torch.device("cpu"),
            custom_fn_resize=lambda image: image,
            verbose=False,
        )
        for folder in folders
    )
    standardised = [
        pair.reference.standardise(torch.from_numpy(t)).numpy() for t in (generated, real)
    ]
    return {
        pair.distance(): float(fid.fid_from_feats(generated, real)),
        "kd": 1000 * fid.kernel_distance(*standardised, num_subsets=1, max_subset_size=len(real)),
    }


def _markdown(name: str, table, caption: str) -> str:
    compared = table.relative_difference.dropna()
    largest = f"{compared.max():.1e}" if len(compared) else "none"
    body = table.astype(object).where(table.notna(), None)
    formats = ("", "", ".8g", "", ".8g", ".1e", "g", "")
    body = body.to_markdown(index=False, floatfmt=formats, missingval="–")
    return (
        f"# Agreement with the libraries on {name}\n\n{body}\n\n{caption} Largest relative "
        f"difference: {largest}.\n"
    )
