"""Warnings about networks that hardly do better than guessing: their numbers rank nothing.

An accuracy is near chance if it exceeds the accuracy of the best constant answer by less than
three standard errors, or by less than a margin: a tenth of the distance to 100%, but at most
half of the chance. So the limit is at least 55% with two balanced classes, 40% with three, 15% with
ten and 1.5% with a hundred.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.data.datasets import Dataset
from harness.features.base import new_extractor
from harness.io.records import FeatureRecord


def near_chance(accuracy: float, chance: float, count: int) -> bool:
    """Whether an accuracy on `count` images is near `chance`. Both are fractions. With a single
    answer, chance is 1 and there is nothing to judge; neither is there without images."""
    if not count:
        return False
    error = math.sqrt(chance * (1 - chance) / count)
    margin = max(3 * error, min((1 - chance) / 10, chance / 2))
    return chance < 1 and accuracy < chance + margin


def network_warning(name: str, accuracy: float, chance: float, count: int) -> str | None:
    """A line about a network trained in the workflow if its accuracy on `count` held-out images is
    near `chance`; otherwise None."""
    if not near_chance(accuracy, chance, count):
        return None
    return (
        f"{name} is near chance: it recognises {accuracy:.1%} of {count:,} held-out images; "
        f"guessing recognises {chance:.1%}. Rankings in its features mean little; train it longer "
        f"(features.{name}.images) or check the labels"
    )


def network_warnings(
    networks: Mapping[str, tuple[Any, Path]], dataset: Dataset, held_out: int
) -> dict[str, str]:
    """The lines about all feature networks near chance, by name. networks: settings and folder of
    each. held_out: number of held-out images; `dataset` may be loaded without images."""
    warnings = {}
    for name, (settings, folder) in networks.items():
        extractor = new_extractor(name, settings)
        record = FeatureRecord.read_optional(folder / "features.json")
        if not extractor.trained or record is None or record.held_out_accuracy is None:
            continue
        chance = extractor.chance(dataset)
        if line := network_warning(name, record.held_out_accuracy, chance, held_out):
            warnings[name] = line
    return warnings


def teacher_warnings(
    teacher: str, rows: Iterable[Any], dataset: Dataset, skip: Collection[str] = ()
) -> Iterator[str]:
    """Lines about a teacher whose class accuracy is near chance, one for each classifier. rows: its
    numbers, with `metric`, `extractor`, `num_samples` and `value` (in %). skip: classifiers that
    are near chance themselves."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.metric == "accuracy" and row.extractor not in skip and row.value is not None:
            by_count = values.setdefault(row.extractor, {})
            by_count.setdefault(int(row.num_samples), []).append(row.value / 100)
    if values:  # conditions are balanced, classes only if captions have equally many of each
        classes = dataset.classes(torch.arange(dataset.num_evaluated))
        chance = classes.bincount().max().item() / len(classes)
    for name, by_count in values.items():
        count, found = max(by_count.items())
        accuracy = sum(found) / len(found)
        if near_chance(accuracy, chance, count * len(found)):
            yield (
                f"teacher {teacher} is near chance: {name} finds the requested class in "
                f"{accuracy:.1%} of its samples; guessing finds it in {chance:.1%}. The students "
                "imitate it, so their ranking means little; train it longer "
                f"(teachers.{teacher}.images) or check its source and labels"
            )
