"""CIFAR-10 (Krizhevsky 2009): 60,000 images, 32 x 32, RGB, 10 classes.

The source is the official archive, or the folder that it contains.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from harness.data.registry import DATASETS
from harness.data.torchvision_sets import TorchvisionSet
from harness.io.downloads import fetch

ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


@DATASETS.register("cifar10")
class Cifar10(TorchvisionSet):
    dataset = "CIFAR10"
    shape = (3, 32, 32)
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    hashes = (
        "72271e0eaae021dd9568260927404c4fff87e7e0bfa04c843b94150b01b9bc26",
        "ecc0a6ddb5cb58330ce4f06c1825ec8c68baeade5baaacbb3cbdf8f385599213",
    )

    @classmethod
    def accepts_official(cls, path: Path) -> bool:
        return path.name.endswith(ARCHIVE) or (path / "test_batch").is_file()

    def download(self) -> Path:
        return fetch(URL, SHA256)

    def unpack(self, source: Path, root: Path) -> None:
        # torchvision unpickles the files, so they must be the official ones.
        if source.is_dir():  # torchvision checks their md5 first
            (root / "cifar-10-batches-py").symlink_to(source.resolve())
            return
        fetch(str(source), SHA256)
        with tarfile.open(source) as archive:
            archive.extractall(root, filter="data")
