"""Scoring of streams: resuming, and metrics from plug-ins."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.data.datasets import Images
from harness.evaluation import sample_stream
from harness.evaluation.accumulate import FeatureAccumulator, NearestImages
from harness.evaluation.feature_set import Reference
from harness.evaluation.registry import METRICS
from harness.evaluation.sample_stream import Checkpoints, SampleSource, SampleStream
from harness.registry import load_plugin


class Extractor:
    """Features and a quantity of its own, from the pixels; counts the images that it is given."""

    name = "stub"

    def __init__(self):
        self.images = 0

    def extract(self, pixels, labels):
        self.images += len(pixels)
        flat = pixels.flatten(1).float()
        return {"features": flat[:, :3].contiguous(), "brightness": flat.mean(dim=1)}


class Attributes:
    names = ("dark", "bright")

    def check(self, pixels, labels):
        level = pixels.flatten(1).float().mean(dim=1)
        return torch.stack([level < 128, level >= 128], dim=1)

    def classes(self, labels):
        return labels // 2


class Stop(Exception):
    pass


def generate(z, condition, noise):
    return torch.tanh(z)


def stream(folder: Path, seconds: float = 0.0) -> SampleStream:
    source = SampleSource(generate, (1, 4, 4), torch.nn.Identity(), None)
    return SampleStream(source, 0, 22, 4, 4, "cpu", folder, Checkpoints(seconds))


def accumulate(blocks: SampleStream, stop_after: int | None = None) -> tuple[Extractor, dict]:
    """Everything that is accumulated of a stream, which may break off after some images."""
    extractor = Extractor()
    train = Images(torch.arange(9).repeat(16, 1).T.reshape(9, 1, 4, 4).byte() * 20, torch.zeros(9))
    reference = Reference(extractor.extract(train.pixels, None)["features"], index=torch.arange(9))
    extractor.images = 0
    search = NearestImages("stub", reference, train)
    accumulator = FeatureAccumulator([extractor], Attributes(), 10, search, blocks)
    for pixels, labels in blocks:
        if stop_after is not None and extractor.images >= stop_after:
            raise Stop
        accumulator.add(pixels, labels)
    accumulator.finish()
    features = accumulator.feature_set("stub", reference, 3)
    tensors = {"labels": features.labels, "classes": features.classes}
    return extractor, accumulator.images() | tensors | features.outputs


def assert_same(one: dict, two: dict) -> None:
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stop_after", [4, 12, 20])
def test_interrupted_scoring_resumes_with_the_same_numbers(tmp_path, stop_after):
    extractor, whole = accumulate(stream(tmp_path / "whole"))
    assert extractor.images == 22 and len(whole["pixels"]) == 10
    with pytest.raises(Stop):
        accumulate(stream(tmp_path / "parts"), stop_after)
    resumed = stream(tmp_path / "parts")
    assert resumed.start == stop_after
    extractor, again = accumulate(resumed)
    assert extractor.images == 22 - stop_after
    assert_same(whole, again)
    assert_same(whole, accumulate(stream(tmp_path / "parts"))[1])


def test_a_damaged_shard_is_computed_again(tmp_path):
    _, whole = accumulate(stream(tmp_path))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 6
    shards[2].write_bytes(b"damaged")
    resumed = stream(tmp_path)
    assert resumed.start == 8
    assert_same(whole, accumulate(resumed)[1])


def test_short_jobs_write_nothing(tmp_path, monkeypatch):
    blocks = stream(tmp_path / "short", seconds=3600)
    accumulate(blocks)
    assert not list(tmp_path.rglob("*.safetensors"))
    # A job that has become long saves the end of each stream, too.
    blocks.checkpoints.used = True
    accumulate(blocks)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert stream(tmp_path / "short").start == 22


def test_every_process_starts_at_the_same_image(tmp_path, monkeypatch):
    class Group:
        first = False

        def agree(self, value: float) -> float:
            assert value == 0  # only the first process reads the shards
            return 8.0

    accumulate(stream(tmp_path))
    monkeypatch.setattr(sample_stream, "processes", Group)
    assert stream(tmp_path).start == 8


@pytest.fixture
def metrics() -> Iterator[None]:
    """Restore the registry after a test that adds to it."""
    METRICS.names()
    entries, sources = dict(METRICS._entries), dict(METRICS._sources)
    yield
    METRICS._entries, METRICS._sources = entries, sources


def test_a_metric_of_a_new_output_is_one_file(tmp_path, metrics):
    file = tmp_path / "brightness.py"
    file.write_text(
        "from harness.evaluation.estimates import mean_estimate\n"
        "from harness.evaluation.registry import register\n"
        '@register("brightness", "Brightness", True, requires=("brightness",))\n'
        "def brightness(features):\n"
        '    return mean_estimate(features.outputs["brightness"])\n'
    )
    load_plugin(file)
    metric = METRICS["brightness"]
    assert metric.applies_to({"features", "brightness"}) and not metric.applies_to({"features"})
    assert METRICS.plugin("brightness") == file and METRICS.plugin("fd") is None
    accumulator, pixels = FeatureAccumulator([Extractor()]), torch.full((20, 1, 4, 4), 7).byte()
    accumulator.add(pixels, None)
    features = accumulator.feature_set("stub", Reference(None), 3)
    assert metric.estimate(features).value == 7
    assert list(features.per_image()) == ["brightness"]
