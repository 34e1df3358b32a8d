import hashlib
import json

import pytest
import torch
import yaml

from harness.cli import main
from harness.config.schema import DataSection
from harness.context import Context, TrainingData
from harness.data import datasets as data
from harness.data.registry import DATASETS, DataSource, data_source, has_texts, stratified_split
from harness.denoiser import to_model_space, to_pixels
from harness.errors import UserError
from harness.features.aesthetic import KNOWN, UNSEEN
from harness.features.base import load_extractor
from harness.streams import Stream

DIGITS = DataSection(name="digits", held_out=0.2)


def test_the_digits_split_is_stratified_and_fixed(tmp_path):
    record = data.prepare(DIGITS, tmp_path)
    digits = data.load(tmp_path)
    assert (len(digits.train), len(digits.held_out)) == (1438, 359)
    assert digits.image_shape == (1, 8, 8) and digits.num_classes == 10
    assert digits.class_names[7] == "seven" and "digit {}" in digits.caption_templates[0]
    shares = digits.held_out.labels.bincount() / (
        digits.train.labels.bincount() + digits.held_out.labels.bincount()
    )
    assert ((shares - 0.2).abs() < 0.005).all()
    # A change here changes every number of the digits experiment.
    assert digits.held_out.labels[:12].tolist() == HELD_OUT_LABELS
    found = hashlib.sha256()
    for part in (digits.train, digits.held_out):
        found.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
    assert found.hexdigest() == SHA256
    assert data.prepare(DIGITS, tmp_path / "again").sha256 == record.sha256 == digits.sha256


SHA256 = "7b8339caaca356330e6634f4ead0d2e3cfae666fb07de1ee3883be5f7ccdf2fa"
HELD_OUT_LABELS = [1, 9, 4, 5, 6, 4, 0, 4, 7, 1, 0, 2]


def test_large_data_sets_are_stored_in_several_files(tmp_path, monkeypatch):
    data.prepare(DIGITS, tmp_path / "whole")
    whole = data.load(tmp_path / "whole")
    monkeypatch.setattr(data, "SHARD", 40_000)
    data.prepare(DIGITS, tmp_path / "shards")
    files = sorted((tmp_path / "shards").rglob("*.safetensors"))
    assert len(files) == 5
    assert max(file.stat().st_size for file in files) <= 40_000
    parts = data.load(tmp_path / "shards")
    for a, b in ((whole.train, parts.train), (whole.held_out, parts.held_out)):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(UserError, match=f"{files[2].name}.*delete {tmp_path}/shards ") as error:
        data.load(tmp_path / "shards")
    assert error.value.code == "damaged"
    data.prepare(DIGITS.model_copy(update={"held_out": 0.5}), tmp_path / "shards")
    assert len(data.load(tmp_path / "shards").held_out) == 898


def test_repeated_prompts_are_reported(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    section = DataSection(name="x", image_shape=(3, 4, 4), prompts=str(tmp_path / "prompts.txt"))
    data.prepare(section, tmp_path / "data")
    assert "1 of 3 prompts repeat an earlier one" in caplog.text
    assert data.load(tmp_path / "data").prompts.texts == ("a cat", "a dog", "a cat")


def test_loading_without_images_reads_no_image_file(tmp_path):
    data.prepare(DIGITS, tmp_path)
    digits = data.load(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    without = data.load(tmp_path, images=False)
    assert len(without.train) == len(without.held_out) == 0
    for key in ("image_shape", "class_names", "num_classes", "sha256", "images_sha256"):
        assert getattr(without, key) == getattr(digits, key)


def test_a_registered_data_set_is_used_by_name(tmp_path, monkeypatch):
    class Squares(DataSource):
        image_shape, class_names = (1, 2, 2), ("dark", "light")

        def read(self):
            train, test = (
                data.Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2)
                for _ in range(2)
            )
            return train, test, self.class_names

    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    DATASETS.register("squares")(Squares)
    section = DataSection(name="squares")
    assert data_source(section).image_shape == (1, 2, 2)
    assert data_source(section).num_classes == 2 and not has_texts(section)
    data.prepare(section, tmp_path)
    assert data.load(tmp_path).class_names == ("dark", "light")


def test_large_data_sets_stay_on_the_host(monkeypatch):
    """Only the batch moves to the device, here the meta device."""
    pixels, labels = torch.zeros(50, 3, 8, 8, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64)
    assert data.placement(pixels, "meta").type == "meta"
    monkeypatch.setattr(data, "ON_DEVICE", pixels.nbytes - 1)
    assert data.placement(pixels, "meta").type == "cpu"
    pairs = {"x": torch.zeros(50, 3, 8, 8), "condition": labels}
    sources = TrainingData((3, 8, 8), 10, 1.0, pixels, labels, pairs)
    context = Context({}, sources, 0, 0, range(4), "meta")
    for tensors in (context.real(), context.pairs()):
        assert all(t.device.type == "meta" and len(t) == 4 for t in tensors)


def test_parts_of_a_split_are_disjoint_and_complete():
    labels = torch.arange(100) % 7
    train, held_out = stratified_split(labels, 0.3)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(100))


def test_pixels_and_model_space():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_space(pixels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_pixels(x), pixels)
    outside = to_pixels(torch.tensor([-3.0, 2.0, 0.0]))
    assert outside.tolist() == [0, 255, 128]


def test_converting_a_batch_equals_converting_all_images(tmp_path):
    data.prepare(DIGITS, tmp_path)
    train = data.load(tmp_path).train
    sources = TrainingData((1, 8, 8), 10, 1.0, pixels=train.pixels, labels=train.labels)
    images, labels = Context({}, sources, 3, 0, range(500)).real()
    chosen = Stream(3, "", 0, "real").integers(torch.arange(500), len(train))
    assert torch.equal(images, (train.pixels.float() / 127.5 - 1)[chosen])
    assert torch.equal(labels, train.labels[chosen])


def test_labels_are_none_without_classes():
    pixels, labels = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64)
    pairs = {"x": torch.zeros(5, 1, 8, 8)}
    sources = TrainingData((1, 8, 8), 0, 1.0, pixels, labels, pairs)
    context = Context({}, sources, 3, 0, range(3))
    assert context.real()[1] is None
    assert context.pairs()[2] is None


def test_model_space_equals_the_quotient_exactly():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_model_space(pixels), pixels.float() / 127.5 - 1)


def test_held_out_part_may_be_empty(tmp_path):
    data.prepare(DIGITS.model_copy(update={"held_out": 0.0}), tmp_path)
    digits = data.load(tmp_path)
    assert (len(digits.train), len(digits.held_out)) == (1797, 0)
    assert digits.held_out.pixels.shape[1:] == (1, 8, 8)


def test_parts_too_small_for_the_metrics_are_rejected_before_writing(tmp_path):
    few = DIGITS.model_copy(update={"held_out": 0.004})  # one of each class: 10
    for minimum, part in (((6, 11), "10 held-out"), ((2000, 10), "1787 training")):
        with pytest.raises(UserError, match=f"{part} images") as error:
            data.prepare(few, tmp_path, minimum)
        assert error.value.code == "too-few-images"
    assert not list(tmp_path.iterdir())
    assert data.prepare(few, tmp_path, (6, 10)).held_out_images == 10


def test_data_stage_checks_the_sizes_that_metrics_need(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny["data"]["held_out"] = 0.004
    tiny["evaluation"]["neighbours"] = 12
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["data", "--configfile", "x.yaml"]) == 2
    assert "10 held-out images" in capsys.readouterr().err


@pytest.mark.parametrize("degrade", [*KNOWN.values(), *UNSEEN.values()])
def test_degradations_of_strength_zero_change_nothing(degrade):
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    noise = torch.randn_like(images)
    none, full = torch.zeros(6, 1, 1, 1), torch.ones(6, 1, 1, 1)
    torch.testing.assert_close(degrade(images, none, noise), images)
    assert not torch.allclose(degrade(images, full, noise), images, atol=0.1)


def test_floor_and_accuracy_need_a_held_out_part(workspace):
    config = workspace.config()
    config["data"]["held_out"] = 0
    workspace.write_config(config)
    assert workspace.stage("data").returncode == 0
    folder = workspace.results / "features" / "tiny-cnn"
    digits = data.load(workspace.results / "data")
    extractor = load_extractor(folder, digits)
    assert extractor.held_out_accuracy(digits) is None
    done = workspace.stage("score-references", "edm")
    assert done.returncode == 0, done.stderr
    record = json.loads((workspace.results / "scores" / "teachers" / "edm.json").read_text())
    assert [entry["student"] for entry in record["entries"]] == ["teacher", "teacher-1step"]
    assert {row["num_samples"] for entry in record["entries"] for row in entry["rows"]} == {400}
    assert {p["reference"] for p in record["protocols"].values()} == {"digits-train1797"}


def test_feature_networks_record_their_accuracy(finished):
    for name, chance in (("tiny-cnn", 0.5), ("tiny-critic", 0.3)):
        record = json.loads((finished.results / "features" / name / "features.json").read_text())
        assert record["held_out_accuracy"] > chance
    clip = json.loads((finished.results / "features/tiny-clip/features.json").read_text())
    assert set(clip["aesthetic"]["rank_correlation_known"]) == set(KNOWN)
    assert set(clip["aesthetic"]["rank_correlation_unseen"]) == set(UNSEEN)
