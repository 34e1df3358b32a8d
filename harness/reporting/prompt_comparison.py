"""Two students prompt by prompt: the same noise, the same text, so every image is its own pair."""

from __future__ import annotations

import math

import pandas as pd

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.errors import UserError
from harness.io.artifacts import read_json, verify
from harness.reporting.intervals import LEVEL

KEYS = ["sample_seed", "image", "prompt"]
SHOWN = 5  # prompts on either side


def read_each(experiment: Experiment, name: str, seed: int) -> pd.DataFrame:
    """What was measured of every image of a student, or of the first teacher: KEYS and a column
    `extractor/quantity` for each."""
    path = experiment.score_path(name, seed)
    if name == "teacher":
        path = experiment.reference_score_path(next(iter(experiment.teachers)))
    if not experiment.data.texts:
        raise UserError(f"{experiment.name} has no prompts")
    if "each" not in (record := read_json(path)):
        raise UserError(f"{path} says nothing of single images; score {name} again")
    file = path.with_name(record["each"]["file"])
    verify(file, record["each"]["sha256"], owner=path)
    return pd.read_csv(file)


def paired(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Mean difference a - b of every quantity with its interval over images: the sampling error
    alone, of one training seed. Columns: quantity, a, b, difference, low, high, images."""
    from scipy.special import stdtrit

    both, rows = a.merge(b, on=KEYS, suffixes=(" a", " b")), []
    for quantity in [c.removesuffix(" a") for c in both.columns if c.endswith(" a")]:
        mine, theirs = (both[f"{quantity} {side}"].astype(float) for side in "ab")
        difference, count = mine - theirs, len(both)
        half = stdtrit(count - 1, (1 + LEVEL) / 2) * difference.std() / math.sqrt(count)
        mean = difference.mean()
        rows.append((quantity, mine.mean(), theirs.mean(), mean, mean - half, mean + half, count))
    return pd.DataFrame(rows, columns=["quantity", "a", "b", "difference", "low", "high", "images"])


def by_prompt(a: pd.DataFrame, b: pd.DataFrame, quantity: str) -> pd.Series:
    """Mean difference a - b of one quantity on each prompt, largest first."""
    both = a.merge(b, on=KEYS, suffixes=(" a", " b"))
    difference = both[f"{quantity} a"].astype(float) - both[f"{quantity} b"].astype(float)
    return difference.groupby(both.prompt).mean().sort_values(ascending=False, kind="stable")


def print_prompts(experiment: Experiment, a: str, b: str, seed: int | None) -> None:
    from tabulate import tabulate

    seed = experiment.training.seeds[0] if seed is None else seed
    tables = [read_each(experiment, name, seed) for name in (a, b)]
    rows = paired(*tables)
    if rows.empty:
        raise UserError(f"nothing was measured of both {a} and {b} on the same images")
    headers = ("quantity", a, b, "difference", "low", "high", "images")
    print(tabulate(rows.itertuples(index=False), headers, tablefmt="github", floatfmt=".4g"))
    print(
        f"\nDifference: {a} - {b}, with its {LEVEL:.0%} interval over pairs of images that have "
        f"the same noise and prompt; training seed {seed}, whose own chance is not in it."
    )
    texts = datasets.load(experiment.data_dir(), images=False).evaluation_prompts.texts
    quantity = rows.quantity.iloc[0]
    order = by_prompt(*tables, quantity)
    for who, part in ((a, order.head(SHOWN)), (b, order.tail(SHOWN)[::-1])):
        print(f"\n{quantity}, prompts on which {who} leads most:")
        for prompt, difference in part.items():
            print(f"  {difference:+.3g}  {texts[prompt]}")
