"""Images from elsewhere by an experiment's protocol: a folder or zip of samples, no run of ours."""

from __future__ import annotations

from pathlib import Path

from harness.config.experiment import Experiment
from harness.data.datasets import Images
from harness.data.image_archive import has_labels, read_images
from harness.errors import UserError
from harness.evaluation.checks import minimum_samples
from harness.evaluation.columns import column_name
from harness.evaluation.score import Scorer


def score_folder(experiment: Experiment, path: Path) -> list[dict]:
    """Rows for the images in `path`, which lie as a data set's would (`image_archive`), with
    labels where the experiment has classes. At the experiment's sample counts that they suffice
    for, else all of them."""
    scorer = Scorer(experiment)
    d = scorer.dataset
    # Of texts there need not be any, and networks from elsewhere bring images to their own size.
    texts = d.evaluation_prompts is not None and not d.attributes
    known = d.num_evaluated > 0 and (not texts or has_labels(path))
    pixels, labels, _ = read_images(path, known, d.num_evaluated or None)
    if not texts and tuple(pixels.shape[1:]) != d.image_shape:
        mine, theirs = ("x".join(map(str, shape)) for shape in (pixels.shape[1:], d.image_shape))
        raise UserError(f"{path}: its images are {mine}, those of data {d.name} {theirs}")
    least = minimum_samples(experiment.evaluation.neighbours)[1]
    if len(pixels) < least:
        raise UserError(f"{path}: {len(pixels)} images; the metrics need {least} or more")
    counts = [n for n in scorer.counts() if n <= len(pixels)] or [len(pixels)]
    blocks = Images(pixels, labels).blocks()
    return scorer.score(((x, y if known or not texts else None) for x, y in blocks), counts)


def print_folder(experiment: Experiment, path: Path) -> None:
    from tabulate import tabulate

    rows = [
        (
            column_name(row["metric"], row["num_samples"], row["extractor"]),
            row.get("status", row["value"]),
            row["stderr"],
        )
        for row in score_folder(experiment, path)
    ]
    print(tabulate(rows, ("column", "value", "standard error"), tablefmt="github", floatfmt=".4g"))
    print(
        f"\n{path} against the training part of {experiment.data.name}, as {experiment.name} "
        "scores its students; how these images were chosen and labelled, nothing here can tell."
    )
