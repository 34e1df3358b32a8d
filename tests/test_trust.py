"""Warnings about networks near chance, in the log, the tables' notes and for the page."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from harness.data.datasets import Dataset
from harness.data.registry import AttributeChecker, Images
from harness.features.base import new_extractor, parse_settings
from harness.features.chance import near_chance, network_warnings, teacher_warnings
from harness.io.records import DataRecord, FeatureRecord
from harness.reporting import trust
from harness.validation import parse_experiment


def dataset(counts, **facts) -> Dataset:
    none = Images(torch.empty(0, 1, 4, 4).byte(), torch.empty(0).long())
    names = tuple(map(str, range(len(counts))))
    return Dataset("x", none, none, names, "0", label_counts=counts, **facts)


@pytest.mark.parametrize(
    ("chance", "count", "limit"),
    [
        (1 / 2, 10**9, 0.55),
        (1 / 3, 10**9, 0.4),
        (1 / 10, 10**9, 0.15),
        (1 / 100, 10**9, 0.015),
        (1 / 3, 72, 1 / 3 + 3 * (2 / 9 / 72) ** 0.5),  # few images: three standard errors
    ],
)
def test_limit_of_chance(chance, count, limit):
    assert near_chance(limit - 1e-6, chance, count)
    assert not near_chance(limit + 1e-6, chance, count)


def test_a_single_class_is_never_near_chance():
    assert not near_chance(1.0, 1.0, 100)


def test_without_held_out_images_nothing_is_near_chance():
    assert not near_chance(0.1, 0.1, 0)


def test_chance_is_the_share_of_the_most_frequent_answer():
    classifier = new_extractor("c", parse_settings({"type": "cnn", "images": 1}))
    clip = new_extractor("c", parse_settings({"type": "clip", "images": 1}))
    assert classifier.chance(dataset((60, 30, 10))) == pytest.approx(0.6)
    # Captions: columns are the class and an attribute; the last two mean the same.
    values = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0]])
    captions = dataset((10, 20, 30, 15), attributes=AttributeChecker(values, ("a",), None))
    assert classifier.chance(captions) == pytest.approx(45 / 75)  # class 1
    assert clip.chance(captions) == pytest.approx(45 / 75)  # the last two
    captions = dataset((10, 40, 15, 10), attributes=AttributeChecker(values, ("a",), None))
    assert classifier.chance(captions) == pytest.approx(50 / 75)
    assert clip.chance(captions) == pytest.approx(40 / 75)


def rows(*values: float, name: str = "cnn", metric: str = "accuracy") -> list[SimpleNamespace]:
    facts = {"metric": metric, "extractor": name, "num_samples": 200}
    return [SimpleNamespace(value=value, **facts) for value in values]


def test_teacher_near_chance_is_reported_with_its_numbers():
    data = dataset((10, 10, 10))
    (line,) = teacher_warnings("edm", rows(30.0, 31.6), data)
    assert "teacher edm" in line and "cnn" in line and "30.8%" in line and "33.3%" in line
    assert not list(teacher_warnings("edm", rows(80.0, 82.0), data))
    assert not list(teacher_warnings("edm", rows(30.0, 31.6, metric="recall"), data))
    assert not list(teacher_warnings("edm", rows(30.0), data, skip={"cnn"}))


def test_only_networks_near_chance_are_reported(tmp_path):
    networks = {}
    for name, accuracy in (("blind", 0.35), ("wrong", 0.0), ("good", 0.9), ("unknown", None)):
        settings = parse_settings({"type": "cnn", "images": 1})
        record = FeatureRecord(name=name, settings={}, held_out_accuracy=accuracy)
        record.write(tmp_path / name / "features.json")
        networks[name] = settings, tmp_path / name
    found = network_warnings(networks, dataset((10, 10, 10)), 300)
    assert list(found) == ["blind", "wrong"]
    assert "35.0%" in found["blind"] and "features.blind.images" in found["blind"]


def test_warnings_of_an_experiment_are_collected(tiny, tmp_path):
    experiment = parse_experiment(tiny, "x", tmp_path)
    table = pd.DataFrame(
        [vars(row) | {"student": "teacher"} for row in rows(10.0, name="tiny-cnn")]
    )
    assert trust.warnings(experiment, table) == []  # before the data have been prepared
    DataRecord(
        name="digits",
        registered=True,
        class_names=list("0123456789"),
        train_images=0,
        held_out_images=359,
        image_shape=[1, 8, 8],
        images_sha256="0",
        sha256="0",
        label_counts=[10] * 10,
    ).write(experiment.paths.data / "data.json")
    record = FeatureRecord(name="tiny-clip", settings={}, held_out_accuracy=0.1)
    record.write(experiment.paths.features("tiny-clip") / "features.json")
    network, teacher = trust.warnings(experiment, table)
    assert network.startswith("tiny-clip is near chance")
    assert teacher.startswith("teacher edm is near chance")
