"""`harness verify-data`: the training images against the published statistics of an FID.

Published statistics are those of the training images, so their Fréchet distance is 0 up to rounding
if the images, the network and its resize are the same here. It is the only test of all three.

A distance d between the two references changes an FID F by at most 2 sqrt(F d) + d, because the
square root of the Fréchet distance is a metric.
"""

import shlex
from pathlib import Path

from harness.config.jobs import Scoring
from harness.data import datasets
from harness.errors import UserError
from harness.evaluation.frechet import BLOCK, Moments, frechet_distance
from harness.evaluation.prepared import check_prepared
from harness.evaluation.references import published_statistics
from harness.features.base import load_extractor, start_checked
from harness.precision import set_precision
from harness.transfers import ahead

# Ports of this network with the same weights agree to about 1e-8 in each of the 2048 features on
# equal inputs (README of mseitzer/pytorch-fid): a distance far below 1e-6, to which another device
# adds less than 1e-5. A slightly different bilinear resize moved features by 1e-3 (issue 17 there):
# a distance of about 2e-3. The tolerance lies between both.
TOLERANCE = 1e-3


def data_distance(scoring: Scoring) -> tuple[float, str]:
    """The Fréchet distance of the training images from the statistics of an experiment, in the
    features of the extractor that these belong to; and what was compared, for messages."""
    set_precision(scoring.device)
    name, statistics, _ = published_statistics(scoring)
    if name is None:
        message = "evaluation.statistics: missing; it names the file to compare the images with"
        raise UserError(message, "missing-key")
    dataset = datasets.load(scoring.data)
    if not len(dataset.train):
        raise UserError(f"data: {dataset.name} has no images to verify", "needs-images")
    extractor = load_extractor(scoring.extractors[name][1], dataset, scoring.device)
    if extractor.unavailable:
        message = f"{name} is unavailable ({extractor.unavailable}); provide its weights"
        raise UserError(f"features.{name}: {message}", "unavailable")
    blocks = dataset.train.blocks(BLOCK)
    started = ahead(lambda block: start_checked(extractor, block[0]), blocks, scoring.device)
    moments = Moments.over(outputs()["features"] for outputs in started)
    distance = frechet_distance(*statistics, *moments.statistics())
    images = f"{len(dataset.train):,} training images of {dataset.name}"
    if len(dataset.held_out):
        images += f" ({len(dataset.held_out):,} others are held out)"
    return distance, f"{images} in {name} from {scoring.evaluation.statistics}"


def verify_data(scoring: Scoring) -> str:
    """A line with the distance; above TOLERANCE it is a `UserError` (code "mismatch")."""
    distance, what = data_distance(scoring)
    line = f"Fréchet distance {distance:.3g} of the {what}"
    if not distance <= TOLERANCE:
        reason = "detector or resize mismatch, or the statistics are of other images"
        raise UserError(f"{line}, above the tolerance {TOLERANCE:g}: {reason}", "mismatch")
    return f"{line}, within the tolerance {TOLERANCE:g}: images, detector and resize agree"


def check_inputs(scoring: Scoring, fingerprint: str, files: list[Path], configfile: Path) -> None:
    """Check that the data and the extractor have been prepared with the experiment's settings and
    files; a `UserError` (code "missing-inputs" or "outdated") names what to run, which trains no
    teacher and no student. fingerprint, files: see `harness.evaluation.prepared.outdated`."""
    name, *_ = published_statistics(scoring)
    if name is None:
        return
    target = scoring.extractors[name][1] / "features.json"
    for path in (scoring.data / "data.json", target):
        if not path.exists():
            command = ["snakemake", "--cores", "8", str(target), "--configfile", str(configfile)]
            message = f"{path} is missing; make it with: {shlex.join(command)}"
            raise UserError(message, "missing-inputs")
    check_prepared(scoring, [name], fingerprint, files, configfile)
