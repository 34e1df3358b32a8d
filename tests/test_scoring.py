"""Scoring: rows, flags and references with stub extractors; resuming; metrics from plug-ins."""

import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config.jobs import Scoring
from harness.config.schema import DataSection, EvaluationSection
from harness.data.datasets import prepare
from harness.data.order import content_order, mixed_order
from harness.data.registry import Images
from harness.errors import UserError
from harness.evaluation import accumulator, references, scorer
from harness.evaluation.accumulator import (
    Checkpoints,
    FeatureAccumulator,
    NearestImages,
    stored_images,
)
from harness.evaluation.agreement import write_images
from harness.evaluation.frechet import frechet_distance, gaussian_statistics, load_statistics
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.evaluation.scorer import Scorer, Scores
from harness.evaluation.stage import print_folder, score_folder
from harness.features.base import FeatureExtractor, new_extractor, parse_settings, provides
from harness.io.records import ScoreRow
from harness.io.shards import TensorShards
from harness.registry import load_plugin
from harness.sampling import sample

# -- resuming -----------------------------------------------------------------------------------


class Extractor:
    """Features and a quantity of its own, from the pixels; counts the images that it is given."""

    name, provided = "stub", frozenset({"features", "brightness"})
    plugin, captions = None, ()

    def __init__(self):
        self.images = 0

    start = FeatureExtractor.start

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


def accumulate(
    folder: Path, stop_after: int | None = None, checkpoints: Checkpoints | None = None
) -> tuple[Extractor, dict]:
    """Everything that is accumulated of a stream, which may break off after some images."""
    extractor = Extractor()
    train = Images(torch.arange(9).repeat(16, 1).T.reshape(9, 1, 4, 4).byte() * 20, torch.zeros(9))
    reference = Reference(extractor.extract(train.pixels, None)["features"], index=torch.arange(9))
    extractor.images = 0
    search, shards = NearestImages("stub", reference, train), TensorShards(folder)
    accumulator = FeatureAccumulator(
        [extractor], Attributes(), 10, search, shards, checkpoints or Checkpoints(0)
    )
    options = {"block": 4, "start": stored_images(shards), "codec": torch.nn.Identity()}
    for block, labels in sample(generate, 22, (1, 4, 4), 4, seed=0, **options):
        if stop_after is not None and extractor.images >= stop_after:
            raise Stop
        accumulator.add(block, labels)
    accumulator.save(ended=True)
    features = accumulator.feature_set("stub", reference, 3)
    tensors = {"labels": features.labels, "classes": features.classes}
    return extractor, accumulator.images() | tensors | features.outputs


def assert_same(one: dict, two: dict) -> None:
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("stop_after", [4, 12, 20])
def test_interrupted_scoring_resumes_with_the_same_numbers(tmp_path, stop_after):
    extractor, whole = accumulate(tmp_path / "whole")
    assert extractor.images == 22 and len(whole["pixels"]) == 10
    with pytest.raises(Stop):
        accumulate(tmp_path / "parts", stop_after)
    assert stored_images(TensorShards(tmp_path / "parts")) == stop_after
    extractor, again = accumulate(tmp_path / "parts")
    assert extractor.images == 22 - stop_after
    assert_same(whole, again)
    assert_same(whole, accumulate(tmp_path / "parts")[1])


def test_a_damaged_shard_is_computed_again(tmp_path):
    _, whole = accumulate(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 6
    shards[2].write_bytes(b"damaged")
    assert stored_images(TensorShards(tmp_path)) == 8
    assert_same(whole, accumulate(tmp_path)[1])


def test_short_jobs_write_nothing(tmp_path):
    checkpoints = Checkpoints(3600)
    accumulate(tmp_path, checkpoints=checkpoints)
    assert not list(tmp_path.rglob("*.safetensors"))
    # A job that has become long saves the end of each stream, too.
    checkpoints.used = True
    accumulate(tmp_path, checkpoints=checkpoints)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert stored_images(TensorShards(tmp_path)) == 22


def test_every_process_starts_at_the_same_image(tmp_path, monkeypatch):
    class Group:
        first = False

        def agree(self, value: float) -> float:
            assert value == 0  # only the first process reads the shards
            return 8.0

    accumulate(tmp_path)
    monkeypatch.setattr(accumulator, "processes", Group)
    assert stored_images(TensorShards(tmp_path)) == 8


# -- rows ---------------------------------------------------------------------------------------

DIM = 6
SHARED = {"kd", "precision", "recall", "density", "coverage", "memorisation", "diversity"}


def stub_extractor(name: str, settings, **facts) -> SimpleNamespace:
    """Features are a projection of the pixels, probabilities their softmax."""

    def extract(pixels, labels=None):
        generator = torch.Generator().manual_seed(len(name))
        flat = pixels.float().flatten(1) / 255
        features = flat @ torch.randn(flat.shape[1], DIM, generator=generator)
        return {"features": features, "probabilities": features.softmax(dim=1)}

    fields = {"name": name, "settings": settings, "provided": provides(settings)}
    fields |= {"unavailable": None, "missing": {}, "alias": None, "pretraining": ()}
    fields |= {
        "plugin": None,
        "captions": (),
        "resize": "none",
        "details": {},
        "hashes": {"weights": "0"},
        "extract": extract,
    }
    stub = SimpleNamespace(**fields | facts)
    stub.start = partial(FeatureExtractor.start, stub)
    return stub


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    """A function that returns the `Scoring` of digits with stub extractors: their types, or their
    settings, and facts by name. Evaluation settings are keywords."""
    section = DataSection(name="digits")
    prepare(section, tmp_path / "data")
    monkeypatch.setattr(references, "DIM", DIM)

    def make(types: dict | None = None, facts: dict | None = None, **evaluation) -> Scoring:
        raw = types or {"cnn": {"type": "cnn", "images": 1}, "inception": {"type": "inception"}}
        settings = {name: parse_settings(value) for name, value in raw.items()}

        def load(folder, dataset, device):
            name, chosen = folder.name, settings[folder.name]
            if chosen.type != "pixels":
                return stub_extractor(name, chosen, **(facts or {}).get(name, {}))
            extractor = new_extractor(name, chosen)
            extractor.hashes = {"weights": "none"}
            extractor.load(None, folder, dataset, device)
            return extractor

        monkeypatch.setattr(scorer, "load_extractor", load)
        section_of = EvaluationSection(extractors=list(raw), **evaluation)
        return Scoring(
            experiment="x",
            evaluation=section_of,
            data=tmp_path / "data",
            data_section=section,
            extractors={name: (value, tmp_path / name) for name, value in settings.items()},
            checkpoint_seconds=15,
            device="cpu",
            fingerprint={"evaluation": section_of.fingerprint(), "features": {}},
        )

    return make


def score_held_out(scorer: Scorer, counts: list[int] | None = None, **options) -> Scores:
    held_out = scorer.dataset.held_out
    return scorer.score([(held_out.pixels, held_out.labels)], counts or [359], **options)


def by_key(rows: list[ScoreRow]) -> dict[tuple[str, str, int], ScoreRow]:
    table = {(row.metric, row.extractor, row.num_samples): row for row in rows}
    assert len(table) == len(rows)
    return table


def metrics_of(rows: list[ScoreRow], extractor: str) -> set[str]:
    return {row.metric for row in rows if row.extractor == extractor}


def test_only_inceptions_distance_is_called_fid(scoring):
    scorer = Scorer(scoring())
    rows = score_held_out(scorer, seed=3).rows
    assert metrics_of(rows, "cnn") == {"fd", "fd-inf", "accuracy", "class-score", *SHARED}
    assert metrics_of(rows, "inception") == {"fid-edm", "fd-inf", "inception-score", *SHARED}
    assert {row.sample_seed for row in rows} == {3} and {row.flag for row in rows} == {""}
    row = by_key(rows)["fid-edm", "inception", 359]
    extract, data = scorer.extractors[1].extract, scorer.dataset
    both = (
        gaussian_statistics(extract(part.pixels)["features"])
        for part in (data.held_out, data.train)
    )
    (mean, covariance), reference = both
    assert row.value == pytest.approx(frechet_distance(*reference, mean, covariance), rel=1e-6)
    assert row.stderr > 0 and len(row.leave_out) == 10
    protocol = scorer.protocols[row.protocol]
    assert protocol["reference"] == "digits-train1438"
    assert "x * 127.5 + 128" in protocol["quantisation"]
    assert "torch-fidelity" in protocol["library"]
    other = scorer.protocols[by_key(rows)["fd", "cnn", 359].protocol]
    assert "torch-fidelity" not in other["library"]
    assert scorer.dimensions == {"cnn": DIM, "inception": DIM}


def test_snapshots_before_the_last_skip_slow_metrics(scoring):
    rows = score_held_out(Scorer(scoring()), final=False).rows
    assert metrics_of(rows, "cnn") == {"fd", "accuracy", "kd", "precision", "recall"}


def test_samples_are_scored_at_the_main_and_the_floors_size(scoring):
    scorer = Scorer(scoring(num_samples=800))
    assert scorer.counts == [800, 359]
    assert Scorer(scoring(num_samples=100)).counts == [100]
    pixels = torch.cat([scorer.dataset.held_out.pixels] * 3)[:800]
    rows = by_key(scorer.score([(pixels, None)]).rows)
    assert {n for _, _, n in rows} == {800, 359}
    assert len(rows["fd", "cnn", 800].leave_out) == 10
    assert len(rows["fd", "cnn", 359].leave_out) == 2  # two disjoint subsets of 359


def test_metrics_over_all_pairs_use_a_fixed_draw_of_a_large_reference(scoring, monkeypatch):
    whole = by_key(score_held_out(Scorer(scoring())).rows)
    monkeypatch.setattr(references, "PAIRWISE_LIMIT", 100)
    for name in {*SHARED}:
        monkeypatch.setitem(METRICS._entries, name, replace(METRICS[name], limit=100))
    scorer = Scorer(scoring())
    assert len(scorer.references["inception"].features) == 100
    rows = by_key(score_held_out(scorer, [359, 120]).rows)
    assert {n for metric, _, n in rows if metric in SHARED} == {100}
    for key in (("fd", "cnn", 359), ("fid-edm", "inception", 359)):
        assert rows[key].value == pytest.approx(whole[key].value, rel=1e-6)
        assert "reference_draw" not in scorer.protocols[rows[key].protocol]
    assert "reference_draw" in scorer.protocols[rows["kd", "inception", 100].protocol]


def test_published_statistics_replace_the_reference_of_inceptions_distance(scoring, tmp_path):
    own = by_key(score_held_out(Scorer(scoring())).rows)
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.ones(DIM), sigma=np.eye(DIM, dtype=np.float32))
    scorer = Scorer(scoring(statistics=str(path)))
    for key, row in by_key(score_held_out(scorer).rows).items():
        changed = key[0] in ("fid-edm", "fd-inf") and key[1] == "inception"
        assert (row == own[key]) == (not changed)
        if key[0] == "fid-edm":
            features = scorer.extractors[1].extract(scorer.dataset.held_out.pixels)["features"]
            expected = frechet_distance(*gaussian_statistics(features), *load_statistics(path))
            assert row.value == pytest.approx(expected, rel=1e-6)
            assert scorer.protocols[row.protocol]["reference"] == "digits-statistics"


def test_unavailable_networks_have_rows_that_say_so(scoring):
    scorer = Scorer(scoring(facts={"inception": {"unavailable": "no weights"}}))
    rows = score_held_out(scorer).rows
    assert metrics_of(rows, "inception") == {"fid-edm", "fd-inf", "inception-score", *SHARED}
    for row in rows:
        missing = row.extractor == "inception"
        assert (row.value is None) == missing
        assert row.status == ("unavailable (no weights)" if missing else None)


def test_a_missing_head_leaves_the_other_metrics(scoring):
    clip = {"type": "open-clip", "model": "ViT-L-14-quickgelu", "aesthetic": ["v1"]}
    missing = {"clip": {"missing": {"aesthetic_v1": "no weights"}}}
    rows = score_held_out(Scorer(scoring({"clip": clip}, missing))).rows
    table = {row.metric: row for row in rows}
    assert table["aesthetic-v1"].status == "unavailable (no weights)"
    assert table["fd"].value > 0 and table["cmmd"].status is None
    assert "clip-score-100-plain" not in table  # no text similarity in the stub's outputs


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"trained_against": ["inception"]}, "trained-on-extractor"),
        ({"trained_against": ["timm/inception"]}, "trained-on-extractor"),
        ({"pretraining": ["imagenet-1k"]}, "shares-pretraining"),
        ({"pretraining": ["coco"], "trained_against": ["resnet"]}, ""),
    ],
)
def test_extractors_of_the_training_are_flagged(scoring, options, flag):
    facts = {"inception": {"pretraining": ("imagenet-1k",), "alias": "timm/inception"}}
    rows = score_held_out(Scorer(scoring(facts=facts)), **options).rows
    assert {row.extractor: row.flag for row in rows} == {"cnn": "", "inception": flag}


def test_small_samples_are_warned_about_once(scoring, caplog):
    scorer = Scorer(scoring())
    part = scorer.dataset.held_out
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scorer.score([(part.pixels[:DIM], part.labels[:DIM])], [DIM])
    assert [record.args or record.message for record in caplog.records] == [
        f"6 samples for 6 features of {name}: the Fréchet distance is mostly bias; compare with "
        "the floor at n = 359"
        for name in ("cnn", "inception")
    ]


def test_values_that_are_not_finite_are_refused(scoring):
    def broken(pixels, labels=None):
        return {
            "features": torch.full((len(pixels), DIM), torch.nan if labels is not None else 1.0)
        }

    scorer = Scorer(scoring(facts={"cnn": {"extract": broken}}))
    with pytest.raises(UserError) as error:
        score_held_out(scorer)
    assert error.value.code == "not-finite"
    blocks = sample(lambda z, *_: z * torch.nan, 4, (1, 8, 8), 10, 0, codec=torch.nn.Identity())
    with pytest.raises(UserError):
        scorer.score(blocks)


def test_a_gpu_extracts_from_a_block_while_the_one_before_is_completed(scoring, monkeypatch):
    """The numbers and the order of the images stay the same."""
    steps = []
    for method in ("start", "complete"):
        plain = getattr(FeatureAccumulator, method)

        def record(*inputs, plain=plain, method=method):
            return steps.append(method) or plain(*inputs)

        monkeypatch.setattr(FeatureAccumulator, method, record)
    rows, orders = [], []
    for device in ("cpu", "cuda"):
        scorer = Scorer(replace(scoring(), device=device))
        steps.clear()
        scores = scorer.score(scorer.dataset.held_out.blocks(150), [359])
        rows.append([row.model_dump() for row in scores.rows])
        orders.append(list(steps))
    assert orders[0] == ["start", "complete"] * 3
    assert orders[1] == ["start", "start", "complete", "start", "complete", "complete"]
    assert rows[0] and str(rows[0]) == str(rows[1])  # nan is not equal to nan


def test_images_nearest_to_training_images_are_returned(scoring):
    scorer = Scorer(scoring())
    scores = score_held_out(scorer, keep=12)
    assert torch.equal(scores.images["pixels"], scorer.dataset.held_out.pixels[:12])
    distance = scores.images["closest_distance"]
    assert len(distance) == 10 and torch.equal(distance, distance.sort().values)
    copies = scorer.dataset.train.pixels[:20]
    images = scorer.score([(copies, None)], [20], keep=0).images
    assert torch.equal(images["closest_training"], copies[:10])
    assert not images["closest_distance"].any()


def test_folder_of_images_has_the_numbers_of_its_images(scoring, tmp_path, capsys):
    made = scoring()
    part = Scorer(made).dataset.held_out
    folder = tmp_path / "samples"
    write_images(part.pixels, folder)

    def label(count: int) -> None:
        entries = [[f"{i:06d}.png", int(y)] for i, y in enumerate(part.labels[:count])]
        (folder / "dataset.json").write_text(json.dumps({"labels": entries}))

    label(len(part))
    expected = by_key(score_held_out(Scorer(made)).rows)
    rows = by_key(score_folder(made, folder))
    assert set(rows) == set(expected)
    for key, row in rows.items():
        same = row.value == pytest.approx(expected[key].value, rel=1e-5)
        if row.metric in ("fd-inf", "inception-score"):  # of subsets, so the order matters
            same = abs(row.value - expected[key].value) < 3 * row.stderr
        assert same or math.isnan(row.value)
    print_folder(made, folder)
    assert "| fd_n359_cnn" in capsys.readouterr().out

    for path in sorted(folder.glob("*.png"))[9:]:
        path.unlink()
    label(9)
    with pytest.raises(UserError) as error:
        score_folder(made, folder)
    assert error.value.code == "too-few"


def test_scores_of_a_folder_do_not_depend_on_names_or_order(scoring, tmp_path):
    """600 images in class folders and under shuffled names. Subsets of consecutive files of class
    folders would have one or two classes, and a distance more than ten times as large."""
    made = scoring({"cnn": {"type": "cnn", "images": 1}}, num_samples=200)
    held, train = Scorer(made).dataset.held_out, Scorer(made).dataset.train
    pixels, labels = torch.cat([held.pixels, train.pixels]), torch.cat([held.labels, train.labels])
    order = labels[:600].argsort(stable=True)
    pixels, labels, names = pixels[order], labels[order], Scorer(made).dataset.class_names
    folders, shuffled = tmp_path / "folders", tmp_path / "shuffled"
    shuffle, entries = torch.randperm(600, generator=torch.Generator().manual_seed(0)), []
    shuffled.mkdir()
    for i, (image, label, place) in enumerate(zip(pixels, labels, shuffle, strict=True)):
        (folders / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folders / names[label] / f"{i:03d}.png")
        Image.fromarray(image[0].numpy()).save(shuffled / f"{place:03d}.png")
        entries.append([f"{place:03d}.png", int(label)])
    (shuffled / "dataset.json").write_text(json.dumps({"labels": entries}))
    first, second = score_folder(made, folders), score_folder(made, shuffled)
    # Values, errors and estimates without each group, bit for bit; nan is not equal to nan.
    assert [str(row) for row in first] == [str(row) for row in second]

    def distance(rows: list[ScoreRow]) -> ScoreRow:
        return by_key(rows)["fd", "cnn", 200]

    by_class = Scorer(made).score([(pixels, labels)], [200]).rows
    random = Scorer(made).score([(pixels[shuffle], labels[shuffle])], [200]).rows
    found, other = distance(first), distance(random)
    assert distance(by_class).value > 3 * found.value
    assert abs(found.value - other.value) < 3 * math.hypot(found.stderr, other.stderr)


def test_mixed_orders_spread_the_classes():
    labels = torch.arange(1000).mul(7).remainder(10).sort().values.clamp_max(7)
    order = mixed_order(labels)
    assert torch.equal(order.sort().values, torch.arange(1000))
    shares = labels.bincount() / 1000
    for part in labels[order].split(100):
        assert ((part.bincount(minlength=8) - 100 * shares).abs() <= 2).all()
    pixels = torch.arange(1000).view(-1, 1, 1, 1).to(torch.uint8)  # 256 images, some of them twice
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    order, other = content_order(pixels, labels), content_order(pixels[shuffle], labels[shuffle])
    assert torch.equal(pixels[order], pixels[shuffle][other])
    assert torch.equal(labels[order], labels[shuffle][other])


# -- statistics files ---------------------------------------------------------------------------

NOT_FINITE = np.eye(3)
NOT_FINITE[0, 0] = np.nan


@pytest.mark.parametrize(
    ("arrays", "dim", "code"),
    [
        ({"mu": np.zeros(3)}, None, "damaged"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, None, "shape"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, 2048, "shape"),
        ({"mu": np.zeros(3), "sigma": NOT_FINITE}, None, "not-finite"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, None, "not-a-covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [2, 1]])}, None, "not-a-covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1]])}, None, "not-a-covariance"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, None, "damaged"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, arrays, dim, code):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError) as error:
        load_statistics(tmp_path / "s.npz", dim)
    assert error.value.code == code
    assert str(tmp_path / "s.npz") in str(error.value) and "\n" not in str(error.value)


def test_files_without_statistics_are_refused(tmp_path):
    (tmp_path / "text.npz").write_bytes(b"text")
    np.save(tmp_path / "one.npy", np.eye(3))
    for name, code in (("text.npz", "damaged"), ("one.npy", "damaged"), ("no", "missing-file")):
        with pytest.raises(UserError) as error:
            load_statistics(tmp_path / name)
        assert error.value.code == code


def test_singular_statistics_in_single_precision_are_read(tmp_path):
    few = np.cov(np.random.default_rng(0).standard_normal((9, 40)), rowvar=False)
    few[3] = few[:, 3] = 0
    for sigma in (few.astype(np.float32), np.zeros((40, 40))):
        np.savez(tmp_path / "s.npz", mu=np.zeros(40), sigma=sigma)
        mean, covariance = load_statistics(tmp_path / "s.npz", 40)
        assert mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (40, 40)


# -- plug-ins -----------------------------------------------------------------------------------


def test_a_metric_of_a_new_output_is_one_file(tmp_path, registries):
    file = tmp_path / "brightness.py"
    file.write_text(
        "from harness.evaluation.feature_set import mean_estimate\n"
        "from harness.evaluation.registry import register\n"
        '@register("brightness", "Brightness", True, requires=("brightness",))\n'
        "def brightness(features):\n"
        '    return mean_estimate(features.outputs["brightness"])\n'
    )
    load_plugin(file)
    metric = METRICS["brightness"]
    assert metric.applies_to({"features", "brightness"}) and not metric.applies_to({"features"})
    assert METRICS.plugin_sha256("brightness") and METRICS.plugin_sha256("fd") is None
    accumulator, pixels = FeatureAccumulator([Extractor()]), torch.full((20, 1, 4, 4), 7).byte()
    accumulator.add(pixels, None)
    features = accumulator.feature_set("stub", Reference(None), 3)
    assert metric.estimate(features).value == 7
    assert list(features.per_image()) == ["brightness"]
