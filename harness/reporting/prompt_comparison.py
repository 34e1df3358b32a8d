"""Two students compared prompt by prompt: the images are pairs with the same noise and text."""

import math

import pandas as pd

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.data.registry import has_texts
from harness.errors import UserError
from harness.io.artifacts import verify
from harness.io.records import ScoreRecord
from harness.reporting.intervals import LEVEL

KEYS = ["sample_seed", "image", "prompt"]
LISTED_PROMPTS = 5  # for each student


def read_per_image(experiment: Experiment, name: str, seed: int) -> pd.DataFrame:
    """The values of each image of a student, or of the first teacher: KEYS and one column
    `extractor/quantity` each."""
    path = experiment.paths.scores(name, seed)
    if name == "teacher":
        path = experiment.paths.reference_scores(next(iter(experiment.teachers)))
    if not has_texts(experiment.data):
        raise UserError(f"{experiment.name} has no prompts", "no-prompts")
    file = ScoreRecord.read(path).per_image
    if file is None:
        raise UserError(f"{path} has no values per image; score {name} again", "missing-scores")
    verify(path.with_name(file.file), file.sha256, owner=path)
    return pd.read_csv(path.with_name(file.file))


def paired(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Mean difference a - b of every quantity with its interval over images (the sampling error of
    one training seed). Columns: quantity, a, b, difference, low, high, images."""
    from scipy.special import stdtrit

    both, rows = a.merge(b, on=KEYS, suffixes=(" a", " b")), []
    for quantity in [c.removesuffix(" a") for c in both.columns if c.endswith(" a")]:
        first, second = (both[f"{quantity} {side}"].astype(float) for side in "ab")
        difference, count = first - second, len(both)
        half = stdtrit(count - 1, (1 + LEVEL) / 2) * difference.std() / math.sqrt(count)
        mean = difference.mean()
        rows.append((quantity, first.mean(), second.mean(), mean, mean - half, mean + half, count))
    return pd.DataFrame(rows, columns=["quantity", "a", "b", "difference", "low", "high", "images"])


def by_prompt(a: pd.DataFrame, b: pd.DataFrame, quantity: str) -> pd.Series:
    """Mean difference a - b of one quantity for each prompt, largest first."""
    both = a.merge(b, on=KEYS, suffixes=(" a", " b"))
    difference = both[f"{quantity} a"].astype(float) - both[f"{quantity} b"].astype(float)
    return difference.groupby(both.prompt).mean().sort_values(ascending=False, kind="stable")


def print_prompts(experiment: Experiment, a: str, b: str, seed: int | None) -> None:
    """Print the paired differences of two students and the prompts with the largest ones."""
    from tabulate import tabulate

    seed = experiment.training.seeds[0] if seed is None else seed
    tables = [read_per_image(experiment, name, seed) for name in (a, b)]
    rows = paired(*tables)
    if rows.empty:
        raise UserError(f"{a} and {b} have no quantity of the same images in common", "no-overlap")
    headers = ("quantity", a, b, "difference", "low", "high", "images")
    print(tabulate(rows.itertuples(index=False), headers, tablefmt="github", floatfmt=".4g"))
    print(
        f"\nDifference: {a} - {b}, with its {LEVEL:.0%} interval over pairs of images with the "
        f"same noise and prompt; training seed {seed} (the training error is not included)."
    )
    texts = datasets.load(experiment.paths.data, images=False).evaluation_prompts.texts
    quantity = rows.quantity.iloc[0]
    order = by_prompt(*tables, quantity)
    best = {a: order.head(LISTED_PROMPTS), b: order.tail(LISTED_PROMPTS)[::-1]}
    for name, prompts in best.items():
        print(f"\n{quantity}, prompts with the largest lead of {name}:")
        for prompt, difference in prompts.items():
            print(f"  {difference:+.3g}  {texts[prompt]}")
