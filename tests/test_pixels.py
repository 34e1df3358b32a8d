"""Metrics of pixels and of image-text pairs, and the selection of metrics."""

import json
import math
from dataclasses import replace

import pytest
import torch

from harness.data.datasets import Dataset
from harness.data.registry import Images, Prompts
from harness.errors import ConfigError, UserError
from harness.evaluation.accumulator import Checkpoints, FeatureAccumulator, stored_images
from harness.evaluation.agreement import write_images
from harness.evaluation.checks import check_pixels
from harness.evaluation.feature_set import mean_estimate
from harness.evaluation.fingerprints import fingerprint
from harness.evaluation.references import Reference, load_reference
from harness.evaluation.registry import METRICS, register, register_per_image
from harness.evaluation.scorer import Scorer
from harness.evaluation.selection import criterion
from harness.evaluation.stage import score_folder
from harness.features.base import new_extractor, parse_settings
from harness.features.pixels import PerImage, PixelExtractor
from harness.io.artifacts import digest
from harness.io.shards import TensorShards
from harness.registry import load_plugin
from harness.validation import parse_experiment
from tests.conftest import DATA
from tests.test_scoring import by_key, metrics_of, score_held_out, scoring  # noqa: F401

TYPES = {"cnn": {"type": "cnn", "images": 1}, "pixels": {"type": "pixels"}}


def brightness(images):
    return images.pixels.float().mean(dim=(1, 2, 3)) / 255


@pytest.fixture
def own(registries) -> list[int]:
    """Metrics of a plug-in. The sizes of the batches of "bright" are returned."""
    sizes = []

    @register_per_image("bright", "Brightness", True)
    def bright(images):
        sizes.append(len(images.pixels))
        return brightness(images)

    @register_per_image("named", "Named", None, texts=True, final_only=True)
    def named(images):
        return torch.tensor([float(len(text)) for text in images.texts])

    @register("lightest", "Lightest pixel", None, requires=("pixels",), final_only=True)
    def lightest(features):
        return features.outputs["pixels"].amax()

    return sizes


def test_per_image_metric_is_the_mean_with_its_error(scoring, own):  # noqa: F811
    made = scoring(TYPES, metrics=["fd", "bright"])
    scorer = Scorer(made)
    rows = score_held_out(scorer, seed=3).rows
    assert metrics_of(rows, "pixels") == {"bright"} and metrics_of(rows, "cnn") == {"fd"}
    row = by_key(rows)["bright", "pixels", 359]
    expected = mean_estimate(scorer.dataset.held_out.pixels.float().mean(dim=(1, 2, 3)) / 255)
    assert row.value == pytest.approx(expected.value)
    assert row.stderr == pytest.approx(expected.stderr)
    assert row.leave_out == pytest.approx(expected.leave_out)
    assert max(own) <= 64 and sum(own) == 359  # memory is bounded, and no image is read twice
    assert scorer.protocols[row.protocol]["settings"] == {"average": "mean over images"}
    assert scorer.dimensions.keys() == {"cnn"} and scorer.nearest_in == "cnn"


def test_pixels_have_no_reference_and_no_distances(scoring, own):  # noqa: F811
    scorer = Scorer(scoring(TYPES))
    rows = score_held_out(scorer).rows
    assert scorer.references["pixels"].features is None
    assert metrics_of(rows, "pixels") == {"bright", "named", "lightest"}
    assert by_key(rows)["lightest", "pixels", 359].value == scorer.dataset.held_out.pixels.max()


def test_folder_of_images_gets_metrics_of_pixels_and_of_its_texts(scoring, own, tmp_path):  # noqa: F811
    made = scoring(TYPES)
    part = Scorer(made).dataset.held_out
    write_images(part.pixels[:40], tmp_path / "samples")
    entries = [[f"{i:06d}.png", int(y)] for i, y in enumerate(part.labels[:40])]
    (tmp_path / "samples" / "dataset.json").write_text(json.dumps({"labels": entries}))
    rows = by_key(score_folder(made, tmp_path / "samples"))
    brightness = part.pixels[:40].float().mean().item() / 255
    assert rows["bright", "pixels", 40].value == pytest.approx(brightness)
    assert rows["named", "pixels", 40].value > len("a photo of a ")


def test_snapshots_before_the_last_skip_slow_metrics_of_pixels(scoring, own):  # noqa: F811
    scorer = Scorer(scoring(TYPES))
    assert metrics_of(score_held_out(scorer, final=False).rows, "pixels") == {"bright"}
    pixels = scorer.extractors[1]
    assert pixels.functions.keys() == {"bright"} and not pixels.stores_pixels
    assert scorer.per_image_metrics(final=False).keys() == {"bright"}
    assert scorer.per_image_metrics(final=True).keys() == {"bright", "lightest", "named"}


def test_a_metric_of_pixels_can_select_snapshots(scoring, own):  # noqa: F811
    made = scoring(TYPES, metrics=["bright"], main_metric="bright", selection_seed=9)
    chosen = criterion(made)
    assert (chosen.extractor, chosen.metric.name) == ("pixels", "bright")
    scorer = Scorer(made)
    scorer.check_available(chosen)
    (row,) = score_held_out(scorer, only=chosen._replace(num_samples=300)).rows
    assert (row.metric, row.num_samples) == ("bright", 300)


def dataset(**facts) -> Dataset:
    none = Images(torch.empty(0, 1, 4, 4).byte(), torch.empty(0).long())
    return Dataset("x", none, none, **{"class_names": ("cat", "dog"), "sha256": "0"} | facts)


def pixel_extractor(data: Dataset, *names: str) -> PixelExtractor:
    extractor = new_extractor("pixels", parse_settings({"type": "pixels"}))
    extractor.load(None, None, data, "cpu")
    functions = {name: METRICS[name] for name in names}
    extractor.functions = {
        n: PerImage(m.per_image, None, "texts" in m.requires) for n, m in functions.items()
    }
    return extractor


@pytest.mark.parametrize(
    ("facts", "lengths"),
    [
        ({}, [len("a photo of a dog"), len("a photo of a cat")]),
        ({"evaluation_prompts": Prompts(("one", "three"), "0")}, [5, 3]),
        ({"class_names": ("0", "1")}, None),  # a number is not a description
    ],
)
def test_texts_are_prompts_or_captions_of_classes(own, facts, lengths):
    extractor = pixel_extractor(dataset(**facts), "named")
    pixels, labels = torch.zeros(2, 1, 4, 4).byte(), torch.tensor([1, 0])
    outputs = extractor.extract(pixels, labels)
    assert outputs.keys() == ({"named"} if lengths else set())
    assert lengths is None or outputs["named"].tolist() == lengths
    assert not extractor.extract(pixels, None)  # unknown labels, as of a folder of images
    accumulator = FeatureAccumulator([extractor])
    accumulator.add(pixels, labels)
    if lengths:
        features = accumulator.feature_set("pixels", Reference(None), 3)
        assert [len(text) for text in features.texts] == lengths


def test_interrupted_scoring_computes_no_value_twice(own, tmp_path):
    pixels = torch.arange(22 * 16).reshape(22, 1, 4, 4).byte()

    def accumulate(start: int, stop: int) -> FeatureAccumulator:
        extractor = pixel_extractor(dataset(), "bright")
        extractor.stores_pixels = True
        shards = TensorShards(tmp_path)
        accumulator = FeatureAccumulator([extractor], shards=shards, checkpoints=Checkpoints(0))
        for block in pixels[start:stop].split(4):
            accumulator.add(block, None)
        return accumulator

    accumulate(0, 12)
    start = stored_images(TensorShards(tmp_path))
    features = accumulate(start, 22).feature_set("pixels", Reference(None), 3)
    assert start == 12 and sum(own) == 22
    assert torch.equal(features.outputs["pixels"], pixels)
    expected = pixels.float().mean(dim=(1, 2, 3)).double() / 255
    torch.testing.assert_close(features.outputs["bright"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "code"),
    [(lambda n: torch.zeros(n, 1), "outputs"), (lambda n: [math.nan] * n, "not-finite")],
)
def test_faulty_values_are_refused_with_the_metrics_name(own, values, code):
    register_per_image("faulty", "Faulty", None)(lambda images: values(len(images.pixels)))
    with pytest.raises(UserError, match="'faulty'") as error:
        pixel_extractor(dataset(), "faulty").extract(torch.zeros(3, 1, 4, 4).byte())
    assert error.value.code == code


def test_function_that_changes_its_batch_leaves_the_samples(own):
    register_per_image("clears", "Clears", None)(lambda images: images.pixels.zero_()[:, 0, 0, 0])
    pixels = torch.ones(3, 1, 4, 4).byte()
    pixel_extractor(dataset(), "clears").extract(pixels)
    assert pixels.all()


def test_pixels_beyond_the_memory_are_refused(own):
    check_pixels(METRICS["bright"], 1 << 40)
    check_pixels(METRICS["lightest"], 1 << 31)
    with pytest.raises(UserError) as error:
        check_pixels(METRICS["lightest"], (1 << 31) + 1)
    assert error.value.code == "too-large" and "register_per_image" in str(error.value)


def test_example_metrics_equal_their_formulas(registries):
    load_plugin(DATA / "example" / "metrics.py")
    red, grey = torch.zeros(2, 3, 4, 4).byte(), torch.full((2, 3, 4, 4), 9).byte()
    red[:, 0] = 200
    pixels = torch.cat([red, grey])
    values = pixel_extractor(dataset(), "saturation").extract(pixels)["saturation"]
    assert values.tolist() == [1, 1, 0, 0]
    stripes = torch.zeros(2, 1, 4, 4).byte()
    stripes[0, :, ::2], stripes[1, :, :, ::2] = 200, 200
    data = dataset(class_names=("horizontal", "vertical"))
    for labels, expected in (([0, 1], [100, 100]), ([1, 1], [0, 100])):
        extracted = pixel_extractor(data, "direction").extract(stripes, torch.tensor(labels))
        assert extracted["direction"].tolist() == expected
    x, y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (40, 30))
    accumulator = FeatureAccumulator([Given(x)])
    accumulator.add(torch.zeros(40, 1, 1, 1).byte(), None)
    features = accumulator.feature_set("given", Reference(y), 3)
    found = METRICS["energy-distance"].estimate(features)
    both = [(a - b).norm().item() for a in x for b in y]
    within = [
        sum((a - b).norm().item() for a in z for b in z) / (len(z) * (len(z) - 1)) for z in (x, y)
    ]
    assert found.value == pytest.approx(2 * sum(both) / len(both) - sum(within), rel=1e-5)
    assert found.stderr > 0 and len(found.leave_out) == 10


class Given:
    """An extractor with given features."""

    name, provided, plugin, captions = "given", frozenset({"features"}), None, ()

    def __init__(self, features):
        self.features = features

    def start(self, pixels, labels):
        return lambda: {"features": self.features}


# -- selection of metrics -----------------------------------------------------------------------


def test_selection_decides_fingerprints_by_what_it_selects(scoring):  # noqa: F811
    whole = fingerprint(scoring())
    names = list(whole["metrics"])
    assert digest(fingerprint(scoring(metrics=names[::-1]))) == digest(
        fingerprint(scoring(metrics=names))
    )
    assert fingerprint(scoring(metrics=["fd", "kd"]))["metrics"].keys() == {"fd", "kd"}


def test_default_selection_changes_no_fingerprint(tiny, tmp_path):
    experiment = parse_experiment(tiny, "x", tmp_path)
    whole = fingerprint(experiment.scoring())
    assert "metrics" not in whole["evaluation"]
    uncaptioned = [n for n in whole["metrics"] if "attributes_correct" not in METRICS[n].needs]
    tiny["evaluation"]["metrics"] = uncaptioned
    selected = fingerprint(parse_experiment(tiny, "x", tmp_path).scoring())
    assert selected == whole | {"metrics": dict.fromkeys(uncaptioned)}


@pytest.mark.parametrize(
    ("evaluation", "key", "code"),
    [
        ({"metrics": ["fd", "recal"]}, "evaluation.metrics", "unknown-name"),
        ({"metrics": ["fd", "kd", "fd"]}, "evaluation.metrics", "invalid-value"),
        ({"metrics": []}, "evaluation.metrics", "invalid-value"),
        ({"metrics": ["fd", "inception-score"]}, "evaluation.metrics", "unsupported"),
        ({"metrics": ["fd", "bright"]}, "evaluation.metrics", "unsupported"),
        ({"metrics": ["fd", "attribute-accuracy"]}, "evaluation.metrics", "unsupported"),
        ({"metrics": ["kd"]}, "evaluation.main_metric", "not-selected"),
        ({"main_metric": "bright"}, "evaluation.main_metric", "unsupported"),
        ({"metrics": ["fd"], "extractors": ["tiny-cnn"] * 2 + ["tiny-clip"]},
         "evaluation.extractors", "invalid-value"),
        ({"extractors": ["tiny-cnn", "pixels"]}, "evaluation.extractors", "too-few"),
    ],
)  # fmt: skip
def test_errors_in_the_selection_are_reported_in_one_line(tiny, own, evaluation, key, code):
    tiny["features"]["pixels"] = {"type": "pixels"}
    tiny["evaluation"] |= evaluation
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "x")
    assert [(p.key, p.code) for p in error.value.problems] == [(key, code)]


def test_claims_need_selected_metrics(tiny):
    claim = {"claim": "c", "source": "s", "reported": "r", "better": "sid", "worse": "sim"}
    tiny["claims"] = [claim, claim | {"metric": "recall"}]
    tiny["evaluation"]["metrics"] = ["fd", "kd"]
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "x")
    assert [(p.key, p.code) for p in error.value.problems] == [("claims.1.metric", "not-selected")]


# -- plug-ins that change -----------------------------------------------------------------------

NETWORK = """
from typing import Literal
import torch
from harness.config.schema import FeatureSettings
from harness.features.base import FEATURES, FeatureExtractor

@FEATURES.register("own")
class Own(FeatureExtractor):
    class Settings(FeatureSettings):
        type: Literal["own"]
        scale: float = 1.0
    provided = frozenset({"features", "fd"})
    def make(self, job): pass
    def load(self, record, folder, dataset, device): pass
    def extract(self, pixels, labels=None):
        return {"features": FACTOR * self.settings.scale * torch.ones(len(pixels), 2)}
"""


def test_reference_features_follow_the_plugin_and_its_settings(
    scoring,  # noqa: F811
    tmp_path,
    registries,
    monkeypatch,
):
    scorer = Scorer(scoring(TYPES))
    file, found = tmp_path / "own.py", []
    for factor, scale in ((1, 1.0), (2, 1.0), (2, 3.0)):
        monkeypatch.setattr("harness.registry._plugins", {})
        file.write_text(NETWORK.replace("FACTOR", str(factor)))
        load_plugin(file)
        extractor = new_extractor("own", parse_settings({"type": "own", "scale": scale}))
        extractor.hashes = {"weights": "none"}
        extractors = {"own": (extractor.settings, tmp_path)}
        made = replace(scorer.scoring, extractors=extractors)
        reference = load_reference(made, extractor, scorer.dataset, None)
        found.append(reference.features[0, 0].item())
    assert found == [1, 2, 6]


def test_protocols_contain_the_hash_of_a_plugin(scoring, registries, tmp_path):  # noqa: F811
    load_plugin(DATA / "example" / "metrics.py")
    scorer = Scorer(scoring(TYPES, metrics=["fd", "saturation"]))
    rows = by_key(score_held_out(scorer).rows)
    protocol = scorer.protocols[rows["saturation", "pixels", 359].protocol]
    assert protocol["plugin_sha256"] == {"metric": METRICS.plugin_sha256("saturation")}
    assert "plugin_sha256" not in scorer.protocols[rows["fd", "cnn", 359].protocol]
