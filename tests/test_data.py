import json

import pytest
import torch
import yaml

from harness.cli import main
from harness.config.schema import DataSection
from harness.context import Context, Sources
from harness.data import datasets as data
from harness.errors import UserError
from harness.features.aesthetic import KNOWN, UNSEEN
from harness.features.base import load_extractor
from harness.streams import Stream
from harness.students import run as runs

DIGITS = DataSection(name="digits", held_out=0.2)


def test_the_digits_split_is_stratified_fixed_and_complete(tmp_path):
    record = data.prepare(DIGITS, tmp_path)
    digits = data.load(tmp_path)
    assert (len(digits.train), len(digits.held_out)) == (1438, 359)
    assert digits.image_shape == (1, 8, 8) and digits.num_classes == 10
    assert digits.class_names[7] == "seven"
    shares = digits.held_out.labels.bincount() / (
        digits.train.labels.bincount() + digits.held_out.labels.bincount()
    )
    assert ((shares - 0.2).abs() < 0.005).all()
    # Always the same: a change here changes every number of the digits experiment.
    assert digits.held_out.labels[:12].tolist() == HELD_OUT_LABELS
    assert record["sha256"] == digits.sha256 == SHA256
    again = data.prepare(DIGITS, tmp_path / "again")
    assert again["sha256"] == record["sha256"]


SHA256 = "157f4224b56c6fb3c82682e800111ff9cc84d6869f09182992a04475352c82d1"
HELD_OUT_LABELS = [1, 9, 4, 5, 6, 4, 0, 4, 7, 1, 0, 2]


def test_a_large_set_lies_in_shards_that_can_be_carried_one_by_one(tmp_path, monkeypatch):
    data.prepare(DIGITS, tmp_path / "whole")
    whole = data.load(tmp_path / "whole")
    monkeypatch.setattr(data, "SHARD", 40_000)
    record = data.prepare(DIGITS, tmp_path / "shards")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) == len(record["shards"]) == 5
    assert max(file.stat().st_size for file in files) <= 40_000
    parts = data.load(tmp_path / "shards")
    for a, b in ((whole.train, parts.train), (whole.held_out, parts.held_out)):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(UserError, match=r"images-002\.safetensors is damaged or from another run"):
        data.load(tmp_path / "shards")


def test_what_needs_no_images_reads_none(tmp_path):
    data.prepare(DIGITS, tmp_path)
    digits = data.load(tmp_path)
    (tmp_path / "images.safetensors").unlink()
    without = data.load(tmp_path, images=False)
    assert len(without.train) == len(without.held_out) == 0
    for key in ("image_shape", "class_names", "num_classes", "sha256"):
        assert getattr(without, key) == getattr(digits, key)


def test_large_data_stay_on_the_host(monkeypatch):
    """The batch alone goes to the device: here one that has shapes and no numbers."""
    pixels, labels = torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64)
    assert runs.placement(pixels, "meta").type == "meta"
    monkeypatch.setattr(runs, "ON_DEVICE", pixels.nbytes - 1)
    assert runs.placement(pixels, "meta").type == "cpu"
    pairs = {"x": torch.zeros(50, 3, 8, 8), "condition": labels}
    sources = Sources((3, 8, 8), 10, 1.0, pixels, labels, pairs)
    context = Context({}, sources, 0, 0, range(4), "meta")
    for tensors in (context.real(), context.pairs()):
        assert all(t.device.type == "meta" and len(t) == 4 for t in tensors)


def test_no_image_is_on_both_sides():
    labels = torch.arange(100) % 7
    train, held_out = data.stratified_split(labels, 0.3)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(100))


def test_pixels_and_model_space():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = data.to_model_space(pixels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_pixels(x), pixels)
    outside = data.to_pixels(torch.tensor([-3.0, 2.0, 0.0]))
    assert outside.tolist() == [0, 255, 128]


def test_a_damaged_data_set_is_refused_by_name(tmp_path):
    data.prepare(DIGITS, tmp_path)
    path = tmp_path / "images.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"images\.safetensors is damaged"):
        data.load(tmp_path)


def test_a_random_batch_is_what_it_was_when_all_images_were_floats(tmp_path):
    """`Sources` converts the chosen images alone: the same bits, whatever was chosen."""
    data.prepare(DIGITS, tmp_path)
    train = data.load(tmp_path).train
    sources = Sources((1, 8, 8), 10, 1.0, pixels=train.pixels, labels=train.labels)
    index, stream = torch.arange(500), Stream(3, "real")
    images, labels = sources.real(index, stream)
    chosen = stream.integers(index, len(train))
    assert torch.equal(images, (train.pixels.float() / 127.5 - 1)[chosen])
    assert torch.equal(labels, train.labels[chosen])


def test_without_classes_there_are_no_labels():
    pixels, labels = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    pairs = {"x": torch.zeros(5, 1, 8, 8)}
    sources = Sources((1, 8, 8), 0, 1.0, pixels, labels, pairs)
    index, stream = torch.arange(3), Stream(3, "real")
    assert sources.real(index, stream)[1] is None
    assert sources.pairs(index, stream)[2] is None


def test_model_space_is_the_plain_quotient_bit_for_bit():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_model_space(pixels), pixels.float() / 127.5 - 1)


def test_nothing_need_be_held_out(tmp_path):
    data.prepare(DIGITS.model_copy(update={"held_out": 0.0}), tmp_path)
    digits = data.load(tmp_path)
    assert (len(digits.train), len(digits.held_out)) == (1797, 0)
    assert digits.held_out.pixels.shape[1:] == (1, 8, 8)


def test_parts_too_small_for_the_metrics_are_told_before_anything_is_written(tmp_path):
    few = DIGITS.model_copy(update={"held_out": 0.004})  # one of each class: 10
    with pytest.raises(UserError) as caught:
        data.prepare(few, tmp_path, (6, 11))
    assert str(caught.value) == (
        "data: digits has 10 held-out images, and the metrics need 11 or more, or none "
        "(data.held_out: 0)"
    )
    with pytest.raises(UserError, match=r"^data: digits has 1787 training images, and .* 2000 or"):
        data.prepare(few, tmp_path, (2000, 10))
    assert not list(tmp_path.iterdir())
    assert data.prepare(few, tmp_path, (6, 10))["held_out_images"] == 10


def test_the_data_stage_knows_what_the_metrics_need(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny["data"]["held_out"] = 0.004
    tiny["evaluation"]["neighbours"] = 12
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["data", "--configfile", "x.yaml"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: data: digits has 10 held-out images, and the metrics need 13")


@pytest.mark.parametrize("degrade", [*KNOWN.values(), *UNSEEN.values()])
def test_degradations_begin_with_the_image_itself(degrade):
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    noise = torch.randn_like(images)
    none, full = torch.zeros(6, 1, 1, 1), torch.ones(6, 1, 1, 1)
    torch.testing.assert_close(degrade(images, none, noise), images)
    assert not torch.allclose(degrade(images, full, noise), images, atol=0.1)


def test_without_a_held_out_part_there_is_no_floor_and_no_accuracy(workspace):
    config = workspace.config()
    config["data"]["held_out"] = 0
    workspace.write_config(config)
    assert workspace.stage("data").returncode == 0
    folder = workspace.results / "features" / "tiny-cnn"
    digits = data.load(workspace.results / "data")
    extractor = load_extractor(folder, digits)
    assert extractor.held_out_accuracy(extractor.network, digits) is None
    done = workspace.stage("score-references", "edm")
    assert done.returncode == 0, done.stderr
    record = json.loads((workspace.results / "scores" / "teachers" / "edm.json").read_text())
    assert [entry["student"] for entry in record["entries"]] == ["teacher", "teacher-1step"]
    assert {row["num_samples"] for entry in record["entries"] for row in entry["rows"]} == {400}
    assert {p["reference"] for p in record["protocols"].values()} == {"digits-train1797"}


def test_feature_networks_learn_and_say_how_well(finished):
    """Even the tiny ones beat chance by far; the aesthetic head reports both kinds of degradation."""
    for name, chance in (("tiny-cnn", 0.5), ("tiny-critic", 0.3)):
        record = json.loads((finished.results / "features" / name / "features.json").read_text())
        assert record["held_out_accuracy"] > chance
    clip = json.loads((finished.results / "features/tiny-clip/features.json").read_text())
    assert set(clip["aesthetic"]["rank_correlation_known"]) == set(KNOWN)
    assert set(clip["aesthetic"]["rank_correlation_unseen"]) == set(UNSEEN)
