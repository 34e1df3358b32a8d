"""CIFAR-10 (Krizhevsky 2009): 60,000 images, 32 x 32, RGB, 10 classes.

The source is the official archive, the folder that it contains, or a folder written by
`tools/dataset_from_package.py`. The official files are pickles. Nothing is unpickled before its
hash is verified: the archive by its sha256, each file of a folder by torchvision's md5.
"""

import tarfile
import tempfile
from pathlib import Path

import torch

from harness.data.registry import DATASETS, OfficialSet
from harness.io.artifacts import load_tensors
from harness.io.downloads import fetch

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CONVERTED = "images.safetensors"  # written by tools/dataset_from_package.py


@DATASETS.register("cifar10")
class Cifar10(OfficialSet):
    image_shape = (3, 32, 32)
    class_names = tuple(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    )
    hashes = (
        "72271e0eaae021dd9568260927404c4fff87e7e0bfa04c843b94150b01b9bc26",
        "ecc0a6ddb5cb58330ce4f06c1825ec8c68baeade5baaacbb3cbdf8f385599213",
    )

    @classmethod
    def accepts(cls, path: Path) -> bool:
        files = (path / CONVERTED, path / "test_batch")
        return path.name.endswith(ARCHIVE) or any(file.is_file() for file in files)

    def read_parts(self, path):
        from torchvision.datasets import CIFAR10

        if path and (path / CONVERTED).is_file():
            stored = load_tensors(path / CONVERTED)
            return [(stored[f"{n}_pixels"], stored[f"{n}_labels"]) for n in ("train", "test")]
        with tempfile.TemporaryDirectory() as root:
            if path and path.is_dir():
                Path(root, FOLDER).symlink_to(path.resolve())
            else:
                with tarfile.open(fetch(str(path or URL), SHA256)) as archive:
                    archive.extractall(root, filter="data")
            # The md5 of each file is checked before it is unpickled.
            parts = [CIFAR10(root, train) for train in (True, False)]
        pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
        labels = [torch.tensor(part.targets, dtype=torch.uint8) for part in parts]
        return list(zip(pixels, labels, strict=True))
