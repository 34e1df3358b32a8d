"""Data sets of image files, published statistics, and errors in both."""

import io
import json
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.cli import main
from harness.config.schema import DataSection
from harness.data import datasets as data
from harness.data import image_archive
from harness.data.image_sources import ImageSource, PixelReader
from harness.data.registry import data_source, stratified_split
from harness.errors import UserError
from harness.evaluation.frechet import load_statistics
from harness.io.artifacts import LFS_POINTER
from harness.io.records import DataRecord
from harness.validation import parse_experiment
from tests.test_config import problems, put


def images(count: int = 12, side: int = 4, channels: int = 3) -> np.ndarray:
    """Random uint8 `(N, C, H, H)`."""
    shape = (count, channels, side, side)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def png(image: np.ndarray, format: str = "PNG", **options) -> bytes:
    """An image `(C, H, W)` as a file."""
    pixels, buffer = image.transpose(1, 2, 0), io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(buffer, format, **options)
    return buffer.getvalue()


def named(pixels: np.ndarray) -> dict[str, bytes]:
    return {f"{i // 5:05d}/img{i:08d}.png": png(image) for i, image in enumerate(pixels)}


def with_labels(files: dict[str, bytes], labels) -> dict[str, bytes]:
    if isinstance(labels, list):
        labels = [[name, label] for name, label in zip(files, labels, strict=False)]
    return files | {"dataset.json": json.dumps({"labels": labels}).encode()}


def write(path: Path, files: dict[str, bytes]) -> Path:
    """Write a zip or a folder, in reverse order of names."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in reversed(files):
                archive.writestr(name, files[name])
        return path
    for name in reversed(files):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(files[name])
    return path


def read_images(source: Path, labelled: bool = True, num_classes: int | None = None):
    """Pixels, labels and class names in the order of the source, as `harness score-folder` reads."""
    found, names, labels = ImageSource(source), (), None
    listing = found.single()
    if labelled:
        names = found.class_names(num_classes)
        labels = found.numbers(listing, names)
    index = torch.arange(len(listing.names))
    return PixelReader(source, None).read([(listing, index)])[0], labels, names


LABELS = [i % 3 for i in range(12)]
SECOND = "00000/img00000001.png"


@pytest.mark.parametrize("kind", ["set.zip", "set"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels_equal_the_files(tmp_path, kind, channels):
    pixels = images(channels=channels)
    source = write(tmp_path / kind, with_labels(named(pixels), LABELS))
    section = DataSection(name="small", source=str(source), held_out=0.25)
    record = data.prepare(section, tmp_path / "data")
    assert record.image_shape == [channels, 4, 4]
    small = data.load(tmp_path / "data")
    assert small.class_names == ("0", "1", "2") and small.name == "small"
    train, held_out = stratified_split(torch.tensor(LABELS), 0.25)
    for part, index in ((small.train, train), (small.held_out, held_out)):
        assert np.array_equal(part.pixels.numpy(), pixels[index])
        assert part.labels.tolist() == [LABELS[i] for i in index]
    assert (len(small.train), len(small.held_out)) == (9, 3)


def test_labels_file_name_and_hidden_files_are_accepted(tmp_path):
    files = with_labels(named(images()), LABELS)
    files["labels"] = files.pop("dataset.json")
    source = write(tmp_path / "set", files | {".DS_Store": b"", "__MACOSX/._img.png": b""})
    assert read_images(source)[1].tolist() == LABELS


def test_links_to_folders_and_files_are_followed(tmp_path):
    pixels = images(count=7)
    files = [png(image) for image in pixels]
    for name, part in (("one", files[:3]), ("two", files[3:6]), ("disk", files[6:])):
        write(tmp_path / name, {f"{i}.png": content for i, content in enumerate(part)})
    source = tmp_path / "set"
    (source / "b").mkdir(parents=True)
    (source / "a").symlink_to(tmp_path / "one")
    (source / "b" / "deep").symlink_to("../../two")
    (source / "c.png").symlink_to(tmp_path / "disk" / "0.png")
    (tmp_path / "linked").symlink_to(source)
    assert np.array_equal(read_images(tmp_path / "linked", False)[0].numpy(), pixels)
    names = ["a/0.png", "a/1.png", "a/2.png", *(f"b/deep/{i}.png" for i in range(3)), "c.png"]
    index = {"labels": [[name, i] for i, name in enumerate(names)]}
    (source / "dataset.json").write_text(json.dumps(index))
    assert read_images(source)[1].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("link", "target", "code"),
    [
        ("00000/gone.png", "nowhere.png", "dangling-link"),
        ("gone", "nowhere", "dangling-link"),
        ("loop", "loop", "dangling-link"),
        ("00000/cycle", "..", "link"),
        ("00001/cycle", "../..", "link"),  # out of the data set and back
        ("again", "00000", "link"),
        ("00001/again.png", "../00000/img00000000.png", "link"),
    ],
)
def test_link_that_is_broken_or_repeats_images_is_named(tmp_path, link, target, code):
    source = write(tmp_path / "set", named(images()))
    (source / link).symlink_to(target)
    with pytest.raises(UserError) as error:
        read_images(source, labelled=False)
    assert error.value.code == code and "\n" not in str(error.value)
    assert str(source / link) in str(error.value)


def test_file_that_is_linked_twice_is_an_error(tmp_path):
    """Two links to one file outside of the data set would be two images."""
    disk = write(tmp_path / "disk", named(images(2)))
    first, second = (disk / name for name in named(images(2)))
    source = tmp_path / "set"
    (source / "more").mkdir(parents=True)
    (source / "a.png").symlink_to(first)
    (source / "b.png").symlink_to(second)
    assert len(read_images(source, labelled=False)[0]) == 2
    (source / "more" / "c.png").symlink_to(first)
    with pytest.raises(UserError) as error:
        read_images(source, labelled=False)
    message = str(error.value)
    assert error.value.code == "link" and "\n" not in message and "zip" in message
    assert all(str(path) in message for path in (source / "a.png", source / "more/c.png", first))


@pytest.mark.parametrize(
    ("link", "target"), [("labels", "dataset.json"), ("dataset.json", "labels")]
)
@pytest.mark.parametrize("kind", ["set.zip", "set"])
def test_index_may_be_a_link(tmp_path, kind, link, target):
    files = with_labels(named(images()), LABELS)
    files[target] = files.pop("dataset.json")
    source = write(tmp_path / kind, files)
    if kind == "set":
        (source / link).symlink_to(target)
    else:
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr(stored_link(link), target)
    assert read_images(source)[1].tolist() == LABELS


def stored_link(name: str) -> zipfile.ZipInfo:
    """The entry of a symbolic link, as `zip -y` writes it; its content is the target."""
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


def test_link_that_a_zip_contains_is_named(tmp_path):
    source = write(tmp_path / "set.zip", named(images()))
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(stored_link("again.png"), SECOND)
    with pytest.raises(UserError, match=r"set\.zip: again\.png is a symbolic link") as error:
        read_images(source, labelled=False)
    assert error.value.code == "link"


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    source = write(tmp_path / "set", named(images()))
    original = os.scandir

    def refuse(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"00001 could not be read") as error:
        read_images(source, labelled=False)
    assert error.value.code == "unreadable"


def test_name_that_a_zip_contains_twice_is_an_error(tmp_path):
    source = write(tmp_path / "set.zip", named(images()))
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(SECOND, png(images()[0]))
    with pytest.raises(UserError, match=SECOND) as error:
        read_images(source, labelled=False)
    assert error.value.code == "duplicate-name"


@pytest.mark.parametrize("windows", ["labels", "images"])
def test_backslashes_in_names_are_separators(tmp_path, windows):
    files = with_labels(named(images()), LABELS)
    if windows == "labels":
        files["dataset.json"] = files["dataset.json"].replace(b"/", b"\\\\")
    else:
        files = {name.replace("/", "\\"): content for name, content in files.items()}
    assert read_images(write(tmp_path / "set.zip", files))[1].tolist() == LABELS


def test_byte_order_mark_of_labels_is_ignored(tmp_path):
    files = with_labels(named(images()), LABELS)
    files["dataset.json"] = b"\xef\xbb\xbf" + files["dataset.json"]
    assert read_images(write(tmp_path / "set", files))[1].tolist() == LABELS


def test_without_labels_there_are_no_classes(tmp_path):
    source = write(tmp_path / "set.zip", named(images()))
    section = DataSection(name="small", source=str(source), labels=False, held_out=0.0)
    data.prepare(section, tmp_path / "data")
    small = data.load(tmp_path / "data")
    assert small.num_classes == 0 and not small.train.labels.any()
    read = small.train.pixels.numpy()  # in a mixed order
    assert sorted(map(np.ndarray.tobytes, read)) == sorted(map(np.ndarray.tobytes, images()))


def test_num_classes_may_exceed_the_largest_label(tmp_path):
    source = write(tmp_path / "set.zip", with_labels(named(images()), LABELS))
    assert len(read_images(source, num_classes=10)[2]) == 10


def test_many_images_are_read_in_order(tmp_path):
    pixels = images(count=300, side=2, channels=1)
    source = write(tmp_path / "set.zip", named(pixels))
    assert np.array_equal(read_images(source, labelled=False)[0].numpy(), pixels)


def second(content: bytes) -> dict[str, bytes]:
    """Files of a data set with this content as its second image."""
    files = named(images())
    return with_labels(files | {SECOND: content}, LABELS)


def raw(mode: str, size=(4, 4), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def header(size: tuple[int, int] = (4, 4), depth: int = 8) -> bytes:
    """An RGB PNG with a changed header."""
    content = bytearray(raw("RGB"))
    content[16:25] = struct.pack(">IIB", *size, depth)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("kind", ["set.zip", "set"])
@pytest.mark.parametrize(
    ("files", "code", "named_file"),
    [
        (named(images()), "no-labels", ""),
        ({"dataset.json": b'{"labels": null}'}, "no-images", ""),
        (with_labels(named(images()), None), "no-labels", "dataset.json"),
        (with_labels(named(images()), LABELS[:-1]), "labels", "11 labels for 12 images"),
        (with_labels(named(images()), [*LABELS[:-1], -1]), "label-range", "00002/img00000011.png"),
        (with_labels(named(images()), [*LABELS[:-1], "a"]), "labels", "dataset.json"),
        (with_labels(named(images()), [*LABELS[:-1], True]), "labels", "dataset.json"),
        (with_labels(named(images()), [*LABELS[:-1], 1.5]), "labels", "dataset.json"),
        (with_labels(named(images()), [[0, 1]] * len(LABELS)), "labels", "dataset.json"),
        ({k: v for k, v in with_labels(named(images()) | {"gone.png": b""}, [*LABELS, 0]).items() if v},
         "labels", "13 labels for 12 images"),
        (with_labels(named(images()), 3), "labels", "dataset.json"),
        (named(images()) | {"dataset.json": b"{"}, "labels", "dataset.json"),
        (named(images()) | {"dataset.json": b"\xff"}, "labels", "dataset.json"),
        (named(images()) | {"dataset.json": b"[" * 10**6}, "labels", "dataset.json"),
        (named(images()) | {"dataset.json": b"[]"}, "labels", "dataset.json"),
        (with_labels(named(images()) | {"other.png": png(images()[0])}, [*LABELS, 0])
         | {"third.png": png(images()[0])}, "labels", "13 labels for 14 images"),
        ({k.replace("11.", "x."): v for k, v in with_labels(named(images()), LABELS).items()},
         "labels", "00002/img000000x.png"),
        (second(png(images(side=8)[0])), "shape", "8 x 8"),
        (second(raw("RGB", (4, 5))), "shape", SECOND),
        (second(raw("RGBA")), "image-format", SECOND),
        (second(raw("I;16")), "image-format", SECOND),
        (second(header(depth=16)), "image-format", SECOND),
        (second(png(images()[0], "BMP")), "image-format", SECOND),
        (second(b""), "image-format", SECOND),
        (second(LFS_POINTER + b"v1\n"), "lfs-pointer", SECOND),
        (dict(list(with_labels(named(images()), LABELS).items())[1:]), "labels", "00000/img00000000.png"),
        (second(png(images(side=32)[0])[:-40]), "damaged", SECOND),
        (second(header((2049, 2049))), "image-format", "2048"),
        (second(header((20000, 20000))), "image-format", SECOND),
    ],
)  # fmt: skip
def test_invalid_files_are_rejected_before_writing(tmp_path, kind, files, code, named_file):
    source = write(tmp_path / kind, files)
    with pytest.raises(UserError) as error:
        data.prepare(DataSection(name="small", source=str(source)), tmp_path / "data")
    line = str(error.value)
    assert error.value.code == code
    assert named_file in line and str(source) in line and "\n" not in line
    assert not (tmp_path / "data").exists()


def test_files_must_match_the_experiment(tmp_path):
    source = write(tmp_path / "set.zip", with_labels(named(images()), LABELS))
    cases = (
        ({"num_classes": 2}, "label-range"),
        ({"resolution": 8}, "shape"),
        ({"sha256": "0" * 64}, "checksum"),
        ({"held_out": 0.99}, "too-few-images"),
    )
    for keys, code in cases:
        section = DataSection(name="small", source=str(source), **keys)
        with pytest.raises(UserError) as error:
            data_source(section).read()
        assert error.value.code == code


def test_files_that_would_fill_the_memory_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_archive, "MAX_IMAGE_BYTES", 1000)
    source = tmp_path / "set.zip"
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    with pytest.raises(UserError, match=r"a\.png") as error:
        read_images(source, labelled=False)
    assert error.value.code == "too-large"


def test_damaged_zip_files_are_rejected(tmp_path):
    source = write(tmp_path / "set.zip", with_labels(named(images()), LABELS))
    whole = source.read_bytes()
    at = whole.index(png(images()[7])) + 50
    for content, name in (
        (whole[:-100], "set.zip"),
        (whole[:at] + bytes(4) + whole[at + 4 :], "00001/img00000007.png"),
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=name) as error:
            read_images(source)
        assert error.value.code == "damaged"


# -- statistics ---------------------------------------------------------------------------------


def statistics(dim: int = 5, dtype=np.float64) -> dict[str, np.ndarray]:
    features = np.random.default_rng(0).normal(size=(50, dim))
    return {"mu": features.mean(0).astype(dtype), "sigma": np.cov(features.T).astype(dtype)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_are_read_in_double_precision(tmp_path, dtype):
    expected = statistics(dtype=dtype)
    np.savez(tmp_path / "s.npz", **expected)
    mean, covariance = load_statistics(tmp_path / "s.npz", dim=5)
    assert mean.dtype == covariance.dtype == torch.float64
    assert np.array_equal(mean.numpy(), expected["mu"])
    assert np.array_equal(covariance.numpy(), expected["sigma"])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mu": None}, "damaged"),
        ({"sigma": None}, "damaged"),
        ({"mu": np.zeros(4)}, "shape"),
        ({"mu": np.zeros(())}, "shape"),
        ({"mu": np.array([0, 0, np.nan, 0, 0])}, "not-finite"),
        ({"sigma": np.full((5, 5), np.inf)}, "not-finite"),
        ({"mu": np.array(["a"] * 5)}, "not-finite"),
        ({"mu": np.array([print] * 5)}, "damaged"),
        ({"sigma": np.triu(np.ones((5, 5)))}, "not-a-covariance"),
        ({}, "shape"),  # the extractor has another number of features
    ],
)
def test_invalid_statistics_are_rejected(tmp_path, change, code):
    path = tmp_path / "s.npz"
    np.savez(path, **{k: v for k, v in (statistics() | change).items() if v is not None})
    with pytest.raises(UserError) as error:
        load_statistics(path, dim=None if change else 2048)
    assert error.value.code == code
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_statistics_must_be_an_npz_file(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, **statistics())
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(5))
    contents = (b"", b"text", whole[:-40], whole[:100] + bytes(40) + whole[140:])
    for content in (*contents, (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_statistics(path)
        assert error.value.code == "damaged"
    with pytest.raises(UserError) as error:
        load_statistics(tmp_path / "none.npz")
    assert error.value.code == "missing-file"


def test_a_data_set_without_images(tmp_path):
    section = DataSection(name="cifar10", image_shape=(3, 32, 32), num_classes=10)
    record = data.prepare(section, tmp_path / "data")
    assert DataRecord.read(tmp_path / "data" / "data.json") == record
    cifar = data.load(tmp_path / "data")
    assert cifar.image_shape == (3, 32, 32) and cifar.num_classes == 10
    assert len(cifar.train) == len(cifar.held_out) == 0 and cifar.sha256 == record.sha256


# -- experiments --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder, to work in, with a set as zip and as folder, and statistics."""
    monkeypatch.chdir(tmp_path)
    content = with_labels(named(images()), LABELS)
    write(tmp_path / "set.zip", content)
    write(tmp_path / "set", content)
    np.savez(tmp_path / "s.npz", **statistics())
    return tmp_path


@pytest.mark.parametrize(
    ("section", "key", "code"),
    [
        ({"name": "cifar100"}, "data.name", "unknown-name"),
        ({"name": "a/b", "source": "set.zip"}, "data.name", "invalid-name"),
        ({"name": "x", "source": "non.zip"}, "data.source", "missing-file"),
        ({"name": "x", "source": ""}, "data.source", "invalid-value"),
        ({"name": "x", "source": "https://x.org/x.zip"}, "data.sha256", "missing-key"),
        ({"name": "x", "source": "set.zip", "sha256": "12"}, "data.sha256", "invalid-value"),
        ({"name": "x", "source": "set", "sha256": "0" * 64}, "data.sha256", "not-allowed"),
        ({"name": "x", "source": "set", "image_shape": [3, 4, 4]}, "data.image_shape", "not-allowed"),
        ({"name": "x", "source": "set", "labels": False, "num_classes": 3}, "data.num_classes", "not-allowed"),
        ({"name": "x", "source": "set", "held_out": 1}, "data.held_out", "invalid-value"),
        ({"name": "digits", "labels": False}, "data.labels", "not-allowed"),
        ({"name": "digits", "image_shape": [1, 8, 8]}, "data.image_shape", "not-allowed"),
        ({"name": "cifar10", "held_out": 0.1}, "data.held_out", "not-allowed"),
        ({"name": "x", "image_shape": [32, 32, 3]}, "data.image_shape", "invalid-value"),
        ({"name": "x", "image_shape": [3, 4, 4], "resolution": 3}, "data.resolution", "not-allowed"),
        ({"name": "x", "prompts": "s.npz"}, "data.image_shape", "missing-key"),
        ({"name": "x", "prompts": "none.txt", "image_shape": [3, 4, 4]}, "data.prompts", "missing-file"),
        ({"name": "x", "prompts": "p.csv", "image_shape": [3, 4, 4]}, "data.prompts", "table"),
    ],
)  # fmt: skip
def test_errors_in_the_data_section_name_their_key(files, tiny, section, key, code):
    put(tiny, "data", section)
    assert (key, code) in [(problem.key, problem.code) for problem in problems(tiny)]


def test_unlabelled_data_cannot_train_feature_networks(files, tiny):
    put(tiny, "data", {"name": "x", "source": "set", "labels": False})
    assert "features.tiny-cnn" in [problem.key for problem in problems(tiny)]


def test_users_of_images_are_rejected_without_images(files, tiny):
    put(tiny, "data", {"name": "x", "image_shape": [3, 4, 4]})
    assert {problem.key for problem in problems(tiny)} >= {
        "teachers.edm",
        *(f"features.{name}" for name in tiny["features"]),
        "students.gdd",
        "students.gdd-i",
        "evaluation.statistics",
    }


def test_workflow_watches_local_files_and_fingerprints_content(files, tiny):
    def experiment(**section):
        return parse_experiment(put(tiny, "data", {"name": "x"} | section) and tiny, "x")

    assert experiment(source="set.zip").data_files() == [Path("set.zip")]
    assert experiment(source="set").data_files() == [Path("set/dataset.json")]
    (files / "set" / "dataset.json").rename("list")
    assert experiment(source="set").data_files() == [
        *map(Path, ("set", "set/00000", "set/00001", "set/00002"))
    ]
    Path("split/train/cat").mkdir(parents=True)  # folders of folders are followed
    Path("split/train/cat/0.png").touch()
    Path("split/test").mkdir()
    Path("split/test/metadata.csv").touch()
    assert experiment(source="split").data_files() == [
        *map(Path, ("split", "split/test/metadata.csv", "split/train", "split/train/cat"))
    ]
    Path("list").rename("set/dataset.json")
    address = experiment(source="https://x.org/x.zip", sha256="0" * 64)
    assert address.data_files() == []
    (files / "moved.zip").write_bytes((files / "set.zip").read_bytes())
    moved = experiment(source="moved.zip", sha256="0" * 64)
    assert moved.data_fingerprint == address.data_fingerprint
    assert (
        moved.data_fingerprint != experiment(source="moved.zip", sha256="1" * 64).data_fingerprint
    )


def test_declarations_change_no_fingerprint(files, tiny):
    """A declared class count and width are compared with the source; keys that are newer than
    results are in the fingerprint only where they are set."""

    def experiment(**section):
        put(tiny, "data", {"name": "x", "source": "set"} | section)
        return parse_experiment(tiny, "x")

    plain = experiment()
    assert "resize" not in plain.data_fingerprint and "revision" not in plain.data_fingerprint
    for keys, same in (({"resolution": 4}, True), ({"num_classes": 3}, False)):
        declared = experiment(**keys)
        assert declared.data_fingerprint == plain.data_fingerprint
        # A larger class count would add classes, so the data stage runs again.
        assert (declared.prepared_data == plain.prepared_data) is same
    resized = experiment(resize={"size": 4})
    assert resized.data_fingerprint["resize"] == {"mode": "center-crop", "size": 4}
    assert resized.data_fingerprint != plain.data_fingerprint


def test_classes_that_labels_do_not_show_change_the_hash_of_the_data(files):
    hashes = set()
    for keys in ({}, {"num_classes": 3}, {"num_classes": 4}):
        record = data.prepare(DataSection(name="x", source="set", **keys), files / "data")
        hashes.add((record.sha256, len(record.class_names)))
        assert record.sha256 == data.load(files / "data").sha256
    assert len(hashes) == 2 and len({sha256 for sha256, _ in hashes}) == 2


def test_reason_of_a_failed_data_stage_is_reported_once(files, tiny, capsys):
    from harness.workflow.status import teacher_status

    write(files / "bad.zip", named(images()))
    put(tiny, "data", {"name": "x", "source": "bad.zip"})
    (files / "x.json").write_text(json.dumps(tiny))
    assert main(["data", "--configfile", "x.json"]) == 2
    error = capsys.readouterr().err
    assert "error: bad.zip" in error and "Traceback" not in error
    reason = teacher_status(parse_experiment(tiny, "x"), "edm")
    assert reason.startswith("failed (data: bad.zip")
