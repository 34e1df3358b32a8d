"""The same images scored by this project, torch-fidelity and clean-fid: tables/agreement.{csv,md}.

Each library reads the images from disk and sees them through this project's network by its own
hook for networks; what is compared is everything after that. Where the libraries would differ by
definition, they are asked for ours:

* clean-fid resizes to 299 x 299 even for a network of one's own: it gets an identity.
* Kernel distances are on standardised features and all samples: the libraries' subset is the whole
  set, for which both sets have the same size.
* torch-fidelity keeps features under a name that the images are no part of: its cache is off.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.data.datasets import Images
from harness.errors import UserError
from harness.evaluation.accumulate import FeatureAccumulator
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.kernels import SIGMA
from harness.evaluation.metrics.classifier_scores import SPLITS
from harness.evaluation.registry import FRECHET, METRICS
from harness.features.base import FeatureExtractor, load_extractor
from harness.io.artifacts import load_tensors, read_json, write_text
from harness.streams import Stream

TOLERANCE = 1e-4
COLUMNS = (
    *("quantity", "extractor", "ours", "library", "theirs"),
    *("relative_difference", "tolerance", "agrees"),
)


def write_agreement(experiment: Experiment) -> pd.DataFrame:
    """Score samples of the first teacher against as many training images; write both tables."""
    teacher = next(iter(experiment.teachers))
    dataset = datasets.load(experiment.data_dir())
    generated = _samples(experiment, teacher)
    count = min(len(generated), len(dataset.train))
    generated = Images(generated.pixels[:count], generated.labels[:count])
    drawn = Stream(0, "agreement").uniform(torch.arange(len(dataset.train))).argsort()[:count]
    real = Images(dataset.train.pixels[drawn], dataset.train.labels[drawn])
    rows = []
    with tempfile.TemporaryDirectory(prefix="onestep-agreement-") as folder:
        folders = [Path(folder) / name for name in ("generated", "real")]
        for images, place in zip((generated, real), folders, strict=True):
            write_images(images.pixels, place)
        for name in experiment.evaluation.extractors:
            extractor = load_extractor(experiment.features_dir(name), dataset, experiment.device)
            if extractor.unavailable:
                status = f"unavailable ({extractor.unavailable})"
                rows.append({"extractor": name, "tolerance": TOLERANCE, "agrees": status})
            else:
                rows += compare(extractor, generated, real, folders, experiment)
    table = pd.DataFrame(rows, columns=COLUMNS)
    tables = experiment.root / "tables"
    write_text(tables / "agreement.csv", table.to_csv(index=False))
    caption = (
        f"{count:,} samples of teacher {teacher} against {count:,} training images, read from disk "
        "by each library and seen through the same networks."
    )
    write_text(tables / "agreement.md", _markdown(experiment.name, table, caption))
    return table


def _samples(experiment: Experiment, teacher: str) -> Images:
    """Those that the teacher's scores were made of, or the first of them."""
    path = experiment.reference_score_path(teacher)
    kept = read_json(path).get("kept")
    if kept is None:
        raise UserError(f"{path} names no samples; delete it and run the workflow again")
    return Images(**load_tensors(path.with_name(kept["file"]), kept["sha256"]))


def write_images(pixels: Tensor, folder: Path) -> None:
    """PNG files whose names sort as the images stand."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(pixels):
        array = image.movedim(0, -1).squeeze(-1).numpy()
        Image.fromarray(array).save(folder / f"{i:06d}.png")


class Scored:
    """What this project makes of two sets through one extractor."""

    def __init__(
        self, extractor: FeatureExtractor, generated: Images, real: Images, neighbours: int
    ):
        self.extractor, self.channels = extractor, generated.pixels.shape[1]
        self.reference = Reference(self._see(real, Reference(None), neighbours).features)
        self.views = self._see(generated, self.reference, neighbours)

    def _see(self, images: Images, reference: Reference, neighbours: int) -> FeatureSet:
        observer = FeatureAccumulator([self.extractor])
        for pixels, _ in images.blocks():
            observer.add(pixels, None)
        return observer.feature_set(self.extractor.name, reference, neighbours)

    def values(self) -> dict[str, float]:
        """Every metric that one of the libraries has, too."""
        # As one of several subsets, so that no time goes into errors.
        views = replace(self.views, is_subset=True)
        return {
            name: METRICS[name].estimate(views).value
            for name in (*FRECHET, "kd", "cmmd", "precision", "recall", *SPLITS_OF)
            if METRICS[name].applies_to(self.extractor.provided)
        }


# Class scores -> the number of torch-fidelity's splits.
SPLITS_OF = {"inception-score": SPLITS, "class-score": 1}


def compare(
    extractor: FeatureExtractor,
    generated: Images,
    real: Images,
    folders: list[Path],
    experiment: Experiment,
) -> list[dict]:
    """The table's rows for one extractor; `folders`: the generated and the real images on disk."""
    scored = Scored(extractor, generated, real, experiment.evaluation.neighbours)
    ours = scored.values()
    rows = []
    for library, theirs in (
        ("torch-fidelity", with_torch_fidelity(scored, ours, folders)),
        ("clean-fid", with_clean_fid(scored, ours, folders)),
    ):
        for quantity, value in theirs.items():
            row = {"quantity": quantity, "extractor": extractor.name, "ours": ours[quantity]}
            row |= {"library": library, "theirs": value} | verdict(ours[quantity], value)
            rows.append(row)
    return rows


def verdict(ours: float, theirs: float) -> dict:
    """The columns of a row that say how far two numbers agree."""
    difference = abs(ours - theirs) / max(abs(theirs), 1e-12)
    if ours == theirs:  # both may be 0
        difference = 0.0
    agrees = "yes" if difference <= TOLERANCE else "no"
    return {"relative_difference": difference, "tolerance": TOLERANCE, "agrees": agrees}


def _as_ours(images: Tensor, channels: int) -> Tensor:
    """A library's batch `(B, 3, H, W)` as uint8 with the data set's own channels."""
    return images.round().to(torch.uint8)[:, :channels]


def hook(scored: Scored) -> type:
    """The extractor as a class that torch-fidelity can register. Its features: `exact` (float64),
    `features` as this project has them, `standardised` and, with probabilities, `logits`."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    extractor, reference = scored.extractor, scored.reference

    class Hook(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("exact", "features", "standardised", "logits")

        def forward(self, images):
            pixels = _as_ours(images, scored.channels)
            seen = extractor.extract(pixels, torch.zeros(len(pixels), dtype=torch.int64))
            made = {
                "exact": lambda: seen["features"].double(),
                "features": lambda: seen["features"],
                "standardised": lambda: reference.standardise(seen["features"]),
                "logits": lambda: seen["probabilities"].log(),
            }
            return tuple(made[name]() for name in self.features_list)

    return Hook


def torch_fidelity_values(folders: list[Path], name: str, **options) -> dict[str, float]:
    """`torch_fidelity.calculate_metrics` of two folders through a registered network, on CPU, in
    this process, without its cache."""
    import torch_fidelity

    common = {"feature_extractor": name, "cuda": False, "cache": False, "verbose": False}
    common["save_cpu_ram"] = True  # keeps it from starting four processes
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), **common | options
    )


def registered(scored: Scored) -> tuple[str, dict]:
    """The extractor under a name in torch-fidelity, and the options that make its metrics ours."""
    import torch_fidelity

    name = f"onestep-{scored.extractor.name}-{id(scored)}"
    torch_fidelity.register_feature_extractor(name, hook(scored))
    score = next((q for q in SPLITS_OF if METRICS[q].applies_to(scored.extractor.provided)), None)
    return name, {
        "fid": True,
        "kid": True,
        "prc": True,
        "isc": score is not None,
        "feature_layer_fid": "exact",
        "feature_layer_kid": "standardised",
        "feature_layer_prc": "features",
        "feature_layer_isc": "logits",
        "isc_splits": SPLITS_OF.get(score, 1),
        "samples_shuffle": False,
        "kid_subsets": 1,
        "kid_subset_size": len(scored.views.features),
        "prc_neighborhood": scored.views.neighbours,
    }


def with_torch_fidelity(scored: Scored, ours: dict, folders: list[Path]) -> dict[str, float]:
    import torch_fidelity
    from torch_fidelity.metric_kid import kid_features_to_metric

    count = len(scored.views.features)
    name, options = registered(scored)
    found = torch_fidelity_values(folders, name, **options)
    distance = next(q for q in FRECHET if q in ours)
    values = {
        distance: found[torch_fidelity.KEY_METRIC_FID],
        "kd": 1000 * found[torch_fidelity.KEY_METRIC_KID_MEAN],
        "precision": found[torch_fidelity.KEY_METRIC_PRECISION],
        "recall": found[torch_fidelity.KEY_METRIC_RECALL],
    }
    if score := next((q for q in SPLITS_OF if q in ours), None):
        values[score] = found[torch_fidelity.KEY_METRIC_ISC_MEAN]
    if "cmmd" in ours:
        embeddings = [
            normalize(t.double(), dim=1) for t in (scored.views.features, scored.reference.features)
        ]
        found = kid_features_to_metric(
            *embeddings,
            kid_subsets=1,
            kid_subset_size=count,
            kid_kernel="rbf",
            kid_kernel_rbf_sigma=SIGMA,
            verbose=False,
        )
        values["cmmd"] = 1000 * found[torch_fidelity.KEY_METRIC_KID_MEAN]
    return values


def with_clean_fid(scored: Scored, ours: dict, folders: list[Path]) -> dict[str, float]:
    from cleanfid import fid

    def network(images: Tensor) -> Tensor:
        pixels = _as_ours(images, scored.channels)
        labels = torch.zeros(len(pixels), dtype=torch.int64)
        return scored.extractor.extract(pixels, labels)["features"].double()

    generated, real = (
        fid.get_folder_features(
            str(folder),
            network,
            num_workers=0,
            device=torch.device("cpu"),
            custom_fn_resize=lambda image: image,
            verbose=False,
        )
        for folder in folders
    )
    standardised = [
        scored.reference.standardise(torch.from_numpy(t)).numpy() for t in (generated, real)
    ]
    distance = next(q for q in FRECHET if q in ours)
    return {
        distance: float(fid.fid_from_feats(generated, real)),
        "kd": 1000 * fid.kernel_distance(*standardised, num_subsets=1, max_subset_size=len(real)),
    }


def _markdown(name: str, table: pd.DataFrame, caption: str) -> str:
    compared = table.relative_difference.dropna()
    largest = f"{compared.max():.1e}" if len(compared) else "none"
    text = table.copy()
    for column, form in (
        ("ours", "{:.8g}"),
        ("theirs", "{:.8g}"),
        ("relative_difference", "{:.1e}"),
    ):
        text[column] = [
            "–" if math.isnan(v) else form.format(v) for v in table[column].astype(float)
        ]
    text = text.fillna("–").astype(str)
    body = text.to_markdown(index=False, disable_numparse=True)
    return (
        f"# Agreement with the libraries on {name}\n\n{body}\n\n{caption} Largest relative "
        f"difference: {largest}.\n"
    )
