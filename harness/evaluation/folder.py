"""Score images from a folder or zip file by an experiment's protocol."""

from __future__ import annotations

from pathlib import Path

from harness.config.jobs import Scoring
from harness.data.datasets import Images
from harness.data.image_archive import has_labels, read_images
from harness.errors import UserError
from harness.evaluation.checks import minimum_samples
from harness.evaluation.registry import column_name
from harness.evaluation.scorer import Scorer
from harness.io.records import ScoreRow


def score_folder(scoring: Scoring, path: Path) -> list[ScoreRow]:
    """Rows for the images in `path`, in the layout of a data set (`harness.data.image_archive`).

    Labels are required if the experiment has classes, and optional for prompts. The sample counts
    are the experiment's as far as there are enough images, otherwise the number of images.
    """
    scorer = Scorer(scoring)
    data = scorer.dataset
    # With prompts labels are optional, and pretrained networks resize the images.
    prompted = data.evaluation_prompts is not None and data.attributes is None
    labelled = data.num_evaluated > 0 and (not prompted or has_labels(path))
    pixels, labels, _ = read_images(path, labelled, data.num_evaluated or None)
    if not prompted and tuple(pixels.shape[1:]) != data.image_shape:
        size, expected = ("x".join(map(str, s)) for s in (pixels.shape[1:], data.image_shape))
        raise UserError(f"{path}: images are {size}; those of {data.name} are {expected}", "shape")
    minimum = minimum_samples(scoring.evaluation.neighbours)[1]
    if len(pixels) < minimum:
        message = f"{path}: {len(pixels)} images; the metrics need at least {minimum}"
        raise UserError(message, "too-few")
    counts = [n for n in scorer.counts if n <= len(pixels)] or [len(pixels)]
    blocks = Images(pixels, labels).blocks()
    if prompted and not labelled:
        blocks = ((block, None) for block, _ in blocks)
    return scorer.score(blocks, counts).rows


def print_folder(scoring: Scoring, path: Path) -> None:
    from tabulate import tabulate

    lines = []
    for row in score_folder(scoring, path):
        column = column_name(row.metric, row.num_samples, row.extractor)
        lines.append((column, row.status or row.value, row.stderr))
    print(tabulate(lines, ("column", "value", "standard error"), "github", floatfmt=".4g"))
    print(
        f"\n{path} against the training part of {scoring.data_section.name}, scored like the "
        f"students of {scoring.experiment}. How these images were selected is unknown."
    )
